#!/usr/bin/env python3
"""Load a GPTQ v1 checkpoint with AutoGPTQ 0.7.1 itself and compare its logits with ours.

    check_autogptq.py CHECKPOINT --logits REF.npz

Runs inside the environment of requirements-autogptq.txt, on the CPU, through AutoGPTQ's plain
torch linear (its Triton and Exllama kernels are turned off) in float32: torch 2.2 has no float16
matrix product on a CPU. REF.npz as in check_gptqmodel.py. Prints one JSON object; exit code 1 when
the logits differ by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compare_logits import check, command_line, compare, fail, read_reference, versions


def parse_args() -> argparse.Namespace:
    return command_line(__doc__.splitlines()[0]).parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Logits of AutoGPTQ next to the reference's, as the JSON object."""
    check_config(args.checkpoint)
    import torch
    from auto_gptq import AutoGPTQForCausalLM

    input_ids, reference = read_reference(args.logits)
    model = AutoGPTQForCausalLM.from_quantized(
        str(args.checkpoint),
        device="cpu",
        torch_dtype=torch.float32,
        use_safetensors=True,
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
    ).model.eval()
    packed = [module for module in model.modules() if hasattr(module, "qweight")]
    if not packed:
        fail(f"{args.checkpoint}: AutoGPTQ made no quantized linear")
    rows = []
    with torch.inference_mode():
        for row in torch.from_numpy(input_ids):
            rows.append(model(input_ids=row[None], use_cache=False).logits[0].float().numpy())
    return {
        "checkpoint": args.checkpoint.name,
        "loader": "auto-gptq",
        "dtype": "float32",
        "kernels": {f"{type(packed[0]).__module__}.{type(packed[0]).__name__}": len(packed)},
        **compare(rows, reference, "float32"),
        "versions": versions("auto-gptq", "torch", "transformers"),
    }


def check_config(checkpoint: Path) -> None:
    """Refuse a config.json that transformers 4.40 would read wrongly without a word.

    transformers 5 saves `rope_parameters` in place of `rope_theta`; transformers 4.40 ignores it
    and takes its default base of 10000, so that the logits are wrong though the weights are right.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if "rope_parameters" in config and "rope_theta" not in config:
        fail(
            f"{checkpoint}/config.json was saved by transformers 5: transformers 4.40 does not read its "
            "rope_parameters. hint: copy the source model's config.json and add quantization_config to it"
        )


if __name__ == "__main__":
    check(parse_args(), run)
