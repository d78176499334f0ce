#!/usr/bin/env python3
"""Quantize a model with AutoRound on given calibration tokens and print what it cost.

    autoround_quantize.py MODEL OUT --tokens TOKENS.npy --bits 4 --group-size 64 [--iterations 200]

Runs inside the environment of interop/requirements-autoround.txt. TOKENS.npy is int64 [num_samples, seq_len]; the
windows go in as they are. Writes a GPTQ checkpoint (format auto_gptq, symmetric groups), which is what this project
reads of AutoRound's formats. Everything not named on the command line is AutoRound's default. One JSON line on stdout;
the tool's own log goes to stderr.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from foreign_run import (
    check_paths,
    check_vocabulary,
    copy_tokenizer,
    directory_bytes,
    peak_rss_bytes,
    print_figures,
    process_age_s,
    read_tokens,
    versions,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="16-bit model directory")
    parser.add_argument("out", type=Path, help="directory for the checkpoint; new or empty")
    parser.add_argument("--tokens", type=Path, required=True, help="int64 [num_samples, seq_len], .npy")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=200, help="steps of sign gradient descent a layer")
    return parser.parse_args()


def quantize(args: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; the figures of the JSON line."""
    check_paths(args.model, args.out)
    tokens = read_tokens(args.tokens)  # [N, T]
    check_vocabulary(tokens, args.model)

    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    ids = torch.from_numpy(tokens)
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16),
        PreTrainedTokenizerFast.from_pretrained(args.model),
        scheme={"bits": args.bits, "group_size": args.group_size, "sym": True, "data_type": "int", "act_bits": 16},
        iters=args.iterations,
        dataset=DataLoader(samples, batch_size=8, shuffle=False),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
    )
    start_s = time.perf_counter()
    rounder.quantize_and_save(str(args.out), format="auto_gptq")
    quantize_s = time.perf_counter() - start_s
    for made in [path for path in args.out.iterdir() if path.is_dir()]:  # one, named after the setting
        for file in made.iterdir():
            shutil.move(file, args.out / file.name)
        made.rmdir()
    copy_tokenizer(args.model, args.out)
    return {
        "tool": "autoround",
        "model": args.model.name,
        "bits": args.bits,
        "group_size": args.group_size,
        "iterations": args.iterations,
        "calibration": list(tokens.shape),
        "quantize_s": round(quantize_s, 2),
        "process_s": round(process_age_s(), 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "safetensors_bytes": directory_bytes(args.out, ".safetensors"),
        "versions": versions("auto-round", "torch", "transformers", "numpy"),
    }


if __name__ == "__main__":
    print_figures(parse_args(), quantize)
