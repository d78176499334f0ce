#!/usr/bin/env python3
"""One decoder layer of Qwen2.5-72B's shape through the whole of `qwenq quantize`: time by stage and peak memory.

    block_72b.py WORK_DIRECTORY [--calibration 64] [--evaluation 8] [--length 512] [--group-size 128] [--scale 1]

Makes a Qwen2 checkpoint of one layer (hidden 8192, FFN 29568, 64 heads, 8 of them key-value; vocabulary 1024) with
random bfloat16 weights, some channels larger than others. Tokens are random. What is measured is time and memory; the
drift of a random layer means nothing. --scale divides the widths, to try the script. One JSON line on stdout; the run's
own log goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from gpu_parts import CPU, make_checkpoint, token_file

LAYERS_OF_72B = 80


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="directory for the model, the tokens and the result; new")
    parser.add_argument("--calibration", type=int, default=64, help="windows")
    parser.add_argument("--evaluation", type=int, default=8, help="windows")
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--scale", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model, out = args.work / "model", args.work / "out"
    hidden, ffn = 8192 // args.scale, 29568 // args.scale // 128 * 128
    if not model.exists():
        heads, shared = 64 // args.scale, 8 // min(args.scale, 8)
        make_checkpoint(model, hidden=hidden, ffn=ffn, heads=heads, shared=shared, layers=1, device=CPU)
    command = [
        sys.executable, "-m", "qwenq", "quantize", str(model), "-o", str(out),
        "--bits", "4", "--group-size", str(args.group_size), "--json",
        "--calibration", str(token_file(args.work / "calibration.npy", args.calibration, args.length)),
        "--eval-text", str(token_file(args.work / "evaluation.npy", args.evaluation, args.length)),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result = json.loads(done.stdout)
    layer = result["layers"][0]
    stages = {stage: round(seconds, 1) for stage, seconds in layer["stages_s"].items()}
    user_s = sum(os.times()[2:4])
    print(
        json.dumps(
            {
                "shape": {"hidden_size": hidden, "intermediate_size": ffn},
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
