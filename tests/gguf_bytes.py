"""GGUF files put together byte by byte from their specification, so that anything in them can be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

U8, I8, U16, I16, U32, I32, F32, BOOL, TEXT, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def number(code: str, value: Any) -> bytes:
    """A little-endian number; what does not fit is cut to its lowest bits, and what is none becomes 7."""
    if code in "fd":
        try:
            return struct.pack("<" + code, float(value))
        except (TypeError, ValueError, OverflowError):
            return struct.pack("<" + code, 7.0)
    size = struct.calcsize("<" + code)
    whole = int(value) if isinstance(value, int | float) and abs(value) < 1e300 else 7
    return (whole % (1 << 8 * size)).to_bytes(size, "little")


def text(value: Any) -> bytes:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else str(value)[:100].encode()
    return number("Q", len(data)) + data


def value_bytes(kind: Any, value: Any) -> bytes:
    """A value of metadata without its kind; an array is [kind of its elements, elements]."""
    if kind == TEXT:
        return text(value)
    if kind == ARRAY:
        of, elements = value if isinstance(value, list) and len(value) == 2 else (U8, [])
        elements = elements if isinstance(elements, list) else [elements]
        data = b"".join(value_bytes(of, element) for element in elements)
        return number("I", of) + number("Q", len(elements)) + data
    return number(CODES.get(kind, "I") if isinstance(kind, int) else "I", value)


@dataclass
class File:
    """Entries (key, kind, value), tensors (name, sizes from the innermost on, type, offset), and what follows them."""

    entries: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    data: bytes = b""
    version: int = 3
    tensor_count: int | None = None
    entry_count: int | None = None
    alignment: int = 32
    magic: bytes = b"GGUF"

    def header(self) -> bytes:
        """All before the padding."""
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        entries = len(self.entries) if self.entry_count is None else self.entry_count
        parts = [self.magic, number("I", self.version), number("Q", tensors), number("Q", entries)]
        for entry in self.entries:
            key, kind, value = (*entry, "", U32, 0)[:3] if isinstance(entry, list | tuple) else (entry, U32, 0)
            parts += [text(key), number("I", kind), value_bytes(kind, value)]
        for entry in self.tensors:
            entry = entry if isinstance(entry, list | tuple) else ()
            name, sizes, kind, offset = (*entry, "", [], 0, 0)[:4]
            sizes = sizes if isinstance(sizes, list | tuple) else [sizes]
            parts += [text(name), number("I", len(sizes)), *(number("Q", size) for size in sizes)]
            parts += [number("I", kind), number("Q", offset)]
        return b"".join(parts)

    def encode(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path


def tensor_data(tensors: Sequence[tuple[str, Sequence[int], int, bytes]], alignment: int = 32) -> File:
    """A file of these tensors, each with its bytes, laid out as it should be."""
    entries, data = [], b""
    for name, sizes, kind, content in tensors:
        entries.append([name, list(sizes), kind, len(data)])
        data += content + bytes(-len(content) % alignment)
    return File(tensors=entries, data=data, alignment=alignment)


GGML = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "BF16": 30}


def entry(key: str, value: Any) -> list[Any]:
    """An entry of metadata, of the kind that llama.cpp's converter gives such a value."""
    if isinstance(value, list):
        of = TEXT if not value or isinstance(value[0], str) else I32
        return [key, ARRAY, [of, value]]
    kinds = {str: TEXT, bool: BOOL, int: U32, float: F32}
    return [key, kinds[type(value)], value]


def tiny_file(tiny: Path, *, layers: int = 1, types: Mapping[str, str] | None = None) -> File:
    """The tiny Qwen2 model, its first layers, as gguf-py's own functions quantize it; `types` by the end of a name.

    Keys and names are written out here, not taken from the project.
    """
    import gguf
    from tokenizers import Tokenizer

    config = json.loads((tiny / "config.json").read_bytes())
    document = json.loads((tiny / "tokenizer.json").read_bytes())
    vocabulary = Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab()
    special = {token["content"] for token in document["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"[PAD{k}]" for k in range(len(tokens), config["vocab_size"])]
    kinds = [3 if token in special else 1 if token in vocabulary else 5 for token in tokens]
    template = json.loads((tiny / "tokenizer_config.json").read_bytes())["chat_template"]
    metadata = {
        "general.architecture": "qwen2",
        "qwen2.block_count": layers,
        "qwen2.context_length": config["max_position_embeddings"],
        "qwen2.embedding_length": config["hidden_size"],
        "qwen2.feed_forward_length": config["intermediate_size"],
        "qwen2.attention.head_count": config["num_attention_heads"],
        "qwen2.attention.head_count_kv": config["num_key_value_heads"],
        "qwen2.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "qwen2.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template,
    }
    stored = {}
    for shard in sorted(tiny.glob("*.safetensors")):
        stored |= load_file(shard)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    inner = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
    names |= {f"blk.{k}.{ours}": f"model.layers.{k}.{theirs}" for k in range(layers) for ours, theirs in inner.items()}
    tensors = []
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            values = stored.get(f"{theirs}.{part}")
            if values is None:
                continue
            asked = (kind for end, kind in (types or {}).items() if ours.endswith(end))
            kind = "F32" if values.ndim == 1 else next(asked, "F16")
            data = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[kind])
            tensors.append((f"{ours}.{part}", values.shape[::-1], GGML[kind], np.ascontiguousarray(data).tobytes()))
    found = tensor_data(tensors)
    found.entries = [entry(key, value) for key, value in metadata.items()]
    return found
