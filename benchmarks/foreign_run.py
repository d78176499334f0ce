"""What every run of another quantizer shares: its input tokens, its cost, its JSON line.

The scripts beside this file run inside the other tool's own environment, so nothing here
imports qwenq; numpy and the standard library are all there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import numpy as np


def fail(message: str) -> NoReturn:
    """End the script with one line on stderr and exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def print_figures(args: argparse.Namespace, quantize: Callable[[argparse.Namespace], dict[str, object]]) -> None:
    """One JSON line on stdout; what the tool prints meanwhile goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        figures = quantize(args)
    print(json.dumps(figures))


def calibrating_parser(description: str, bits: Sequence[int]) -> argparse.ArgumentParser:
    """The arguments of a tool that calibrates."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="16-bit model directory")
    parser.add_argument("out", type=Path, help="directory for the checkpoint; new or empty")
    parser.add_argument("--tokens", type=Path, required=True, help="int64 [num_samples, seq_len], .npy")
    parser.add_argument("--bits", type=int, choices=bits, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    return parser


def calibration_tokens(args: argparse.Namespace) -> np.ndarray:
    """Its token ids [num_samples, seq_len], int64, the same windows for every tool; its paths are checked first."""
    check_paths(args.model, args.out)
    tokens = _read_tokens(args.tokens)
    _check_vocabulary(tokens, args.model)
    return tokens


def figures_of(
    args: argparse.Namespace, tokens: np.ndarray, quantize_s: float, settings: dict[str, object], *packages: str
) -> dict[str, object]:
    """The JSON line of a tool that calibrated and has saved its checkpoint; the first of its packages names it."""
    return {
        "tool": packages[0].replace("-", ""),
        "model": args.model.name,
        "bits": args.bits,
        "group_size": args.group_size,
        **settings,
        "calibration": list(tokens.shape),
        "quantize_s": round(quantize_s, 2),
        "process_s": round(process_age_s(), 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "safetensors_bytes": directory_bytes(args.out, ".safetensors"),
        "versions": versions(*packages, "torch", "transformers", "numpy"),
    }


def _read_tokens(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as err:
        fail(f"cannot read tokens from {path}: {err}")
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype != np.int64 or tokens.size == 0:
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive"
        fail(f"{path} holds {found}, wanted int64 [num_samples, seq_len]")
    return tokens


def check_paths(model: Path, out: Path) -> None:
    """Refuse a model directory without a config and an output directory that holds anything."""
    if not (model / "config.json").is_file():
        fail(f"{model} is not a model directory: it has no config.json")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"{out} already exists and is not an empty directory")


def _check_vocabulary(tokens: np.ndarray, model: Path) -> None:
    """Refuse token ids outside the model's vocabulary, the sign of another model's tokenizer."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        fail(f"token ids span {low}..{high}, but {model} has a vocabulary of {vocab_size}")


def copy_tokenizer(model: Path, out: Path) -> None:
    """Copy the tokenizer files byte for byte over whatever the tool saved in their place."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
    for name in (*names, "chat_template.jinja", "generation_config.json"):
        if (model / name).is_file():
            (out / name).write_bytes((model / name).read_bytes())


def peak_rss_bytes() -> int | None:
    """Largest resident set of this process so far (VmHWM), None where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def process_age_s() -> float:
    """Seconds since this process was started, imports included."""
    clock_ticks = os.sysconf("SC_CLK_TCK")
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(after_name[19]) / clock_ticks  # field 22, starttime, counted from boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def directory_bytes(path: Path, suffix: str) -> int:
    """Bytes of all files in `path` whose names end in `suffix`."""
    return sum(file.stat().st_size for file in path.iterdir() if file.name.endswith(suffix))


def versions(*packages: str) -> dict[str, str]:
    """Installed version of each package, and Python's own."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
