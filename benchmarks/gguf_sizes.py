#!/usr/bin/env python3
"""GGUF files of this project and of llama-quantize, size by size: mean KL from the 16-bit model, ratios with intervals.

    gguf_sizes.py MODEL OUT --calibration TOKENS.npy --texts NAME=TOKENS.npy ... --llama-quantize FILE

MODEL is a 16-bit checkpoint whose widths are multiples of 256 (benchmarks/pad_model.py makes one). For each of --types
there are three files: llama-quantize's, with the importance matrix that this project saved from its own calibration
windows; this project's with the same type for each tensor; this project's with the types that the knapsack chooses for
at most the bytes of llama-quantize's. All are read in float32 beside the 16-bit model on the token ids of --texts
(int64 [windows, tokens], made by benchmarks/make_tokens.py). A ratio's interval is a paired bootstrap over windows
(4,000 draws, percentiles). Files and figures are kept: a second call adds what is new. Writes OUT/sizes.json and
OUT/sizes.svg, prints a Markdown table a text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import DRAWS, drifts, interval

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.report.drawing import MARKERS, text_width
from qwenq.report.plots import Point, draw_kl_size

KINDS = {"llama": "llama-quantize", "same": "the same types", "best": "types by the knapsack"}
STYLE = (
    "<style>text{font:13px sans-serif;fill:#222}.grid{stroke:#ddd}.axis,.leader,.range{stroke:#666}"
    ".s0{fill:#1f5fa8;stroke:#1f5fa8}.s1{fill:#b3431e;stroke:#b3431e}.s2{fill:#666;stroke:#666}.hollow{fill:none}</style>"
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K", "Q5_K_M", "Q6_K"])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--llama-quantize", default="llama-quantize")
    return parser.parse_args()


class Maker:
    """Files made on demand in `out`, each in a directory of its own name; seconds of each command in `seconds`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.calibration = ["--calibration", str(args.calibration)]
        self.imatrix = args.out / "imatrix.gguf"

    def run(self, name: str, command: list[str]) -> None:
        """Run a command whose output goes to OUT/NAME.log; its wall time to OUT/NAME.seconds."""
        print(name, file=sys.stderr, flush=True)
        started = time.perf_counter()
        with open(self.out / f"{name}.log", "w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        (self.out / f"{name}.seconds").write_text(f"{time.perf_counter() - started:.1f}\n")

    def qwenq(self, name: str, *options: str) -> Path:
        """The GGUF file of a `qwenq quantize` with these options."""
        directory = self.out / name
        if not directory.exists():
            fixed = ["quantize", str(self.args.model), "-o", str(directory), "--format", "gguf", "--eval-samples", "1"]
            self.run(name, [sys.executable, "-m", "qwenq", *fixed, *options])
        (file,) = directory.glob("*.gguf")
        return file

    def file(self, kind: str, mixture: str) -> Path:
        """The file of one of KINDS for a mixture of llama.cpp's."""
        name = f"{kind}-{mixture}"
        if kind == "same":
            matrix = ["--save-imatrix", str(self.imatrix)] if mixture == self.args.types[0] else []
            return self.qwenq(name, "--gguf-type", mixture, *self.calibration, *matrix)
        theirs = self.out / f"llama-{mixture}" / f"{mixture}.gguf"
        if kind == "llama":
            if not theirs.exists():
                self.file("same", self.args.types[0])  # which saves the matrix
                source = self.qwenq("bf16", "--gguf-type", "BF16", "--method", "rtn")
                theirs.parent.mkdir()
                command = [self.args.llama_quantize, "--imatrix", str(self.imatrix), str(source), str(theirs), mixture]
                self.run(name, command)
            return theirs
        table = self.out / "sensitivity.json"
        if not table.exists():
            command = [sys.executable, "-m", "qwenq", "sensitivity", str(self.args.model), "-o", str(table)]
            self.run("sensitivity", [*command, "--format", "gguf", *self.calibration])
        size = self.file("llama", mixture).stat().st_size
        return self.qwenq(name, "--sensitivity", str(table), "--target-size", str(size), *self.calibration)


def read(args: argparse.Namespace, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """By text, then by file: KL by window, perplexities, top-1. What OUT/TEXT.json has is not read again."""
    found = {}
    for entry in args.texts:
        text, _, tokens = entry.partition("=")
        ids_NT = torch.from_numpy(np.load(tokens))
        kept = args.out / f"{text}.json"
        rows = json.loads(kept.read_text()) if kept.exists() else {}
        new = {name: open_checkpoint(path) for name, path in files.items() if name not in rows}
        if new:
            for name, drift in drifts(open_checkpoint(args.model), new, ids_NT).items():
                rows[name] = {
                    "kl_by_window": drift.kl.double().reshape(len(ids_NT), -1).mean(1).tolist(),
                    "perplexity": float(drift.nll.mean().exp()),
                    "perplexity_16_bit": float(drift.reference_nll.mean().exp()),
                    "top1": float(drift.same_top1.double().mean()),
                }
            kept.write_text(json.dumps(rows) + "\n")
        found[text] = rows
    return found


def figures(rows: dict[str, Any], name: str, base: str, draws: np.random.Generator) -> dict[str, Any]:
    """Mean KL of one file with its interval, and its ratio to that of `base` on the same windows."""
    kl, theirs = (np.array(rows[n]["kl_by_window"]) for n in (name, base))
    picks = draws.integers(0, len(kl), (DRAWS, len(kl)))
    low, high = interval(kl[picks].mean(1))
    ratio = [float(kl.mean() / theirs.mean()), *interval(kl[picks].mean(1) / theirs[picks].mean(1))]
    rest = {key: rows[name][key] for key in ("top1", "perplexity", "perplexity_16_bit")}
    return {"kl": float(kl.mean()), "kl_low": low, "kl_high": high, "ratio": ratio} | rest


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    maker = Maker(args)
    files = {f"{kind}-{mixture}": maker.file(kind, mixture) for mixture in args.types for kind in args.kinds}
    found = read(args, files)
    table, points = [], []
    for text, rows in found.items():
        print(f"\n{text}\n")
        print("| | | bytes | mean KL, 95 % | top-1 | perplexity | to llama-quantize |")
        print("|---|---|---:|---|---:|---:|---|")
        for name, path in files.items():
            kind, mixture = name.split("-")
            size = path.stat().st_size
            row = figures(rows, name, f"llama-{mixture}", np.random.default_rng(0))
            timed = args.out / f"{name}.seconds"
            seconds = float(timed.read_text()) if timed.exists() else None
            table.append({"text": text, "type": mixture, "kind": kind, "bytes": size, "seconds": seconds} | row)
            ratio = "" if kind == "llama" else "{:.3f} [{:.3f}, {:.3f}]".format(*row["ratio"])
            kl = f"{row['kl']:.5f}, {row['kl_low']:.5f} to {row['kl_high']:.5f}"
            measured = f"{kl} | {100 * row['top1']:.2f} % | {row['perplexity']:.3f}"
            print(f"| {mixture} | {KINDS[kind]} | {size:,} | {measured} | {ratio} |")
            if text == next(iter(found)):
                series, label = list(KINDS).index(kind), mixture if kind == "llama" else ""
                shape = (row["kl"], row["kl_low"], row["kl_high"], series, kind != "llama")
                points.append(Point(label, size / 1e6, *shape))
    (args.out / "sizes.json").write_text(json.dumps(table, indent=1) + "\n")
    drawing = draw_kl_size(points, "file size, MB", 760, "sizes")
    at = 290.0
    for series, (kind, words) in enumerate(KINDS.items()):  # a legend, beside the axis's title
        drawing.mark(MARKERS[series], at, 18, f"{'hollow' if kind == 'llama' else 'mark'} s{series}")
        drawing.text(at + 12, 22, words, kind="label")
        at += 36 + text_width(words)
    (args.out / "sizes.svg").write_text(drawing.svg().replace("<title", STYLE + "<title", 1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
