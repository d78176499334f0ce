"""What running costs beyond the file: KL of the running model against the same checkpoint computed in float32.

    python benchmarks/running_kl.py CHECKPOINT [--windows 8] [--length 256]

Three ways of running are compared on held-out text: packed kernels in bfloat16 (scales rounded to it), weights
dequantized with exact scales and rounded to bfloat16 (what decompressing loaders do), and, if the checkpoint is 16-bit,
plain bfloat16. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.planning.kernels import Choice
from qwenq.planning.placement import host_map
from qwenq.runtime import linear
from qwenq.runtime.cache import KvCache
from qwenq.runtime.model import CheckpointWeights, build_model
from qwenq.text.calibration import load_windows
from qwenq.text.tokens import ModelTokenizer


@torch.inference_mode()
def log_probabilities(directory: Path, ids: torch.Tensor, dtype: torch.dtype, chunk: int = 0) -> torch.Tensor:
    checkpoint = open_checkpoint(directory)
    model = build_model(
        CheckpointWeights(checkpoint), checkpoint.config, checkpoint.spec, host_map(checkpoint.spec), dtype=dtype
    )
    parts, layers = [], [model.device] * model.spec.num_hidden_layers
    for row in ids:
        cache = KvCache(layers, ids.shape[1], model.spec.num_key_value_heads, model.spec.head_dim, dtype)
        for piece in row[None].split(chunk or len(row), 1):
            parts.append(model.network(piece, past_key_values=cache).logits[0].float().log_softmax(-1))
    return torch.cat(parts)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    kl = (wanted.exp() * (wanted - found)).sum(-1)
    agree = (wanted.argmax(-1) == found.argmax(-1)).float()
    return {"kl": float(kl.mean()), "standard_error": float(kl.std() / len(kl) ** 0.5), "top1": float(agree.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=16, help="tokens at once, few enough for the packed kernels")
    asked = parser.parse_args()
    checkpoint = open_checkpoint(asked.checkpoint)
    tokenizer = ModelTokenizer(asked.checkpoint)
    windows = load_windows("heldout", tokenizer, checkpoint.spec, length=asked.length, count=asked.windows, seed=None)
    exact = log_probabilities(asked.checkpoint, windows.ids, torch.float32)
    chunked = log_probabilities(asked.checkpoint, windows.ids, torch.bfloat16, asked.chunk)
    whole = log_probabilities(asked.checkpoint, windows.ids, torch.bfloat16)
    found = {"bfloat16, in chunks": divergence(exact, chunked), "bfloat16": divergence(exact, whole)}
    if checkpoint.quantized is not None:
        linear.choose = lambda *unused: Choice("tiled", "asked for")
        found["dequantized to bfloat16"] = divergence(
            exact, log_probabilities(asked.checkpoint, windows.ids, torch.bfloat16)
        )
    print(json.dumps({"checkpoint": str(asked.checkpoint), "tokens": windows.ids.numel(), **found}, indent=1))


if __name__ == "__main__":
    main()
