"""Measured memory against context, from JSON lines: one object for each checkpoint and context.

Fields: `checkpoint` (the run's directory or its name), `context` (tokens), `peak_bytes` (the peak over all GPUs, or
of the process on a CPU). Further fields are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwenq.errors import CheckpointError
from qwenq.headers import parse_object, shown
from qwenq.report.fields import Fields

MAX_BYTES = 5_000_000


@dataclass(frozen=True)
class Measurement:
    """The peak of one checkpoint at one context."""

    checkpoint: str
    context: int
    peak_bytes: int


def read_measurements(file: Path) -> tuple[Measurement, ...]:
    """The measurements in a file; CheckpointError names the line that is not one."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{shown(file.name)}: more than the {MAX_BYTES} bytes such a file can need")
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{shown(str(file))}: {error.strerror}", hint="--measured takes JSON lines") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{shown(file.name)} line {number}"
            fields = Fields(parse_object(line, where), where, "")
            name = Path(fields.text("checkpoint")).name
            found.append(Measurement(name, fields.whole("context"), fields.whole("peak_bytes")))
    return tuple(found)
