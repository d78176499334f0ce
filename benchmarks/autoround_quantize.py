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

from foreign_run import calibrating_parser, calibration_tokens, copy_tokenizer, figures_of, print_figures


def parse_args() -> argparse.Namespace:
    parser = calibrating_parser(__doc__.splitlines()[0], (4, 8))
    parser.add_argument("--iterations", type=int, default=200, help="steps of sign gradient descent a layer")
    return parser.parse_args()


def quantize(args: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; the figures of the JSON line."""
    tokens = calibration_tokens(args)  # [N, T]

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
    return figures_of(args, tokens, quantize_s, {"iterations": args.iterations}, "auto-round")


if __name__ == "__main__":
    print_figures(parse_args(), quantize)
