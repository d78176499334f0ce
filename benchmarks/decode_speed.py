"""Tokens a second of two checkpoints in turns on one machine, and each one's peak memory in a process of its own.

    python benchmarks/decode_speed.py 4BIT 16BIT [--rounds 15] [--tokens 32] [--prompt 64]

Prints one JSON object: tokens/s of each round, their ratio round by round with its median and 95 % interval
(bootstrap over rounds), peaks above the empty process, and the weights' bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.runtime.generate import Sampling, Session, Timing
from qwenq.runtime.load import LoadOptions, loaded


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % interval of the median by bootstrap."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, 1), [0.025, 0.975])
    return float(low), float(high)


def weight_bytes(directory: str) -> int:
    return sum(location.spec.nbytes for location in open_checkpoint(Path(directory)).tensors.values())


def peak(directory: str, tokens: int) -> dict[str, object]:
    """Peak of `qwenq run` in a process of its own, beside its prediction."""
    words = [sys.executable, "-m", "qwenq", "run", directory, "--raw", "-p", "The sea is", "-n", str(tokens)]
    words += ["--temperature", "0", "-c", "512", "--json"]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return found["peaks"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    asked = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (asked.prompt,)).tolist()
    speeds: list[list[float]] = [[], []]
    prefill: list[list[float]] = [[], []]
    with ExitStack() as stack:
        sessions = []
        for directory in asked.checkpoints:
            found = stack.enter_context(loaded(open_checkpoint(Path(directory)), LoadOptions(max_model_len=512)))
            sessions.append(Session(found.model, 512))
        for turn in range(asked.rounds + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                session, timing = sessions[which], Timing()
                session.release()
                for _ in session.generate(ids, Sampling(max_new_tokens=asked.tokens), timing):
                    pass
                if turn:  # the first round warms up
                    speeds[which].append(timing.decode_speed)
                    prefill[which].append(timing.prefill_speed)
    decode = [a / b for a, b in zip(*speeds, strict=True)]
    prompt = [a / b for a, b in zip(*prefill, strict=True)]
    peaks = [peak(directory, asked.tokens) for directory in asked.checkpoints]
    print(
        json.dumps(
            {
                "checkpoints": asked.checkpoints,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "decode_tokens_per_second": [statistics.median(s) for s in speeds],
                "decode_ratio": {"median": statistics.median(decode), "interval": interval(decode), "rounds": decode},
                "prefill_tokens_per_second": [statistics.median(s) for s in prefill],
                "prefill_ratio": {"median": statistics.median(prompt), "interval": interval(prompt)},
                "weight_bytes": [weight_bytes(directory) for directory in asked.checkpoints],
                "peaks": peaks,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
