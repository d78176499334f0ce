"""Results of other tools on the same model, one JSON object a line, for the plot of KL against size.

Fields: `tool`, `version`, `setting`, `text` (what the drift was read on), `kl` with `kl_low` and `kl_high` (nats a
token, 95 %), and where known `bits_per_linear_weight`, `bytes` (of the checkpoint's files), `top1` (a share from 0 to
1). What is unknown is null or left out; further fields are ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qwenq.errors import CheckpointError
from qwenq.io.fields import Fields
from qwenq.io.json import inside, parse_object, read_limited, read_object, shown
from qwenq.results import Interval

MAX_BYTES, MAX_RESULTS = 1_000_000, 200


@dataclass(frozen=True)
class Benchmark:
    """One tool's result; NaN or an empty text for what is not known."""

    tool: str
    version: str
    setting: str
    text: str
    kl: Interval
    bits_per_linear_weight: float
    n_bytes: float
    top1: float

    @property
    def label(self) -> str:
        return f"{self.tool} {self.setting}".strip()


def read_benchmarks(file: Path) -> tuple[Benchmark, ...]:
    """The results in a file; CheckpointError names the line that is not one."""
    try:
        lines = read_limited(file, MAX_BYTES).splitlines()
    except CheckpointError as error:
        raise CheckpointError(error.message, hint="--benchmarks takes JSON lines") from None
    found: list[Benchmark] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            if len(found) == MAX_RESULTS:
                raise CheckpointError(f"{shown(file.name)}: more than {MAX_RESULTS} results")
            where = f"{shown(file.name)} line {number}"
            found.append(_benchmark(Fields(parse_object(line, where), where, "")))
    return tuple(found)


def _benchmark(fields: Fields) -> Benchmark:
    def number(key: str) -> float:
        return fields.number(key) if key in fields.value else math.nan

    def text(key: str) -> str:
        return fields.text(key) if fields.value.get(key) is not None else ""

    return Benchmark(
        tool=fields.text("tool"),
        version=text("version"),
        setting=text("setting"),
        text=fields.text("text"),
        kl=Interval(fields.number("kl"), number("kl_low"), number("kl_high")),
        bits_per_linear_weight=number("bits_per_linear_weight"),
        n_bytes=number("bytes"),
        top1=number("top1"),
    )


MAX_ROWS = 2000


@dataclass(frozen=True)
class Measurement:
    """The peak of one device in one phase at one context, and what was predicted of the same figure."""

    checkpoint: str  # the directory's name
    context: int
    phase: str
    device: str
    on_gpu: bool
    allocated_bytes: int  # by torch's allocator; on a CPU, resident
    driver_bytes: int
    predicted_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Measured peak: the driver's figure if there is one."""
        return self.driver_bytes or self.allocated_bytes


def read_measurements(file: Path) -> tuple[Measurement, ...]:
    """The measurements in a file; CheckpointError names the first field that is not as it should be."""
    fields = Fields(read_object(inside(file.parent, file.name)), shown(file.name), "")
    checkpoint = Path(fields.text("model")).name
    return tuple(
        Measurement(
            checkpoint=checkpoint,
            context=row.whole("context"),
            phase=row.text("phase"),
            device=row.text("device"),
            on_gpu=row.text("kind") != "CPU",
            allocated_bytes=row.whole("allocated_bytes"),
            driver_bytes=row.whole("driver_bytes"),
            predicted_bytes=row.whole("predicted_bytes"),
        )
        for row in fields.objects("rows", MAX_ROWS)
    )


def gpu_peaks(measurements: tuple[Measurement, ...]) -> dict[int, int]:
    """Bytes by context over all GPUs, in the phase that took the most."""
    totals: dict[tuple[int, str], int] = {}
    for m in measurements:
        if m.on_gpu:
            totals[m.context, m.phase] = totals.get((m.context, m.phase), 0) + m.peak_bytes
    peaks: dict[int, int] = {}
    for (context, _), n_bytes in totals.items():
        peaks[context] = max(peaks.get(context, 0), n_bytes)
    return peaks
