"""Reference logits for `llama-perplexity --kl-divergence`, from the pass over the reference that `eval` makes anyway.

A file of llama.cpp's (tools/perplexity/perplexity.cpp): `_logits_`, u32 tokens a window, i32 vocabulary, i32 windows,
the tokens (i32); then for each position that is saved float32 scale and least log-probability, and a u16 q for each
token, padded to an even count: log p = least + scale q, floored 16 nats below the likeliest token. Saved are the
positions of each window's second half that predict a token of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenq.checkpoint.reader import row_slices
from qwenq.errors import CheckpointError, JobError, UsageError
from qwenq.io.durable import write_synced
from qwenq.io.tensors import all_finite
from qwenq.machine import free_disk
from qwenq.units import format_gb

LEAST_POSITIONS = 100  # llama-perplexity gives no statistics of fewer
_MAGIC = b"_logits_"
_FLOOR_NATS = 16.0
_STEPS = 65535
_LOGITS_AT_ONCE = 1 << 26  # 256 MB of float32


@dataclass(frozen=True)
class LogitsFile:
    """Shapes of a file of reference logits: sizes, and which positions it has."""

    vocab_size: int
    windows: int
    window_tokens: int

    def __post_init__(self) -> None:
        if self.positions < LEAST_POSITIONS:
            raise UsageError(
                f"--save-reference-logits: {self.positions} positions of {self.windows} windows of "
                f"{self.window_tokens} tokens, llama-perplexity wants at least {LEAST_POSITIONS}",
                hint="a longer --sequence-length, or more windows (-n)",
            )

    @property
    def saved(self) -> slice:
        """The positions of each window."""
        return slice(self.window_tokens // 2, self.window_tokens - 1)

    @property
    def positions(self) -> int:
        """Of all windows."""
        return self.windows * max(0, self.saved.stop - self.saved.start)

    @property
    def row_u16(self) -> int:
        """u16 of one position: two float32, and the vocabulary padded to an even count."""
        return 4 + 2 * -(-self.vocab_size // 2)

    @property
    def n_bytes(self) -> int:
        return 20 + 4 * self.windows * self.window_tokens + 2 * self.row_u16 * self.positions

    def check(self, path: Path) -> None:
        """Raise JobError where the file cannot be made at `path`."""
        if path.exists():
            raise JobError(f"{path}: already exists", hint="choose another --save-reference-logits, or delete it")
        parent = path.absolute().parent
        if not parent.is_dir():
            raise JobError(f"{parent}: no such directory", hint="make it, or choose another --save-reference-logits")
        if self.n_bytes > (free := free_disk(parent)):
            raise JobError(
                f"{path}: reference logits need {format_gb(self.n_bytes)} of disk, {format_gb(free)} are free",
                hint="fewer windows (-n), or free some space",
            )

    def write(
        self, path: Path, ids_NT: Tensor, x_PH: Tensor, head_rows: Callable[[int, int], Tensor]
    ) -> None:
        """Write the file, synced and renamed into place.

        ids_NT: the windows. x_PH: normed states of the saved positions, float32. head_rows: rows start to stop of the
        head, float32. CheckpointError for logits that are not finite.
        """
        step = max(1, _LOGITS_AT_ONCE // self.vocab_size)

        def produce(put: Callable[[Any], None]) -> None:
            put(_MAGIC + struct.pack("<Iii", self.window_tokens, self.vocab_size, self.windows))
            put(ids_NT.to(torch.int32).numpy().astype("<i4").tobytes())
            for first in range(0, len(x_PH), step):
                part_PH = x_PH[first : first + step]
                logits_PV = torch.empty(len(part_PH), self.vocab_size)
                for start, stop in row_slices(self.vocab_size):
                    logits_PV[:, start:stop] = (part_PH @ head_rows(start, stop).to(part_PH.device).T).cpu()
                put(self._encode(logits_PV).tobytes())

        try:
            write_synced(path, produce)
        except OSError as error:
            raise JobError(f"{path}: {error.strerror or error}", hint="fewer windows (-n), or another disk") from error

    def _encode(self, logits_PV: Tensor) -> np.ndarray:
        """Rows of the file, u16 [positions, row_u16]."""
        if not all_finite(logits_PV):
            raise CheckpointError("a logit of the reference is not finite: no reference logits are written")
        top_P1 = logits_PV.max(-1, keepdim=True).values
        low_P1 = torch.maximum(logits_PV.min(-1, keepdim=True).values, top_P1 - _FLOOR_NATS)
        log_sum_P1 = (logits_PV - top_P1).exp().sum(-1, keepdim=True, dtype=torch.float64).log().float()
        scale_P1 = (top_P1 - low_P1) / _STEPS
        logits_PV.sub_(low_P1).div_(torch.where(scale_P1 > 0, scale_P1, 1.0)).clamp_(0, _STEPS).round_()
        rows = np.zeros((len(logits_PV), self.row_u16), dtype="<u2")
        pair_P2 = torch.cat([scale_P1, low_P1 - top_P1 - log_sum_P1], -1)
        rows[:, :4] = pair_P2.numpy().astype("<f4").view("<u2")
        rows[:, 4 : 4 + self.vocab_size] = logits_PV.numpy()
        return rows


@dataclass
class SavedLogits:
    """Reference logits that an evaluation is asked for, and what it found at the positions in the file.

    say: gets a line of text with the size, before anything is computed. file: its shapes, once it is prepared.
    """

    path: Path
    say: Callable[[str], None] = lambda line: None
    file: LogitsFile = field(init=False)
    kl: float = math.nan  # mean at these positions, in nats: what llama-perplexity's own is to be compared with

    def prepare(self, vocab_size: int, ids_NT: Tensor) -> None:
        """Settle the shapes of the file; UsageError or JobError where it cannot be made."""
        file = self.file = LogitsFile(vocab_size, *ids_NT.shape)
        file.check(self.path)
        self.say(f"{self.path}: {format_gb(file.n_bytes)} of reference logits, {file.positions} positions")
