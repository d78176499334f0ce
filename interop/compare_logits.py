"""How far two sets of logits may lie apart before a loader is said to read a file differently.

Shared by the check_*.py scripts, which run inside other tools' environments: numpy and the
standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

# Largest allowed RMS difference of the logits, as a share of the RMS of the reference logits, by
# the dtype the loader computes in. Measured on a 30-layer 135M model: float32 1.3e-6 and float16
# 2.7e-3 for a right reading; 0.048 when one linear of 210 takes its zero points off by one. bfloat16
# is a guess from its eight times coarser rounding.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# Smallest allowed share of positions whose most likely token is the same.
MIN_TOP1 = {"float32": 0.999, "float16": 0.98, "bfloat16": 0.93}


def fail(message: str) -> NoReturn:
    """End the script with one line on stderr and exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def read_reference(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` [B, T] int64 and `logits` [B, T, V] float32 of a reference file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            input_ids, logits = archive["input_ids"], archive["logits"]
    except (OSError, ValueError, KeyError) as err:
        fail(f"cannot read input_ids and logits from {path}: {err}")
    if input_ids.dtype != np.int64 or input_ids.ndim != 2:
        fail(f"{path}: input_ids is {input_ids.dtype} {list(input_ids.shape)}, wanted int64 [B, T]")
    if logits.dtype != np.float32 or logits.shape[:2] != input_ids.shape or logits.ndim != 3:
        found = f"{logits.dtype} {list(logits.shape)}"
        fail(f"{path}: logits is {found}, wanted float32 [B, T, V] for ids {list(input_ids.shape)}")
    return input_ids, logits


def compare(rows: Sequence[np.ndarray], reference: np.ndarray, dtype: str) -> dict[str, Any]:
    """Differences of `rows` (B arrays [T, V]) from `reference` [B, T, V], and whether they pass.

    `rms_relative` is RMS(difference) / RMS(reference); `top1_agreement` the share of positions
    with the same argmax; `kl_mean` the mean KL(reference || loader) in nats per token. A logit
    that is not finite fails the comparison.
    """
    max_abs = squared = squared_reference = kl = 0.0
    same = positions = 0
    for got, wanted in zip(rows, reference, strict=True):
        if got.shape != wanted.shape:
            fail(f"the loader gives logits {list(got.shape)} a sample, the reference {list(wanted.shape)}")
        if not np.isfinite(got).all():
            fail("the loader gives logits that are not finite")
        difference = got.astype(np.float64) - wanted
        max_abs = max(max_abs, float(np.abs(difference).max()))
        squared += float((difference**2).sum())
        squared_reference += float((wanted.astype(np.float64) ** 2).sum())
        log_p, log_q = log_softmax(wanted), log_softmax(got)
        kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        same += int((got.argmax(-1) == wanted.argmax(-1)).sum())
        positions += len(got)
    rms_relative = (squared / squared_reference) ** 0.5
    top1 = same / positions
    return {
        "positions": positions,
        "max_abs": max_abs,
        "max_abs_reference": float(np.abs(reference).max()),
        "rms_relative": rms_relative,
        "top1_agreement": top1,
        "kl_mean": kl / positions,
        "tolerance": {"rms_relative": TOLERANCE[dtype], "top1_agreement": MIN_TOP1[dtype]},
        "passed": rms_relative <= TOLERANCE[dtype] and top1 >= MIN_TOP1[dtype],
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser for CHECKPOINT --logits REF.npz, which every script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--logits", type=Path, required=True, help="REF.npz with input_ids and logits")
    return parser


def check(args: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]) -> NoReturn:
    """Print what `run` finds as JSON, all else to stderr; exit code 1 when the logits are too far apart."""
    if not (args.checkpoint / "config.json").is_file():
        fail(f"{args.checkpoint} is not a checkpoint directory: it has no config.json")
    with contextlib.redirect_stdout(sys.stderr):
        report = run(args)
    print(json.dumps(report, indent=2))
    raise SystemExit(0 if report["passed"] else 1)


def versions(*packages: str) -> dict[str, str]:
    """Installed version of each package, and Python's own."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
