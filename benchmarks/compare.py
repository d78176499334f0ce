#!/usr/bin/env python3
"""Drift of several tools' checkpoints from their 16-bit model, read together, and ratios to the first with intervals.

    compare.py MODEL DIRECTORY --text NAME --bits 4 --group-size 64 --tools qwenq gptqmodel gptqmodel-mse

DIRECTORY holds NAME.npy (token ids, int64 [windows, tokens]) and for each tool TOOL-BITS-bit-gGROUP with its .json, as
benchmarks/run.sh makes them. A tool with a .json of its own name goes by that, and by the bits and bytes in it:
`llamacpp-Q4_K_M`, as benchmarks/llamacpp_quantize.py makes it. All checkpoints are streamed beside the 16-bit model in
float32. A ratio's interval is a paired bootstrap over windows (4,000 draws, percentiles): both means are taken of the
same windows. Appends one JSON object a tool to DIRECTORY/benchmarks.jsonl; prints a table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenq import __version__
from qwenq.checkpoint.reader import Checkpoint, open_checkpoint
from qwenq.pipeline.activations import embed
from qwenq.pipeline.evaluate import HeadWeights, compare_heads
from qwenq.pipeline.ranks import ALONE
from qwenq.pipeline.workers import Workers

DRAWS = 4000
SUFFIXES = {"mse": " mse=2.4", "full": " pull-share 1"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--tools", nargs="+", required=True)
    return parser.parse_args()


@torch.inference_mode()
def drifts(reference: Checkpoint, checkpoints: dict[str, Checkpoint], ids_NT: torch.Tensor) -> dict[str, Any]:
    """TokenDrift of each checkpoint; the 16-bit model is run once, layer by layer."""
    network = Workers(reference.config, reference.spec, dtype=torch.float32, window_tokens=ids_NT.shape[1])
    share = ALONE.share(range(len(ids_NT)))
    everything = {"reference": reference} | checkpoints
    states = {name: torch.empty(*ids_NT.shape, reference.spec.hidden_size) for name in everything}
    for name, checkpoint in everything.items():
        embed(checkpoint, {name: (states[name], ids_NT)})
    for layer in range(reference.spec.num_hidden_layers):
        for name, checkpoint in everything.items():
            network.fill(checkpoint.layer_state(layer))
            network.run_layer(states[name], share)
    base = (HeadWeights(reference), states["reference"])
    return {
        name: compare_heads(network.first, base, (HeadWeights(checkpoint), states[name]), ids_NT)
        for name, checkpoint in checkpoints.items()
    }


def interval(values: np.ndarray) -> list[float]:
    return [round(float(v), 6) for v in np.percentile(values, [2.5, 97.5])]


def main() -> None:
    args = parse_args()
    names = {
        tool: tool if (args.directory / f"{tool}.json").exists() else f"{tool}-{args.bits}-bit-g{args.group_size}"
        for tool in args.tools
    }
    reference = open_checkpoint(args.model)
    checkpoints = {tool: open_checkpoint(args.directory / name) for tool, name in names.items()}
    ids_NT = torch.from_numpy(np.load(args.directory / f"{args.text}.npy"))
    found = drifts(reference, checkpoints, ids_NT)
    windows = len(ids_NT)
    kl = {tool: drift.kl.numpy().reshape(windows, -1).mean(1) for tool, drift in found.items()}
    picks = np.random.default_rng(0).integers(0, windows, (DRAWS, windows))
    first = args.tools[0]
    rows = []
    for tool, drift in found.items():
        cost = json.loads((args.directory / f"{names[tool]}.json").read_text())
        if (timed := args.directory / f"{names[tool]}.time").exists():
            cost |= json.loads(timed.read_text())
        versions = {name.replace("-", ""): version for name, version in cost.get("versions", {}).items()}
        setting = f"{args.bits}-bit g{args.group_size}" + SUFFIXES.get(tool.partition("-")[2], "")
        bits = checkpoints[tool].recipe.bits_per_linear_weight(reference.spec)
        n_bytes = sum(f.stat().st_size for f in (args.directory / names[tool]).glob("*.safetensors"))
        low, high = interval(kl[tool][picks].mean(1))
        rows.append(
            {
                "tool": tool.split("-")[0],
                "version": versions.get(tool.split("-")[0], __version__),
                "setting": cost.get("setting", setting),
                "text": args.text,
                "kl": round(float(kl[tool].mean()), 6),
                "kl_low": low,
                "kl_high": high,
                "kl_ratio": [
                    round(float(kl[first].mean() / kl[tool].mean()), 4),
                    *interval(kl[first][picks].mean(1) / kl[tool][picks].mean(1)),
                ],
                "perplexity": round(float(drift.nll.mean().exp()), 4),
                "perplexity_16_bit": round(float(drift.reference_nll.mean().exp()), 4),
                "top1": round(float(drift.same_top1.double().mean()), 5),
                "bits_per_linear_weight": round(cost.get("bits_per_linear_weight", bits), 4),
                "bytes": cost.get("bytes", n_bytes),
                "seconds": cost["process_s"],
                "peak_rss_bytes": cost["peak_rss_bytes"],
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
            }
        )
    with open(args.directory / "benchmarks.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{args.text}: {windows} x {ids_NT.shape[1]} tokens, float32; ratios are {first}'s figure over the tool's")
    heads = f"{'KL':>8} {'ratio [95 %]':>22} {'ppl':>8} {'top-1':>7} {'bits':>6} {'wall s':>15} {'peak GB':>15}"
    print(f"{'tool':24} {heads}")
    for tool, row in zip(args.tools, rows, strict=True):
        mine = rows[0]
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*row["kl_ratio"])
        wall = f"{row['seconds']:.0f} ({mine['seconds'] / row['seconds']:.2f})"
        peak = f"{row['peak_rss_bytes'] / 1e9:.2f} ({mine['peak_rss_bytes'] / row['peak_rss_bytes']:.2f})"
        print(
            f"{tool:24} {row['kl']:8.4f} {ratio:>22} {row['perplexity']:8.2f} {row['top1']:7.4f} "
            f"{row['bits_per_linear_weight']:6.3f} {wall:>15} {peak:>15}"
        )


if __name__ == "__main__":
    main()
