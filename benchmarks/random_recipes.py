#!/usr/bin/env python3
"""Ten random recipes of a model: predicted KL beside measured KL, and their rank correlation.

    random_recipes.py MODEL SENSITIVITY.json WORK --calibration CALIBRATION.npy --evaluation EVALUATION.npy

Each fused group draws 4 bits or, with a share of its own for each recipe, 8 bits, and a group size of those that
divide it. The tokens (int64 [windows, tokens]) should be neither those the sensitivities were measured on nor alike.
Prints a line a recipe and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch

from qwenq.checkpoint.reader import open_source
from qwenq.formats.base import get_format
from qwenq.io.safetensors import fingerprint
from qwenq.pipeline.config import QuantizeConfig
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.quantize import quantize
from qwenq.planning.budget import recipe_of
from qwenq.planning.sensitivity import fused_groups, read_sensitivity, schemes_for
from qwenq.text.tokens import TokenWindows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("sensitivity", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--recipes", type=int, default=10)
    parser.add_argument("--windows", type=int, nargs=2, default=(24, 10), help="calibration, evaluation")
    return parser.parse_args()


def windows_of(path: Path, count: int) -> TokenWindows:
    return TokenWindows(torch.from_numpy(np.load(path))[:count], path.name, {})


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


def main() -> None:
    args = parse_args()
    source = open_source(args.model)
    table = read_sensitivity(args.sensitivity)
    table.check(source.spec, fingerprint(args.model))
    calibration, evaluation = (
        windows_of(path, count) for path, count in zip((args.calibration, args.evaluation), args.windows, strict=True)
    )
    config = QuantizeConfig(device="cpu", compute_dtype="float32", calibration_dtype="bfloat16", error_correction=1.0,
                            rotate=False)  # fmt: skip
    form = get_format(config.format)
    draw = random.Random(0)
    predicted, measured, bits = [], [], []
    args.work.mkdir(parents=True, exist_ok=True)
    for number in range(args.recipes):
        wide = draw.random()  # how often a group gets 8 bits
        choice = {}
        for fused in fused_groups(source.spec):
            asked = 8 if draw.random() < wide else 4
            choice[fused] = draw.choice([s for s in schemes_for(source.spec, fused, form) if s.bits == asked])
        recipe = recipe_of(source.spec, choice)
        out = args.work / f"recipe-{number}"
        job = QuantizeJob(source, out, recipe, config, calibration, evaluation)
        measured.append(quantize(job).drift.kl.mean)
        predicted.append(sum(table.loss(fused, scheme) for fused, scheme in choice.items()))
        bits.append(recipe.bits_per_linear_weight(source.spec))
        shutil.rmtree(out)
        print(f"{bits[-1]:.3f} bits: predicted {predicted[-1]:.5f}, measured {measured[-1]:.5f}", flush=True)
    correlation = rank_correlation(predicted, measured)
    print(json.dumps({"rank_correlation": correlation, "bits": bits, "predicted": predicted, "measured": measured}))


if __name__ == "__main__":
    main()
