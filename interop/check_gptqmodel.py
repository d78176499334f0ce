#!/usr/bin/env python3
"""Load a GPTQ or AWQ checkpoint with other people's code and compare its logits with ours.

    check_gptqmodel.py CHECKPOINT --logits REF.npz [--loader gptqmodel|transformers]

Runs inside the environment of requirements-gptqmodel.txt. REF.npz holds `input_ids` [B, T]
int64 and `logits` [B, T, V] float32, the logits of this project's own dequantization run in
float32. `--loader gptqmodel` calls GPTQModel.load with its torch kernel; `--loader
transformers` goes through AutoModelForCausalLM, optimum and gptqmodel, as a user's script does.
Prints one JSON object; exit code 1 when the logits differ by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read when gptqmodel is imported
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its torch kernel compiles itself, for minutes

from compare_logits import check, command_line, compare, fail, read_reference, versions

DTYPES = ("float16", "bfloat16")  # all that GPTQModel's kernels compute in


def parse_args() -> argparse.Namespace:
    parser = command_line(__doc__.splitlines()[0])
    parser.add_argument("--loader", choices=("gptqmodel", "transformers"), default="gptqmodel")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype the loader computes in")
    return parser.parse_args()


def load_model(checkpoint: Path, loader: str, dtype_name: str) -> Any:
    """The checkpoint as a torch module on the CPU, its linears still packed.

    Both loaders are told to use the plain torch kernel: on some CPUs the automatic choice first
    compiles a C++ extension for several minutes.
    """
    import torch

    dtype = getattr(torch, dtype_name)
    stored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    if loader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        kernel = BACKEND.AWQ_TORCH if stored["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
        return GPTQModel.load(str(checkpoint), device="cpu", backend=kernel, dtype=dtype).model
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    if stored["quant_method"] == "awq":
        kernel = AwqConfig(bits=stored["bits"], group_size=stored["group_size"], backend="torch_awq")
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, device_map="cpu", dtype=dtype, quantization_config=kernel
        )
    kernel = GPTQConfig(bits=stored["bits"], backend="gptq_torch")  # all else comes from the checkpoint
    return AutoModelForCausalLM.from_pretrained(checkpoint, device_map="cpu", dtype=dtype, quantization_config=kernel)


def packed_linears(model: Any) -> dict[str, int]:
    """Class name -> count of the modules that hold packed weights."""
    counts: dict[str, int] = {}
    for module in model.modules():
        if hasattr(module, "qweight"):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return counts


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Logits of the loader next to the reference's, as the JSON object."""
    import torch

    input_ids, reference = read_reference(args.logits)
    model = load_model(args.checkpoint, args.loader, args.dtype).eval()
    kernels = packed_linears(model)
    if not kernels:
        fail(f"{args.checkpoint}: the loader made no quantized linear; it read the checkpoint as an ordinary one")
    rows = []
    with torch.inference_mode():
        for row in torch.from_numpy(input_ids):
            rows.append(model(input_ids=row[None], use_cache=False).logits[0].float().numpy())
    figures = compare(rows, reference, args.dtype)
    return {
        "checkpoint": args.checkpoint.name,
        "loader": args.loader,
        "dtype": args.dtype,
        "kernels": kernels,
        **figures,
        "versions": versions("gptqmodel", "optimum", "torch", "transformers"),
    }


if __name__ == "__main__":
    check(parse_args(), run)
