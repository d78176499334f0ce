#!/usr/bin/env python3
"""Write a model whose widths are multiples of 128 and which computes what the given one does, up to last bits.

    pad_model.py MODEL OUT [--multiple 128]

For groups that do not divide a model's own widths: zero columns and rows widen the residual stream and the FFN, and
heads of zeros the attention (one key head and its query heads at a time). Norms see the zeros in their mean, so their
weights are multiplied by sqrt(old width / new width) and their epsilon by its square; those weights are stored in
float32. For models without norms of single heads (Qwen2, Llama), with tied embeddings or not.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="new")
    parser.add_argument("--multiple", type=int, default=128)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = json.loads((args.model / "config.json").read_text())
    if config.get("model_type") not in ("qwen2", "llama"):  # Qwen3 has norms of single heads
        raise SystemExit(f"error: {args.model} is a {config.get('model_type')} model, wanted qwen2 or llama")
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, each = config.get("head_dim") or hidden // heads, heads // shared
    new_hidden, new_ffn = (-(-width // args.multiple) * args.multiple for width in (hidden, ffn))
    new_shared = shared
    while new_shared * each * head_dim % args.multiple:
        new_shared += 1
    sizes = {  # rows and columns by the last part of a weight's path
        "q_proj": (new_shared * each * head_dim, new_hidden),
        "k_proj": (new_shared * head_dim, new_hidden),
        "v_proj": (new_shared * head_dim, new_hidden),
        "o_proj": (new_hidden, new_shared * each * head_dim),
        "gate_proj": (new_ffn, new_hidden),
        "up_proj": (new_ffn, new_hidden),
        "down_proj": (new_hidden, new_ffn),
    }
    tensors = {}
    for file in sorted(args.model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            path = name.split(".")[-2]
            if path.endswith("norm"):
                tensors[name] = torch.zeros(new_hidden)
                tensors[name][:hidden] = tensor.float() * (hidden / new_hidden) ** 0.5
                continue
            rows, columns = sizes.get(path, (tensor.shape[0], new_hidden))  # else embedding and head
            tensors[name] = tensor.new_zeros((rows, columns) if tensor.ndim == 2 else (rows,))
            tensors[name][tuple(slice(size) for size in tensor.shape)] = tensor
    config |= {
        "hidden_size": new_hidden,
        "intermediate_size": new_ffn,
        "num_attention_heads": new_shared * each,
        "num_key_value_heads": new_shared,
        "head_dim": head_dim,
        "rms_norm_eps": config["rms_norm_eps"] * hidden / new_hidden,
    }
    args.out.mkdir(parents=True)
    for path in args.model.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, args.out / path.name)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
