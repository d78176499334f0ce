#!/usr/bin/env python3
"""One decoder layer of Qwen2.5-72B's shape through the whole of `qwenq quantize`: time by stage and peak memory.

    block_72b.py WORK_DIRECTORY [--calibration 64] [--evaluation 8] [--length 512] [--group-size 128] [--scale 1]

Makes a Qwen2 checkpoint of one layer (hidden 8192, FFN 29568, 64 heads, 8 of them key-value; vocabulary 1024) with
random bfloat16 weights: normal, standard deviation 1 / sqrt(in), one input channel in 64 five times larger, norms of 1
with one channel in 64 at 8. Tokens are random. What is measured is time and memory; the drift of a random layer means
nothing. --scale divides the widths, to try the script. One JSON line on stdout; the run's own log goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

LAYERS_OF_72B = 80


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="directory for the model, the tokens and the result; new")
    parser.add_argument("--calibration", type=int, default=64, help="windows")
    parser.add_argument("--evaluation", type=int, default=8, help="windows")
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, default=Path("tests/data/tiny-qwen2"))
    return parser.parse_args()


def config_of(scale: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 8192 // scale,
        "intermediate_size": 29568 // scale // 128 * 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 64 // scale,
        "num_key_value_heads": 8 // min(scale, 8),
        "vocab_size": 1024,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def random_matrix(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """bfloat16 [rows, columns]."""
    weight = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=columns**-0.5, generator=generator)
    weight[:, ::64] *= 5
    return weight


def make_model(directory: Path, scale: int, tokenizer: Path) -> None:
    config = config_of(scale)
    hidden, ffn, vocab = (int(str(config[k])) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = 128 * int(str(config["num_key_value_heads"]))
    generator = torch.Generator().manual_seed(0)
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    norm[::64] = 8
    prefix = "model.layers.0."
    tensors = {f"{prefix}{name}_layernorm.weight": norm.clone() for name in ("input", "post_attention")}
    for name, rows, columns in (
        ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv, hidden), ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, hidden), ("mlp.gate_proj", ffn, hidden), ("mlp.up_proj", ffn, hidden),
        ("mlp.down_proj", hidden, ffn),
    ):  # fmt: skip
        tensors[f"{prefix}{name}.weight"] = random_matrix(rows, columns, generator)
        if name.startswith(("self_attn.q", "self_attn.k", "self_attn.v")):
            tensors[f"{prefix}{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    tensors |= {"model.embed_tokens.weight": random_matrix(vocab, hidden, generator), "model.norm.weight": norm.clone()}
    tensors["lm_head.weight"] = random_matrix(vocab, hidden, generator)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, directory / name)


def main() -> None:
    args = parse_args()
    model, out = args.work / "model", args.work / "out"
    if not model.exists():
        make_model(model, args.scale, args.tokenizer)
    draw = np.random.default_rng(0)
    for name, windows in (("calibration", args.calibration), ("evaluation", args.evaluation)):
        np.save(args.work / f"{name}.npy", draw.integers(0, 1000, (windows, args.length), dtype=np.int64))
    command = [
        sys.executable, "-m", "qwenq", "quantize", str(model), "-o", str(out),
        "--bits", "4", "--group-size", str(args.group_size),
        "--calibration", str(args.work / "calibration.npy"), "--eval-text", str(args.work / "evaluation.npy"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result = json.loads(done.stdout)
    layer = result["layers"][0]
    stages = {stage: round(seconds, 1) for stage, seconds in layer["stages_s"].items()}
    user_s = sum(os.times()[2:4])
    print(
        json.dumps(
            {
                "shape": {k: v for k, v in config_of(args.scale).items() if k.endswith("_size")},
                "tokens": {"calibration": args.calibration * args.length, "evaluation": args.evaluation * args.length},
                "group_size": args.group_size,
                "threads": torch.get_num_threads(),
                "layer_s": round(layer["seconds"], 1),
                "stages_s": stages,
                "cpu_s": round(user_s, 1),
                "peak_rss_bytes": result["peak_rss_bytes"],
                "hours_for_80_layers": round(layer["seconds"] * LAYERS_OF_72B / 3600, 1),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
