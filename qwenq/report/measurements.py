"""Measured memory against context, from what `qwenq vram measure` saves: one JSON object a checkpoint.

Read of it: `model` (the checkpoint's directory or name), and in `rows` each peak: `context` (tokens), `phase`,
`device`, `kind` (of GPU, or CPU), `allocated_bytes`, `driver_bytes` (0 where no driver was asked), `predicted_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwenq.headers import inside, read_object, shown
from qwenq.report.fields import Fields

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
        """What the device really gave: the driver's figure where there is one."""
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
