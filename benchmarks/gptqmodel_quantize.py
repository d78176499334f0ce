#!/usr/bin/env python3
"""Quantize a model with GPTQModel on given calibration tokens and print what it cost.

    gptqmodel_quantize.py MODEL OUT --tokens TOKENS.npy --bits 4 --group-size 64 [--mse 2.4]

Runs inside the environment of interop/requirements-gptqmodel.txt. TOKENS.npy is int64
[num_samples, seq_len]; the ids go to GPTQModel as they are, one sample a batch, in the order
given, so that it neither tokenizes, pads, sorts nor drops anything. Everything not named on
the command line is GPTQModel's default (symmetric, group-aware reordering, act-order off).
One JSON line on stdout; GPTQModel's own log goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read when gptqmodel is imported

from foreign_run import calibrating_parser, calibration_tokens, copy_tokenizer, figures_of, print_figures


def parse_args() -> argparse.Namespace:
    parser = calibrating_parser(__doc__.splitlines()[0], (2, 3, 4, 8))
    parser.add_argument("--mse", type=float, default=0.0, help="power of GPTQModel's clipping search; 0 turns it off")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 on a CPU, the model's on a GPU")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def quantize(args: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; the figures of the JSON line."""
    tokens = calibration_tokens(args)  # [N, T]

    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)  # a name is taken for auto
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, mse=args.mse)
    model = GPTQModel.load(str(args.model), config, device=args.device, dtype=dtype)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    batches = model.prepare_dataset(samples, batch_size=1, calibration_data_min_length=0)
    used = sum(int(batch["attention_mask"].sum()) for batch in batches)
    if used != tokens.size:
        raise RuntimeError(f"GPTQModel would calibrate on {used} tokens of {tokens.size}")

    start_s = time.perf_counter()
    model.quantize(samples, batch_size=1, calibration_sort=None, calibration_data_min_length=0)
    quantize_s = time.perf_counter() - start_s
    model.save(str(args.out))
    copy_tokenizer(args.model, args.out)
    settings: dict[str, object] = {
        "mse": args.mse,
        "damp_percent": config.damp_percent,
        "act_group_aware": config.act_group_aware,
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
    }
    return figures_of(args, tokens, quantize_s, settings, "gptqmodel")


def main() -> None:
    args = parse_args()
    args.model, args.out, args.tokens = args.model.resolve(), args.out.resolve(), args.tokens.resolve()
    os.chdir(tempfile.mkdtemp(prefix="gptqmodel-"))  # it keeps its log where it runs
    print_figures(args, quantize)


if __name__ == "__main__":
    main()
