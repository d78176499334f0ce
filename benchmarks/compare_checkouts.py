#!/usr/bin/env python3
"""Two source checkouts of this project side by side: the bytes they write, the answers they print, how they are built.

    compare_checkouts.py BEFORE AFTER --out report.json [--demo DIR] [--only answers] [--keep WORK]

Made for a restructuring that must change neither bytes nor figures. Every command line runs in both checkouts, in one
process a checkout, with the same inputs, on one thread of a CPU:

- bytes: checkpoints of tiny models (with --demo DIR also of DIR, the demo's model) in every format, with every option
  that decides bytes; conversions; sensitivities. Shards, configurations and tokenizer files must be the same bytes, the
  manifest must have the same digest once keys are renamed and what belongs to one run is left out;
- answers: `--json`, CSV and text of vram, plan, inspect and the dry runs, exit codes and one-line errors, over a fixed
  list of cases; GPUs are stood in for by stubs of NVML and torch.cuda;
- counts: see count_house.py.

What may differ is listed in four tables below: renamed keys and words, and what only AFTER says. A Markdown summary
goes to stdout, everything to --out. Exit code 1 when anything differs that the tables do not allow.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import unified_diff
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

# ---------------------------------------------------------------------- what may differ

# JSON keys, BEFORE -> AFTER, at any depth of manifests and answers.
RENAMED_KEYS: dict[str, str] = {"pull": "error_correction", "pull_share": "error_correction_share",
                                "units": "schemes", "unit_bytes": "stage_bytes", "lanes": "workers"}  # fmt: skip

# Regular expressions and their replacements, applied in order to BEFORE's texts: stdout, stderr, strings inside JSON,
# model cards, recipe files. Layout (runs of spaces, rules of tables) does not count where one of them matched.
REWORDED: list[tuple[str, str]] = [
    (r"o and down pulled, by (\d+) of them", r"error correction of o and down from \1 of them"),
    (r"nothing pulled", "no error correction"),
    (r"up to (\d) lanes", r"up to \1 workers"),
    (r"\bpull ([\d.]+), pull_share ", r"error_correction \1, error_correction_share "),
    (r"--pull(-share|)(?=[ '])", r"--error-correction\1"),
    (r"strips: weights written out strip by strip", "row blocks: weights written out in row blocks"),
    (r"every unit stays in 16 bit", "every fused group stays in 16 bit"),
    (r"is no unit\b", "is no fused group"),
    (r"how much KL each unit of MODEL costs", "the KL that each fused group of MODEL costs"),
    (r"of one unit alone", "of one fused group alone"),
    (r"the scheme of each unit\.", "the scheme of each fused group."),
]

# Keys that only AFTER has, as `parent.key` or `key`: left out of its JSON.
ADDED_KEYS: set[str] = {"layers_not_made_again"}

# Regular expressions (multi-line) for text that only AFTER prints: left out of its text.
ADDED_TEXT: list[str] = []

# ---------------------------------------------------------------------- what belongs to one run

RUN_KEYS = {
    "run", "digest",  # of a manifest; `digest` covers renamed keys, so it is computed again
    "qwenq",  # the version
    "seconds", "stages_s", "layer_seconds", "peak_rss_bytes",
}  # fmt: skip
RUN_TEXT = [(r"\bqwenq \d+\.\d+\.\w+", "qwenq VERSION")]

MANIFEST, JOURNAL = "qwenq-manifest.json", "qwenq-journal.jsonl"
TEXTS = (".md", ".toml", ".txt", ".csv")
GIB = 1 << 30

# name as NVML and torch give it, total, free, compute capability
Card = tuple[str, int, int, tuple[int, int]]
CARD_3090: Card = ("NVIDIA GeForce RTX 3090", 24 * GIB, 23 * GIB, (8, 6))
CARD_4090: Card = ("NVIDIA GeForce RTX 4090", 24 * GIB, 22 * GIB, (8, 9))
CARD_3060: Card = ("NVIDIA GeForce RTX 3060", 12 * GIB, 11 * GIB, (8, 6))


@dataclass(frozen=True)
class Case:
    """One command line; `makes` is the file or directory it writes, relative to the working directory."""

    words: tuple[str, ...]
    makes: str = ""
    gpus: tuple[Card, ...] = ()

    @property
    def line(self) -> str:
        cards = f"  [{', '.join(card[0] for card in self.gpus)}]" if self.gpus else ""
        return " ".join(word if re.fullmatch(r"[\w./:=,+-]+", word) else repr(word) for word in self.words) + cards


@dataclass
class Outcome:
    """How one case came out in both checkouts."""

    case: str
    exit_code: int
    exact: bool  # without the help of the tables
    same: bool
    differences: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # of the manifest, as compared


# ---------------------------------------------------------------------- cases: bytes


def quantize(model: str, name: str, *options: object) -> Case:
    words = ("quantize", model, "-o", f"out/{name}", "--device", "cpu", "--json", *map(str, options))
    return Case(words, f"out/{name}")


def byte_cases() -> list[Case]:
    """Checkpoints of the trained tiny model and of random ones; then what reads them."""
    text = ("--calibration", "in/calib.txt", "--eval-text", "in/heldout.txt")
    small = (*text, "-n", 8, "--sequence-length", 128, "--eval-samples", 2)

    def tiny(name: str, *options: object) -> Case:
        return quantize("in/tiny-qwen2", name, *small, *options)

    cases = [tiny(f"gptq-{bits}-{size}", "--bits", bits, "--group-size", size)
             for bits, size in itertools.product((4, 8), (128, 64, 32, -1))]  # fmt: skip
    cases += [tiny(f"gptq-asym-{bits}", "--bits", bits, "--asymmetric") for bits in (4, 8)]
    cases += [tiny(f"awq-{size}", "--format", "awq", "--group-size", size) for size in (128, 32)]
    cases += [tiny("awq-sym", "--format", "awq", "--symmetric"), tiny("awq-8", "--format", "awq", "--bits", 8)]
    packed = ("--format", "compressed-tensors")
    cases += [tiny(f"ct-{bits}-{size}{sign[2:6]}", *packed, "--bits", bits, "--group-size", size, sign)
              for bits, size, sign in itertools.product((4, 8), (64, -1), ("--symmetric", "--asymmetric"))]  # fmt: skip
    cases += [tiny("nf4", "--format", "bnb-nf4"), tiny("int8", "--format", "bnb-int8")]
    cases += [tiny("nf4-bf16", "--format", "bnb-nf4", "--dtype", "bfloat16")]
    # solver
    for name, options in {
        "pull-0": ("--pull", 0), "pull-half": ("--pull", 0.5), "pull-1": ("--pull", 1), "share-1": ("--pull-share", 1),
        "share-0": ("--pull-share", 0), "no-fold": ("--no-fold",), "no-fold-pull-0": ("--no-fold", "--pull", 0),
        "damped": ("--damp-percent", 0.2), "rtn": ("--method", "rtn"), "8-pulled": ("--bits", 8, "--pull", 1),
        "awq-rtn": ("--format", "awq", "--method", "rtn"), "ct-8-rtn": (*packed, "--bits", 8, "--method", "rtn"),
        "ct-no-fold": (*packed, "--asymmetric", "--no-fold"), "awq-pull-0": ("--format", "awq", "--pull", 0),
    }.items():  # fmt: skip
        cases.append(tiny(name, "--group-size", 64, *options))
    # text and dtypes
    for name, more in {
        "builtin": ("-n", 3, "--eval-samples", 2), "seed": ("--seed", 5, "-n", 3, "--eval-samples", 2),
        "jsonl": ("--calibration", "in/calib.jsonl", "-n", 6, "--sequence-length", 64, "--eval-samples", 2),
        "npy": ("--calibration", "in/tokens.npy", "--eval-text", "in/tokens.npy"),
        "odd-length": (*text, "-n", 7, "--sequence-length", 77, "--eval-samples", 3),
        "one-window": (*text, "-n", 1, "--sequence-length", 256, "--eval-samples", 1),
        "defaults": text,
    }.items():  # fmt: skip
        cases.append(quantize("in/tiny-qwen2", name, *more))
    cases += [
        tiny("calibrated-float32", "--calibration-dtype", "float32"),
        tiny("calibrated-bfloat16", "--calibration-dtype", "bfloat16"),
        tiny("computed-bfloat16", "--compute-dtype", "bfloat16"),
        tiny("stored-bfloat16", "--dtype", "bfloat16"),
        tiny("ct-stored-bfloat16", *packed, "--dtype", "bfloat16"),
    ]
    # mixed
    table = ("sensitivity", "in/tiny-qwen2", "--calibration", "in/calib.txt", "-n", "8", "--sequence-length", "128",
             "--device", "cpu", "--json")  # fmt: skip
    cases += [
        Case((*table, "-o", "out/sensitivity.json"), "out/sensitivity.json"),
        Case((*table, "-o", "out/sensitivity-asym.json", "--asymmetric"), "out/sensitivity-asym.json"),
        tiny("mixed-bpw", "--bpw", 5, "--sensitivity", "out/sensitivity.json"),
        tiny("mixed-size", "--target-size", "1.08MB", "--sensitivity", "out/sensitivity.json"),
        tiny("mixed-fit", "--fit", "2x RTX 3090", "-c", 512, "--sensitivity", "out/sensitivity.json"),
        tiny("mixed-measured", "--bpw", 4.6),
        tiny("mixed-recipe", "--recipe", "in/recipe.toml"),
        tiny("mixed-recipe-pull-0", "--recipe", "in/recipe.toml", "--pull", 0),
        tiny("mixed-ct", *packed, "--recipe", "in/recipe-asym.toml"),
        tiny("mixed-ct-bpw", *packed, "--bpw", 4.7, "--asymmetric", "--sensitivity", "out/sensitivity-asym.json"),
        tiny("not-padded", "--pad-for-tp", 2, "--group-size", 64),
        tiny("refused-padding", "--pad-for-tp", 2),
    ]
    # other architectures, random: q/k norm, biases here and there, a tied head
    for model in ("qwen3", "llama", "qwen2-tied", "llama-bias"):
        short = (*text, "-n", 6, "--sequence-length", 48, "--eval-samples", 2, "--group-size", 32)
        cases += [
            quantize(f"in/{model}", f"{model}-gptq", *short),
            quantize(f"in/{model}", f"{model}-ct-8", *short, *packed, "--bits", 8, "--pull", 1),
            quantize(f"in/{model}", f"{model}-awq", *short, "--format", "awq", "--no-fold"),
            quantize(f"in/{model}", f"{model}-nf4", *short[:-2], "--format", "bnb-nf4"),
        ]
    # padding: a width of 96 has no two ranks of whole groups of 32
    padded = (*text, "-n", 6, "--sequence-length", 48, "--eval-samples", 2, "--pad-for-tp", 2)
    cases += [
        quantize("in/llama", "padded", *padded, "--group-size", 32, "--pull", 1),
        quantize("in/qwen3", "padded-awq", *padded, "--group-size", 32, "--format", "awq"),
        quantize("in/llama-bias", "padded-ct", *padded, "--group-size", 32, *packed, "--asymmetric"),
        quantize("in/llama", "padded-mixed", *padded, "--bpw", 6.5),
    ]
    return cases + reading_cases()


def reading_cases() -> list[Case]:
    """Conversions of what byte_cases made, and its verification, evaluation and inspection."""
    cases = []
    for source, formats in {
        "gptq-4-128": ("awq", "compressed-tensors", "gptq"), "gptq-8-64": ("compressed-tensors", "awq"),
        "gptq-asym-4": ("awq", "compressed-tensors"), "awq-128": ("gptq", "compressed-tensors"), "nf4": ("gptq",),
        "ct-4-64asym": ("gptq", "awq"), "ct-8--1symm": ("gptq",), "mixed-recipe": ("compressed-tensors", "awq"),
        "mixed-ct": ("gptq",), "padded": ("awq", "compressed-tensors"), "padded-mixed": ("compressed-tensors",),
        "qwen3-gptq": ("awq",),
        "llama-bias-ct-8": ("gptq",),
    }.items():  # fmt: skip
        for target in formats:
            made = f"out/{source}-to-{target}"
            cases.append(Case(("convert", f"out/{source}", made, "--format", target, "--json"), made))
    for name in ("gptq-4-128", "ct-4-64asym", "awq-32", "int8", "mixed-recipe", "padded", "gptq-4-128-to-awq"):
        cases.append(Case(("verify", f"out/{name}", "--json")))
    for name in ("gptq-4-128", "mixed-recipe", "nf4", "awq-pull-0"):
        cases.append(Case(("verify", f"out/{name}", "--source", "in/tiny-qwen2", "--layers", "1,3", "--json")))
    cases.append(Case(("verify", "out/gptq-8-32", "--source", "in/qwen3", "--json")))
    cases.append(Case(("verify", "out/padded", "--source", "in/llama", "--all-layers", "--json")))
    measured = ("--text", "in/heldout.txt", "-n", "2", "--sequence-length", "128", "--device", "cpu", "--json")
    for name in ("gptq-4-128", "ct-8--1symm", "awq-128", "nf4", "int8", "mixed-ct"):
        cases.append(Case(("eval", f"out/{name}", "--reference", "in/tiny-qwen2", *measured)))
    cases.append(Case(("eval", "out/padded", "--reference", "in/llama", *measured)))
    cases.append(Case(("eval", "out/qwen3-gptq", "--reference", "in/qwen3", *measured)))
    cases.append(Case(("eval", "out/llama-bias-awq", "--reference", "in/llama-bias", *measured, "--max-kl", "1e-9")))
    cases += [Case(("inspect", f"out/{name}", "--json")) for name in ("padded", "mixed-ct", "int8", "llama-gptq")]
    return cases


def demo_cases() -> list[Case]:
    """The demo's model: every format, 4 and 8 bits, mixed bits."""
    short = ("-n", 4, "--sequence-length", 128, "--eval-samples", 1)
    packed = ("--format", "compressed-tensors")
    made = {
        "demo-gptq-4": ("--group-size", 64), "demo-gptq-4-pulled": ("--group-size", 64, "--pull", 1),
        "demo-gptq-asym": ("--group-size", 64, "--asymmetric"), "demo-gptq-8": ("--bits", 8, "--group-size", 64),
        "demo-awq": ("--format", "awq", "--group-size", 64), "demo-ct-4": (*packed, "--group-size", 32),
        "demo-ct-8": (*packed, "--bits", 8, "--group-size", -1), "demo-nf4": ("--format", "bnb-nf4"),
        "demo-int8": ("--format", "bnb-int8"), "demo-mixed": ("--recipe", "out/demo-recipe.toml"),
    }  # fmt: skip
    saved = "out/demo-recipe.toml"
    return [
        Case(("quantize", "in/demo", "--bpw", "5", "--dry-run", "--save-recipe", saved, "--json"), saved),
        *(quantize("in/demo", name, *short, *options) for name, options in made.items()),
        Case(("convert", "out/demo-gptq-4", "out/demo-to-ct", *packed, "--json"), "out/demo-to-ct"),
    ]


# ---------------------------------------------------------------------- cases: answers

MODELS = (
    "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B", "Qwen2.5-72B",
    "Qwen/Qwen2.5-72B-Instruct", "Qwen2.5-14B-Instruct-1M", "Qwen2.5-Coder-32B", "Qwen3-0.6B", "Qwen3-32B", "QwQ-32B",
    "Llama-3.1-8B", "Llama-3.3-70B-Instruct", "Qwen2-72B", "in/tiny-qwen2", "in/qwen3", "in/config-llama",
)  # fmt: skip
PUBLISHED = (
    "Qwen/Qwen2.5-72B-Instruct-AWQ", "Qwen2.5-72B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct-GPTQ-Int8",
    "in/gptq", "in/awq", "in/ct-8", "in/nf4", "in/int8", "in/mixed", "in/padded",
)  # fmt: skip
RIGS = (
    "2x RTX 3090", "RTX 4090", "RTX 4090 + 2x RTX 3060 12GB", "4x RTX 3090", "8x RTX 3090", "3x RTX 4090",
    "A100 SXM4 80GB", "2x H100 SXM5 80GB", "2x 24GB", "48GB", "Tesla P40", "RX 7900 XTX", "2x Tesla T4", "RTX 5090",
    "Apple M2 Ultra", "DGX Spark (GB10)", "GTX 1080 Ti", "MI300X", "2x RTX A6000",
)  # fmt: skip
ENGINES = ("qwenq", "transformers", "vllm", "llama.cpp")
KV_DTYPES = {
    "qwenq": ("auto", "bf16", "fp8"), "transformers": ("auto", "fp16"), "vllm": ("auto", "fp8"),
    "llama.cpp": ("auto", "q8_0", "q4_0"),
}  # fmt: skip


def answer_cases() -> list[Case]:
    """A fixed list, each command line once."""
    drawn = random.Random(15)
    lines: list[tuple[tuple[str, ...], tuple[Card, ...]]] = []

    def add(*words: object, gpus: tuple[Card, ...] = ()) -> None:
        lines.append((tuple(str(word) for word in words), gpus))

    for _ in range(90):
        add("vram", *_estimate(drawn), "--json")
    for engine, rig in itertools.product(ENGINES, ("2x Tesla T4", "RTX 4090", "Tesla P40", "2x RTX 3090")):
        # decoding, not the prompt, is what needs most
        add("vram", "Qwen2.5-7B", "--engine", engine, "--gpu", rig, "-c", "32k,128k", "--prefill-chunk", "64", "--json")
    add("vram", "Qwen2.5-7B", "--profile", "in/profile.json", "-c", "1k,8k", "--gpu", "2x RTX 3090", "--json")
    add("vram", "Qwen2.5-7B", "--profile", "in/profile.json", "-c", "8k", "--bits", "8")
    add("vram", "Qwen2.5-7B", "--profile", "in/profile.json", "--gpu", "RTX 4090")
    add("vram", "validate", "in/published.csv", "--json")
    add("vram", "validate", "in/published.csv")
    for form in ("--csv", "--csv", "--csv", "--csv", *[""] * 14):
        add("vram", *_estimate(drawn), *([form] if form else []))
    for _ in range(70):
        add("plan", *_plan(drawn), "--json")
    for _ in range(14):
        add("plan", *_plan(drawn))
    for model, engine in zip(("Qwen2.5-7B", "Qwen2.5-32B", "Qwen2.5-72B", "Qwen3-32B"), ENGINES, strict=True):
        add("plan", model, "--recommend", "--engine", engine, "-c", "16k", "--json")
        add("plan", model, "--recommend", "--engine", engine, "--bits", "8")
    for name in ("Qwen2.5-72B", "Qwen2.5-7B"):
        add("plan", name, "--detect", "-c", "4k", "--json", gpus=(CARD_3090, CARD_3090))
        add("plan", name, "--detect", "--engine", "vllm", "-c", "4k", gpus=(CARD_4090, CARD_3060))
    for model in (*MODELS, *PUBLISHED, "in/llama-bias", "in/qwen2-tied", "in/config-contradicting"):
        add("inspect", model, "--json")
    for model in ("Qwen2.5-72B", "Qwen3-0.6B", "in/gptq", "in/mixed", "in/int8", "Qwen/Qwen2.5-72B-Instruct-AWQ"):
        add("inspect", model)
    add("inspect", "Qwen2.5-72B", "--expect-params", "72.7B")
    add("inspect", "Qwen2.5-72B", "--expect-params", "80B", "--json")
    for words in _dry_runs(drawn):
        add("quantize", *words, "--dry-run", "--json")
    for words in list(_dry_runs(drawn))[::3]:
        add("quantize", *words, "--dry-run")
    add("quantize", "Qwen2.5-72B", "--bpw", "5", "--dry-run", "--save-recipe", "saved-72b.toml")
    add("quantize", "Qwen2.5-7B", "--target-size", "6GB", "--dry-run", "--save-recipe", "saved-7b.toml", "--json")
    add("quantize", "Qwen2.5-32B", "--bits", "4", "--dry-run", "--json", gpus=(CARD_4090,))
    add("quantize", "Qwen2.5-7B", "--bpw", "5", "--dry-run", gpus=(CARD_3060,))
    two = (CARD_3090, CARD_3090)
    for model, gpus, *options in (
        ("in/gptq", ()), ("in/gptq", (CARD_3090,)), ("in/mixed", two, "-c", "256"), ("in/nf4", ()), ("in/int8", two),
        ("in/awq", (), "--compute-dtype", "float32"), ("in/padded", (CARD_4090, CARD_3060), "--kv-cache-dtype", "fp8"),
        ("Qwen/Qwen2.5-7B-Instruct", (CARD_3090,), "-c", "8k"), ("Qwen/Qwen2.5-32B-Instruct", two, "-c", "16k"),
        ("Qwen/Qwen2.5-72B-Instruct", two), ("Qwen/Qwen2.5-72B-Instruct-AWQ", two, "-c", "8k"),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", (CARD_4090, CARD_3060), "--gpu-memory", "20GiB,10GiB"),
        ("Qwen/Qwen2.5-14B-Instruct-GPTQ-Int8", (CARD_3090,), "--prefill-chunk", "512", "-c", "32k"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", (), "-c", "1k"), ("Qwen/Qwen2.5-7B-Instruct", (CARD_3060,), "-c", "64k"),
        ("Qwen2.5-7B", ()), ("in/gptq", (), "-c", "4k"), ("in/gptq", (), "--gpu-memory", "4GiB"),
    ):  # fmt: skip
        run = ("run", model, "--dry-run", "--cpu-memory", "2GiB", *options)
        add(*run, "--json", gpus=gpus)
        add(*run, gpus=gpus)
        add("serve", *run[1:], "--engine", "qwenq", gpus=gpus)
    for model in ("in/gptq", "in/ct-8", "Qwen/Qwen2.5-72B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"):
        for options in (
            ("--gpu", "2x RTX 3090"), ("--gpu", "4x RTX 3090", "-c", "512"), ("--gpu", "RTX 4090", "--hosts", "a,b"),
            ("--gpu", "8x A100 SXM4 80GB", "--kv-cache-dtype", "fp8", "--served-model-name", "n", "--port", "1"),
        ):  # fmt: skip
            add("serve", model, "--engine", "vllm", "--dry-run", *options)
    add("serve", "in/gptq", "--engine", "vllm", "--dry-run", gpus=two)
    for words in BAD:
        add(*words)
    add("vram", "gpus", "--json")
    add("vram", "gpus")
    return [Case(words, gpus=gpus) for words, gpus in dict.fromkeys(lines)]


def _estimate(drawn: random.Random) -> list[str]:
    engine = drawn.choice(ENGINES)
    model = drawn.choice(MODELS if engine == "llama.cpp" or drawn.random() < 0.8 else PUBLISHED)
    words = [model, "--engine", engine]
    if drawn.random() < 0.75:
        words += ["--gpu", drawn.choice(RIGS)]
    words += _weights(drawn, model, engine)
    words += ["--kv-cache-dtype", drawn.choice(KV_DTYPES[engine])] if drawn.random() < 0.4 else []
    contexts = ("256", "512") if model.startswith("in/") else ("1k,8k,32k", "4k", "8192", "16k,20k")
    words += ["-c", drawn.choice(contexts)] if drawn.random() < 0.7 else []
    words += ["--batch-size", drawn.choice(("2", "8"))] if drawn.random() < 0.25 else []
    words += ["--prefill-chunk", drawn.choice(("256", "1024"))] if drawn.random() < 0.2 else []
    words += ["--reserve", "1GiB"] if drawn.random() < 0.15 else []
    words += ["--engine-version", "4.46.0"] if engine == "transformers" and drawn.random() < 0.3 else []
    if engine == "vllm":
        words += drawn.choice(([], [], ["--tensor-parallel-size", "2"], ["--max-num-seqs", "64"],
                               ["--gpu-memory-utilization", "0.8"]))  # fmt: skip
    return words


def _weights(drawn: random.Random, model: str, engine: str) -> list[str]:
    if model in PUBLISHED:
        return []
    if engine == "llama.cpp":
        return drawn.choice(([], ["--bits", "4"], ["--bits", "8"], ["--bits", "16"]))
    options: list[list[str]] = [
        [], ["--bits", "8"], ["--bits", "16"], ["--group-size", "32"], ["--bits", "4", "--group-size", "64"],
    ]  # fmt: skip
    if not model.startswith("in/"):
        size = {"7B": "6GB", "14B": "10GB", "32B": "22GB", "72B": "46GB"}.get(model.rpartition("-")[2], "")
        options += [["--target-size", size]] if size else []
        options += [["--pad-for-tp", "2"], ["--bits", "8", "--group-size", "-1"]]
    return drawn.choice(options)


def _plan(drawn: random.Random) -> list[str]:
    engine = drawn.choice(ENGINES)
    model = drawn.choice(MODELS if engine == "llama.cpp" or drawn.random() < 0.75 else PUBLISHED)
    words = [model, "--engine", engine, "--gpu", drawn.choice(RIGS), *_weights(drawn, model, engine)]
    words += ["-c", drawn.choice(("256", "512") if model.startswith("in/") else ("2k", "8k", "16k", "32k"))]
    words += ["--kv-cache-dtype", drawn.choice(KV_DTYPES[engine])] if drawn.random() < 0.3 else []
    words += ["--batch-size", "4"] if drawn.random() < 0.2 else []
    words += ["--reserve", "500MB"] if drawn.random() < 0.15 else []
    return words


def _dry_runs(drawn: random.Random) -> Iterator[list[str]]:
    options = [
        [], ["--bits", "8"], ["--group-size", "64", "--pull", "0"], ["--format", "awq"], ["--format", "bnb-nf4"],
        ["--format", "bnb-int8"], ["--format", "compressed-tensors", "--asymmetric", "--group-size", "32"],
        ["--format", "compressed-tensors", "--bits", "8", "--group-size", "-1"], ["--asymmetric"], ["--bpw", "5"],
        ["--pad-for-tp", "2"], ["--pad-for-tp", "4", "--format", "awq"], ["--method", "rtn"], ["--dtype", "float16"],
        ["--fit", "2x RTX 3090", "-c", "8k"], ["--fit", "RTX 4090 + RTX 3060 12GB", "--engine", "vllm"],
        ["--device", "cuda:0", "-n", "64", "--sequence-length", "2048"], ["--pull", "1", "-n", "16"],
        ["--compute-dtype", "bfloat16", "--calibration-dtype", "float32"], ["--calibration", "wikitext2", "-n", "32"],
        ["--pull-share", "1"], ["--bpw", "4.5", "--format", "compressed-tensors", "--asymmetric"],
    ]  # fmt: skip
    for asked in options:
        for model in drawn.sample(("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-32B", "Qwen2.5-72B", "Qwen3-8B",
                                   "Llama-3.1-8B"), 2):  # fmt: skip
            yield [model, *asked]
    for asked in options[:11]:
        yield ["in/tiny-qwen2", *asked, "--calibration", "in/calib.txt", "--eval-text", "in/heldout.txt"]
    yield ["in/tiny-qwen2", "--recipe", "in/recipe.toml"]
    yield ["in/tiny-qwen2", "--bpw", "5", "--sensitivity", "in/sensitivity.json"]
    yield ["in/tiny-qwen2", "--target-size", "1.05MB", "--sensitivity", "in/sensitivity.json", "-o", "there"]
    yield ["in/qwen3", "--group-size", "32"]
    yield ["in/llama-bias", "--format", "bnb-int8"]


BAD: tuple[tuple[str, ...], ...] = (
    ("vram", "Qwen9-1B"), ("vram", "Qwen2.5-72"), ("vram", "Qwen2.5-7B", "--bits", "5"), ("vram", "in/nothing"),
    ("vram", "Qwen2.5-7B", "--group-size", "100"), ("vram", "Qwen2.5-7B", "--engine", "exllama"),
    ("vram", "Qwen2.5-7B", "--gpu", "RTX 9999"), ("vram", "Qwen2.5-7B", "--gpu", "100x RTX 3090"),
    ("vram", "Qwen2.5-7B", "-c", "1000k"), ("vram", "Qwen2.5-7B", "-c", "zero"), ("vram", "Qwen2.5-7B", "-c", "0"),
    ("vram", "Qwen2.5-7B", "--kv-cache-dtype", "int2"), ("vram", "Qwen2.5-7B", "--json", "--csv"),
    ("vram", "Qwen2.5-7B", "--bits", "4", "--target-size", "5GB"), ("vram", "Qwen2.5-7B", "--target-size", "1GB"),
    ("vram", "Qwen2.5-7B", "--target-size", "lots"), ("vram", "Qwen2.5-7B", "--batch-size", "0"),
    ("vram", "Qwen2.5-7B", "--engine", "llama.cpp", "--group-size", "64"), ("vram", "in/config-broken"),
    ("vram", "Qwen2.5-7B", "--engine", "qwenq", "--tensor-parallel-size", "2"), ("vram", "in/config-experts"),
    ("vram", "Qwen2.5-7B", "--engine", "vllm", "--tensor-parallel-size", "3", "--gpu", "3x RTX 3090"),
    ("vram", "Qwen2.5-7B", "--engine", "vllm", "--profile", "in/calib.txt"), ("vram", "in/config-contradicting"),
    ("vram", "Qwen2.5-7B", "--profile", "in/calib.txt"), ("vram", "Qwen2.5-7B", "--checkpoint", "in/gptq"),
    ("vram", "Qwen2.5-7B", "--expect-params", "100B"), ("vram", "Qwen2.5-7B", "--recipe", "in/recipe.toml"),
    ("vram", "Qwen/Qwen2.5-7B-Instruct-AWQ", "--pad-for-tp", "2"), ("vram", "someone/some-model"),
    ("vram", "Qwen2.5-7B", "--engine-version", "x.y", "--engine", "transformers"),
    ("plan", "Qwen2.5-7B"), ("plan", "Qwen2.5-7B", "--gpu", "RTX 4090", "--recommend"),
    ("plan", "Qwen2.5-7B", "--detect"),
    ("plan", "Qwen2.5-7B", "--gpu", "RTX 4090", "-c", "1k,2k"), ("plan", "Qwen2.5-7B", "--gpu", ""),
    ("plan", "Qwen2.5-7B", "--gpu", "RTX 4090", "--gpu-memory-utilization", "1.5", "--engine", "vllm"),
    ("inspect", "in/nothing"), ("inspect", "in/config-broken"), ("inspect", "Qwen2.5-7B", "--expect-params", "many"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--bits", "5"), ("quantize", "Qwen2.5-7B", "--dry-run", "--bits", "3"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--format", "exl2"), ("quantize", "Qwen2.5-7B", "--bits", "4"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--format", "awq", "--bits", "8"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--format", "bnb-nf4", "--bits", "8"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--format", "bnb-nf4", "--method", "gptq"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--format", "awq", "--bpw", "5"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--bpw", "5", "--bits", "4"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--bpw", "5", "--target-size", "5GB"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--bpw", "five"), ("quantize", "Qwen2.5-7B", "--dry-run", "--bpw", "1"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--target-size", "1GB"), ("quantize", "in/gptq", "--dry-run"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--fit", "RTX 3060 12GB", "--engine", "llama.cpp"),
    ("quantize", "Qwen2.5-72B", "--dry-run", "--fit", "RTX 3060 12GB"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--context", "8k"), ("quantize", "Qwen2.5-7B", "--dry-run", "--asymmetric"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--asymmetric", "--bpw", "5"), ("quantize", "in/nothing", "--dry-run"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--save-recipe", "x.toml"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--recipe", "in/recipe.toml"),
    ("quantize", "in/tiny-qwen2", "--dry-run", "--recipe", "in/recipe-broken.toml"),
    ("quantize", "in/tiny-qwen2", "--dry-run", "--recipe", "in/calib.txt"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--bpw", "5", "--sensitivity", "in/sensitivity.json"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--bpw", "5", "--method", "rtn"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--method", "magic"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--pull", "2"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--pull", "1", "-n", "1"), ("quantize", "Qwen2.5-7B", "--pull-share", "x"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--dtype", "int8"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--device", "tpu"),
    ("quantize", "Qwen2.5-7B", "--dry-run", "--compute-dtype", "float16"),
    ("quantize", "in/tiny-qwen2", "--dry-run", "--group-size", "48"), ("quantize", "Qwen2.5-7B", "--no-such-option"),
    ("quantize", "in/tiny-qwen2", "--dry-run", "--group-size", "256"),
    ("quantize", "in/tiny-qwen2", "--dry-run", "--calibration", "in/none.txt"),
    ("quantize", "in/tiny-qwen2", "-o", "in/tiny-qwen2/x", "--method", "rtn"),
    ("quantize", "in/tiny-qwen2", "-o", "in/gptq", "--method", "rtn"),
    ("quantize", "in/tiny-qwen2", "-o", "no-job", "--method", "rtn", "--resume"),
    ("run", "in/nothing", "--dry-run"), ("run", "in/gptq", "--dry-run", "--engine", "vllm"),
    ("run", "in/gptq", "--dry-run", "--kv-cache-dtype", "int2"), ("run", "in/gptq", "--json"),
    ("run", "in/gptq", "--dry-run", "--compute-dtype", "float16"), ("run", "in/gptq", "--engine", "exllama"),
    ("run", "in/gptq", "--dry-run", "--cpu-memory", "some"), ("run", "in/gptq", "--prompt", ""),
    ("serve", "in/gptq", "--dry-run", "--engine", "tgi"), ("serve", "in/gptq", "--dry-run", "--engine", "vllm"),
    ("serve", "Qwen/Qwen2.5-72B-Instruct", "--dry-run", "--gpu", "RTX 4090"),
    ("serve", "in/nf4", "--dry-run", "--gpu", "2x RTX 3090"), ("serve", "Qwen2.5-7B", "--dry-run"),
    ("serve", "in/gptq", "--dry-run", "--engine", "qwenq", "--gpu", "RTX 4090"),
    ("convert", "in/gptq", "converted", "--format", "gptq"), ("convert", "in/nf4", "converted", "--format", "awq"),
    ("convert", "in/tiny-qwen2", "converted", "--format", "awq"),
    ("convert", "in/gptq", "converted", "--format", "exl2"),
    ("verify", "in/tiny-qwen2"), ("verify", "in/nothing"), ("verify", "in/gptq", "--layers", "0"),
    ("report", "in/tiny-qwen2", "-o", "reported"), ("eval", "in/gptq", "--reference", "in/nothing"),
    ("sensitivity", "in/gptq", "-o", "s.json"), ("sensitivity", "in/tiny-qwen2", "-o", "in/calib.txt"), ("nonsense",),
)  # fmt: skip

# ---------------------------------------------------------------------- inputs, the same for both checkouts

RECIPE = """version = 1
model = "tiny-qwen2"
[layer]
0 = { qkv = "8-bit g32",  o = "4-bit g64",  gate_up = "4-bit g128", down = "16-bit" }
1 = { qkv = "4-bit g128", o = "8-bit g128", gate_up = "4-bit g32",  down = "4-bit g64" }
2 = { qkv = "4-bit g64",  o = "4-bit g32",  gate_up = "8-bit g64",  down = "8-bit g32" }
3 = { qkv = "16-bit",     o = "4-bit g128", gate_up = "4-bit g64",  down = "8-bit g128" }
"""


def write_inputs(place: Path, checkout: Path, demo: Path | None) -> None:
    """Models, texts, recipes and broken files. Checkpoints are made later, by BEFORE: see input_cases."""
    data = checkout / "tests" / "data"
    place.mkdir()
    shutil.copytree(data / "tiny-qwen2", place / "tiny-qwen2")
    for name in ("calib.txt", "heldout.txt"):
        shutil.copyfile(data / name, place / name)
    shutil.copyfile(data / "published" / "qwen25_transformers_memory.csv", place / "published.csv")
    rows = [{"context": context, "phase": phase, "device": "GPU 0 RTX 3090", "kind": "RTX 3090",
             "allocated_bytes": 6 * GIB + (context << 17), "reserved_bytes": 8 * GIB, "driver_bytes": 9 * GIB,
             "exact_bytes": 5 * GIB, "working_bytes": context << 16}
            for context in (1024, 8192) for phase in ("prefill", "decode")]  # fmt: skip
    (place / "profile.json").write_text(json.dumps({"kind": "qwenq-vram-profile", "version": 1, "rows": rows}))
    paragraphs = (data / "calib.txt").read_text(encoding="utf-8").split("\n\n")
    (place / "calib.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs), encoding="utf-8")
    (place / "recipe.toml").write_text(RECIPE)
    (place / "recipe-asym.toml").write_text(RECIPE.replace("4-bit g64", "4-bit g64 asym"))
    (place / "recipe-broken.toml").write_text(RECIPE.replace("8-bit g64", "7-bit g64"))
    shape = json.loads((data / "tiny-qwen2" / "config.json").read_text())
    llama = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
             "vocab_size": 32000}  # fmt: skip
    huge = {"hidden_size": 12288, "num_attention_heads": 128, "num_hidden_layers": 80, "num_key_value_heads": 8,
            "intermediate_size": 29568, "vocab_size": 152064, "_name_or_path": "Qwen/Qwen2.5-72B"}  # fmt: skip
    for name, content in {
        "llama": json.dumps(llama), "broken": '{"model_type": ', "contradicting": json.dumps(shape | huge),
        "experts": json.dumps(shape | {"model_type": "qwen3_moe", "num_experts": 8}),
    }.items():  # fmt: skip
        (place / f"config-{name}").mkdir()
        (place / f"config-{name}" / "config.json").write_text(content)
    if demo is not None:
        (place / "demo").symlink_to(demo.resolve())


def write_random_models(place: Path) -> None:
    """Random checkpoints of three layers, and tokens: what needs torch, made inside the first driver."""
    import numpy as np
    import torch
    import transformers

    np.save(place / "tokens.npy", np.random.default_rng(3).integers(0, 1000, (6, 64)))
    shape: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "bos_token_id": 1021, "eos_token_id": 1023,
    }  # fmt: skip
    for name, prefix, changes in (
        ("qwen3", "Qwen3", {"head_dim": 32}), ("llama", "Llama", {}),
        ("qwen2-tied", "Qwen2", {"tie_word_embeddings": True}),
        ("llama-bias", "Llama", {"attention_bias": True, "mlp_bias": True}),
    ):  # fmt: skip
        config = getattr(transformers, f"{prefix}Config")(**(shape | changes))
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                scale, mean = (0.1, 1.0) if "norm" in key else (0.3, 0.0)
                if parameter.ndim == 2 and "embed" not in key:
                    scale = parameter.shape[1] ** -0.5
                parameter.copy_(noise * scale + mean)
        model.to(torch.float16).save_pretrained(place / name, max_shard_size="150KB")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(place / "tiny-qwen2" / file, place / name / file)


def input_cases() -> list[Case]:
    """Checkpoints and a sensitivity table that the answers are about."""
    options = {
        "gptq": (), "awq": ("--format", "awq"), "ct-8": ("--format", "compressed-tensors", "--bits", 8),
        "nf4": ("--format", "bnb-nf4"), "int8": ("--format", "bnb-int8"), "mixed": ("--recipe", "in/recipe.toml"),
        "padded": ("--pad-for-tp", 2, "--group-size", 32),
    }  # fmt: skip
    common = ("--eval-text", "in/heldout.txt", "--sequence-length", 32, "--eval-samples", 1, "--device", "cpu",
              "--json")  # fmt: skip
    cases = []
    for name, given in options.items():
        method = () if name in ("nf4", "int8") else ("--method", "rtn")
        source = "in/llama" if name == "padded" else "in/tiny-qwen2"  # 384 columns are cut as they are
        words = ("quantize", source, "-o", f"in/{name}", *common, *method, *given)
        cases.append(Case(tuple(map(str, words))))
    measured = ("--calibration", "in/calib.txt", "-n", "4", "--sequence-length", "64", "--device", "cpu", "--json")
    return [*cases, Case(("sensitivity", "in/tiny-qwen2", "-o", "in/sensitivity.json", *measured))]


# ---------------------------------------------------------------------- the driver: inside one checkout


def drive(cases_file: str, answers_file: str) -> None:
    """Run cases in this process, whose `qwenq` is the checkout's; {words, gpus} -> {exit_code, stdout, stderr}."""
    shutil.disk_usage = lambda path: SimpleNamespace(total=10**13, used=0, free=5 * 10**12)  # type: ignore[assignment]
    asked = json.loads(Path(cases_file).read_text())
    import torch
    from typer.testing import CliRunner

    import qwenq

    if not Path(qwenq.__file__).resolve().is_relative_to(Path(asked["checkout"]).resolve()):
        sys.exit(f"imported {qwenq.__file__}, which is not of {asked['checkout']}")
    torch.set_num_threads(1)
    if asked["random_models"]:
        write_random_models(Path("in"))
    app, answers = _app(), []
    for case in asked["cases"]:
        sys.modules["pynvml"] = _nvml(case["gpus"])
        with _torch_gpus(case["gpus"]):
            started = time.perf_counter()
            result = CliRunner().invoke(app, case["words"])
        error = result.exception
        crash = "" if error is None or isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        answers.append(
            {
                "exit_code": result.exit_code,
                "stdout": result.stdout,
                "stderr": result.stderr + crash,
                "seconds": time.perf_counter() - started,
            }
        )
    Path(answers_file).write_text(json.dumps(answers))


def _app() -> Any:
    """The Typer application, wherever this checkout keeps it."""
    from importlib import import_module

    import typer

    for name in ("qwenq.cli.main", "qwenq.cli", "qwenq.cli.app", "qwenq.__main__"):
        try:
            module = import_module(name)
        except ModuleNotFoundError:
            continue
        found = getattr(module, "app", None)
        if isinstance(found, typer.Typer):
            return found
    sys.exit("no Typer application `app` in qwenq.cli.main, qwenq.cli, qwenq.cli.app or qwenq.__main__")


def _nvml(gpus: Sequence[Any]) -> Any:
    """A stand-in for pynvml with these GPUs, or with no driver."""

    class NVMLError(Exception):
        pass

    def start() -> None:
        if not gpus:
            raise NVMLError("driver not loaded")

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda index: gpus[index][0],
        nvmlDeviceGetUUID=lambda index: f"GPU-{index}",
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(total=gpus[index][1], free=gpus[index][2]),
        nvmlDeviceGetCudaComputeCapability=lambda index: tuple(gpus[index][3]),
    )


def _torch_gpus(gpus: Sequence[Any]) -> Any:
    """torch.cuda as plans ask it, with these GPUs or with none."""
    return patch.multiple(
        "torch.cuda",
        is_available=lambda: bool(gpus),
        device_count=lambda: len(gpus),
        mem_get_info=lambda index=0: (gpus[index][2], gpus[index][1]),
        get_device_name=lambda index=0: gpus[index][0],
        get_device_capability=lambda index=0: tuple(gpus[index][3]),
        get_device_properties=lambda index=0: SimpleNamespace(total_memory=gpus[index][1], name=gpus[index][0]),
    )


def run_cases(
    cases: Sequence[Case], checkout: Path, place: Path, python: str, *, random_models: bool = False
) -> list[dict[str, Any]]:
    """Answers of a checkout to cases, run in the directory `place`."""
    asked = {
        "checkout": str(checkout), "random_models": random_models,
        "cases": [{"words": case.words, "gpus": case.gpus} for case in cases],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="cases-") as scratch:
        cases_file, answers_file = Path(scratch) / "cases.json", Path(scratch) / "answers.json"
        cases_file.write_text(json.dumps(asked))
        environment = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("HF_", "PYTEST_", "CUDA_", "QWENQ_")) and name not in ("FORCE_COLOR", "NO_COLOR")
        }  # fmt: skip
        environment |= {
            "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "160",
            "TERM": "dumb", "HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        words = [python, "-P", str(Path(__file__).resolve()), "--drive", str(cases_file), str(answers_file)]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        if done.returncode or not answers_file.is_file():
            sys.exit(f"{checkout}: the driver ended with {done.returncode}\n{done.stderr[-3000:]}")
        return list(json.loads(answers_file.read_text()))


# ---------------------------------------------------------------------- comparing


def reworded(text: str, *, after: bool) -> str:
    """A text as it is compared: words of BEFORE replaced, what only AFTER says left out, the version masked."""
    if after:
        for pattern in ADDED_TEXT:
            text = re.sub(pattern, "", text, flags=re.MULTILINE)
    else:
        for pattern, replacement in REWORDED:
            text = re.sub(pattern, replacement, text)
    for pattern, replacement in RUN_TEXT:
        text = re.sub(pattern, replacement, text)
    return text


def normal(value: Any, *, after: bool, parent: str = "") -> Any:
    """JSON as it is compared: keys renamed, strings reworded, what belongs to one run or to AFTER alone left out."""
    if isinstance(value, dict):
        kept = {}
        for key, inner in value.items():
            name = key if after else RENAMED_KEYS.get(key, key)
            if key in RUN_KEYS or (after and (key in ADDED_KEYS or f"{parent}.{key}" in ADDED_KEYS)):
                continue
            kept[reworded(name, after=after)] = normal(inner, after=after, parent=name)
        return kept
    if isinstance(value, list):
        return [normal(inner, after=after, parent=parent) for inner in value]
    return reworded(value, after=after) if isinstance(value, str) else value


def json_differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Paths at which two normal values differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            path = f"{where}.{key}" if where else str(key)
            if key not in before or key not in after:
                yield f"{path}: only {'before' if key in before else 'after'}"
            else:
                yield from json_differences(before[key], after[key], path)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from json_differences(one, other, f"{where}[{index}]")
    elif before != after or type(before) is not type(after):
        yield f"{where}: {str(before)[:200]!r} -> {str(after)[:200]!r}"


def text_differences(name: str, before: str, after: str) -> list[str]:
    """A short diff of two texts; nothing when they are the same once words are replaced and layout is left out."""
    if before == after:
        return []
    one, other = reworded(before, after=False), reworded(after, after=True)
    plain = [re.sub(r"[ \t]+", " ", re.sub(r"[─━┄═-]{3,}", "---", text)) for text in (one, other)]
    if one == other or ((one != before or other != after) and plain[0] == plain[1]):
        return []
    lines = [line for line in unified_diff(one.splitlines(), other.splitlines(), lineterm="", n=0) if line[:2] != "@@"]
    return [f"{name}: {line[:200]}" for line in lines[2:8]] or [f"{name}: line ends differ"]


def compare_answer(case: Case, before: Mapping[str, Any], after: Mapping[str, Any]) -> Outcome:
    """Exit code, stdout (as JSON where it is) and stderr."""
    differences = []
    if before["exit_code"] != after["exit_code"]:
        differences.append(f"exit code: {before['exit_code']} -> {after['exit_code']}")
    one, other = _json(before["stdout"]), _json(after["stdout"])
    if one is not None and other is not None:
        found = json_differences(normal(one, after=False), normal(other, after=True))
        differences += [f"stdout: {line}" for line in itertools.islice(found, 8)]
    else:
        differences += text_differences("stdout", before["stdout"], after["stdout"])
    differences += text_differences("stderr", before["stderr"], after["stderr"])
    exact = all(before[key] == after[key] for key in ("exit_code", "stdout", "stderr"))
    return Outcome(case.line, before["exit_code"], exact, not differences, differences)


def _json(text: str) -> Any:
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def compare_made(outcome: Outcome, made: str, before: Path, after: Path) -> None:
    """Put before an outcome's differences those of the files that the case wrote."""
    one, other = before / made, after / made
    found: list[str] = []
    if one.exists() != other.exists():
        found.append(f"{made}: only {'before' if one.exists() else 'after'}")
    elif one.is_file():
        found += compare_file(made, one, other)
    elif one.is_dir():
        files = [{str(p.relative_to(d)): p for p in sorted(d.rglob("*")) if p.is_file()} for d in (one, other)]
        for name in sorted({*files[0], *files[1]}):
            if name not in files[0] or name not in files[1]:
                found.append(f"{name}: only {'before' if name in files[0] else 'after'}")
            elif name == MANIFEST:
                differences, outcome.digests = compare_manifests(files[0][name], files[1][name])
                found += differences
            elif name != JOURNAL:  # it holds times
                found += compare_file(name, files[0][name], files[1][name])
    outcome.differences = found + outcome.differences
    outcome.same = not outcome.differences


def compare_file(name: str, before: Path, after: Path) -> list[str]:
    """Nothing for equal bytes, or a text, recipe or table that is equal but for the tables above."""
    data = before.read_bytes(), after.read_bytes()
    if data[0] == data[1]:
        return []
    if name.endswith(".safetensors"):
        return [f"{name}: other bytes in {', '.join(changed_tensors(*data)) or 'the header alone'}"]
    if name.endswith(TEXTS):
        return text_differences(name, *(part.decode("utf-8", errors="replace") for part in data))
    if Path(name).name.endswith("sensitivity.json"):
        one, other = (json.loads(part) for part in data)
        found = list(json_differences(normal(one, after=False), normal(other, after=True)))
        return [f"{name}: {line}" for line in found[:8]]
    return [f"{name}: other bytes"]


def changed_tensors(before: bytes, after: bytes) -> list[str]:
    """Names of up to four tensors that differ between two safetensors files, or are in one of them only."""

    def tensors(data: bytes) -> dict[str, Any]:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], data[start + first : start + end])
        return found

    one, other = tensors(before), tensors(after)
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)][:4]


def compare_manifests(before: Path, after: Path) -> tuple[list[str], dict[str, str]]:
    """Differences of two manifests, and the digest of each as it is compared.

    Hashes of files that are texts are those of the reworded text; every other hash counts as it is. The values of `run`
    belong to one run: only its keys are compared.
    """
    normals, runs = [], []
    for path, later in ((before, False), (after, True)):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for name in manifest["files"]:
            if name.endswith(TEXTS):
                text = reworded((path.parent / name).read_text(encoding="utf-8"), after=later)
                manifest["files"][name] = hashlib.sha256(text.encode()).hexdigest()
        runs.append(normal(dict.fromkeys(manifest["run"], 0), after=later))
        normals.append(normal(manifest, after=later))
    digests = {
        side: hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        for side, value in zip(("before", "after"), normals, strict=True)
    }
    found = itertools.chain(json_differences(*normals), json_differences(*runs, "run"))
    return [f"{MANIFEST}: {line}" for line in itertools.islice(found, 8)], digests


# ---------------------------------------------------------------------- the whole


def compare(
    cases: Sequence[Case], sides: Sequence[tuple[Path, Path]], python: str
) -> tuple[list[Outcome], list[float]]:
    """Outcomes of cases in (checkout, working directory) before and after, and the seconds each took."""
    answers, seconds = [], []
    for checkout, place in sides:
        started = time.perf_counter()
        answers.append(run_cases(cases, checkout, place, python))
        seconds.append(time.perf_counter() - started)
    outcomes = []
    for case, before, after in zip(cases, *answers, strict=True):
        outcome = compare_answer(case, before, after)
        if case.makes:
            compare_made(outcome, case.makes, sides[0][1], sides[1][1])
        outcomes.append(outcome)
    return outcomes, seconds


def saved_files(sides: Sequence[tuple[Path, Path]]) -> Outcome:
    """What the answers wrote into the working directory: saved recipes, and nothing that a refused command left."""
    outcome = Outcome("files written by the answers", 0, True, True)
    names = [{p.name for p in place.iterdir() if p.name not in ("in", "out")} for _, place in sides]
    for name in sorted(names[0] | names[1]):
        compare_made(outcome, name, sides[0][1], sides[1][1])
    return outcome


def commit_of(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "no git"


def summary(
    parts: Mapping[str, list[Outcome]], sides: Mapping[str, Any], seconds: Mapping[str, list[float]]
) -> list[str]:
    """Markdown for a report."""
    lines = [
        f"Before: {sides['before']['commit']}. After: {sides['after']['commit']}. "
        f"Tables of what may differ: {len(RENAMED_KEYS)} renamed keys, {len(REWORDED)} reworded texts, "
        f"{len(ADDED_KEYS)} added keys, {len(ADDED_TEXT)} added texts.",
        "",
        "| part | cases | the same | of these by the tables | differ | exit code 0, other | seconds before, after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, outcomes in parts.items():
        same = [o for o in outcomes if o.same]
        helped = [o for o in same if not o.exact]
        fine = sum(o.exit_code == 0 for o in outcomes)
        times = ", ".join(f"{s:.0f}" for s in seconds[name])
        shown = "" if name != "answers" else str(len(helped))
        lines.append(
            f"| {name} | {len(outcomes)} | {len(same)} | {shown} | {len(outcomes) - len(same)} | "
            f"{fine}, {len(outcomes) - fine} | {times} |"
        )
    for name, outcomes in parts.items():
        digests = [o for o in outcomes if o.digests]
        if digests:
            equal = sum(o.digests["before"] == o.digests["after"] for o in digests)
            lines += ["", f"{name}: {equal} of {len(digests)} manifests have the same digest."]
    for name, outcomes in parts.items():
        wrong = [o for o in outcomes if not o.same]
        if wrong:
            lines += ["", f"### {name}: what differs", ""]
            for outcome in wrong[:60]:
                lines += [f"- `{outcome.case}`", *(f"  - {line}" for line in outcome.differences[:8])]
            if len(wrong) > 60:
                lines.append(f"- and {len(wrong) - 60} more, in the JSON file")
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        drive(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    parser.add_argument("--demo", type=Path, metavar="DIR", help="The demo's 16-bit model (`qwenq demo` makes it).")
    parser.add_argument("--only", choices=("bytes", "answers", "counts"), help="One part alone.")
    parser.add_argument("--keep", type=Path, metavar="WORK", help="Work in this new directory and keep it.")
    parser.add_argument("--python", default=sys.executable, help="Interpreter that has the dependencies.")
    asked = parser.parse_args()
    checkouts = [asked.before.resolve(), asked.after.resolve()]
    for checkout in checkouts:
        if not (checkout / "qwenq" / "__init__.py").is_file():
            sys.exit(f"{checkout}: no qwenq/ in it")
    work = asked.keep or Path(tempfile.mkdtemp(prefix="compare-checkouts-"))
    if asked.keep:
        asked.keep.mkdir(parents=True)
    parts: dict[str, list[Outcome]] = {}
    seconds: dict[str, list[float]] = {}
    try:
        if asked.only != "counts":
            _compare_all(asked, checkouts, work.resolve(), parts, seconds)
    finally:
        if not asked.keep:
            shutil.rmtree(work)
    sides = {
        side: {"checkout": str(checkout), "commit": commit_of(checkout)}
        for side, checkout in zip(("before", "after"), checkouts, strict=True)
    }
    lines = summary(parts, sides, seconds) if parts else []
    report: dict[str, Any] = {**sides, "seconds": seconds}
    report |= {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in parts.items()}
    if asked.only in (None, "counts"):
        sys.path.insert(0, str(Path(__file__).parent))
        from count_house import count, table

        counts = [count(checkout) for checkout in checkouts]
        report["counts"] = {side: c.to_json() for side, c in zip(("before", "after"), counts, strict=True)}
        lines += ["", *table(counts)]
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if any(not outcome.same for outcomes in parts.values() for outcome in outcomes):
        sys.exit(1)


def _compare_all(
    asked: argparse.Namespace,
    checkouts: Sequence[Path],
    work: Path,
    parts: dict[str, list[Outcome]],
    seconds: dict[str, list[float]],
) -> None:
    write_inputs(work / "in", checkouts[0], asked.demo)
    sides = []
    for side, checkout in zip(("before", "after"), checkouts, strict=True):
        (work / side / "out").mkdir(parents=True)
        (work / side / "in").symlink_to(work / "in")
        sides.append((checkout, work / side))
    made = run_cases(input_cases(), checkouts[0], work / "before", asked.python, random_models=True)
    for case, answer in zip(input_cases(), made, strict=True):
        if answer["exit_code"]:
            sys.exit(f"{checkouts[0]}: {case.line}\n{answer['stderr']}")
    if asked.only != "bytes":
        parts["answers"], seconds["answers"] = compare(answer_cases(), sides, asked.python)
        parts["answers"].append(saved_files(sides))
    if asked.only != "answers":
        parts["bytes"], seconds["bytes"] = compare(byte_cases(), sides, asked.python)
        if asked.demo is not None:
            parts["bytes, demo model"], seconds["bytes, demo model"] = compare(demo_cases(), sides, asked.python)


if __name__ == "__main__":
    main()
