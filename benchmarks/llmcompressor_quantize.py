#!/usr/bin/env python3
"""Quantize a model with llm-compressor's GPTQ on given calibration tokens and print what it cost.

    llmcompressor_quantize.py MODEL OUT --tokens TOKENS.npy --bits 4 --group-size 64 [--observer imatrix_mse]

Runs inside the environment of interop/requirements-llmcompressor.txt. TOKENS.npy is int64
[num_samples, seq_len]; the windows go in as they are, in the order given, one sample a batch.
Writes a compressed-tensors checkpoint (pack-quantized, symmetric groups). Everything not named
on the command line is llm-compressor's default. One JSON line on stdout; the tool's own log goes
to stderr.
"""

from __future__ import annotations

import argparse
import time

from foreign_run import calibrating_parser, calibration_tokens, copy_tokenizer, figures_of, print_figures


def parse_args() -> argparse.Namespace:
    parser = calibrating_parser(__doc__.splitlines()[0], (4, 8))
    parser.add_argument("--observer", default="imatrix_mse", help="how scales are chosen: minmax, mse or imatrix_mse")
    parser.add_argument("--dtype", default="bfloat16", help="dtype the model is calibrated and saved in")
    return parser.parse_args()


def quantize(args: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; the figures of the JSON line."""
    tokens = calibration_tokens(args)  # [N, T]

    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    weights = {
        "num_bits": args.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": args.group_size,
        "observer": args.observer,
    }
    modifier = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    ids = torch.from_numpy(tokens)
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]

    start_s = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(args.model),
        dataset=DataLoader(samples, batch_size=1, shuffle=False),
        recipe=modifier,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    quantize_s = time.perf_counter() - start_s
    model.save_pretrained(args.out, save_compressed=True)
    copy_tokenizer(args.model, args.out)
    settings: dict[str, object] = {
        "observer": args.observer,
        "dampening_frac": modifier.dampening_frac,
        "actorder": str(modifier.actorder),
        "dtype": args.dtype,
    }
    return figures_of(args, tokens, quantize_s, settings, "llmcompressor", "compressed-tensors")


if __name__ == "__main__":
    print_figures(parse_args(), quantize)
