"""What quantizing one layer takes of GPUs that are not there, beside the dry run's prediction; see trace_memory.py.

    PYTHONPATH=tests:tests/pipeline python benchmarks/trace_layer.py Qwen2.5-72B --rig H200 [--windows 64]

Windows have 512 tokens. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from test_quantize_cuda import traced_layer

from qwenq.formats.base import Recipe, Scheme
from qwenq.planning.models import load_spec
from qwenq.planning.rig import parse_rig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rig", default="H200")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--error-correction", type=float, default=0.0)
    args = parser.parse_args()
    spec = replace(load_spec(args.model), num_hidden_layers=1)
    gpus = [gpu.name for gpu in parse_rig(args.rig).gpus]
    recipe = Recipe(Scheme(args.bits, args.group_size))
    allocators, predicted, _ = traced_layer(spec, recipe, gpus, args.windows, args.error_correction)
    print(json.dumps({
        "model": args.model, "gpus": gpus, "windows": args.windows, "error_correction": args.error_correction,
        "traced_gb": [round(allocator.allocated_peak / 1e9, 3) for allocator in allocators],
        "reserved_gb": [round(allocator.reserved_peak / 1e9, 3) for allocator in allocators],
        "predicted_gb": round(predicted / 1e9, 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
