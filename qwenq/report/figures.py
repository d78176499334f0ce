"""Numbers as a reader sees them; what is not a number says so."""

from __future__ import annotations

import math
import re

from qwenq.report.document import Small, Text
from qwenq.results import Interval
from qwenq.units import format_gb

MISSING = "–"


def number(value: float, spec: str, unit: str = "") -> str:
    """`value` formatted, with a true minus; `not finite` for NaN."""
    if not math.isfinite(value):
        return "not finite"
    text = re.sub(r"e(-?)\+?0*", r"e\1", f"{value:{spec}}").replace("-", "−")
    return f"{text} {unit}" if unit else text


def known(value: float, spec: str, unit: str = "") -> str:
    """Like `number`, but a dash for what was not given."""
    return MISSING if math.isnan(value) else number(value, spec, unit)


def kl_spec(value: float) -> str:
    """Four significant digits, without an exponent as long as that reads well."""
    if not math.isfinite(value) or value == 0:
        return ".4f"
    return ".3e" if abs(value) < 1e-4 else f".{max(3 - math.floor(math.log10(abs(value))), 0)}f"


def kl(value: float) -> str:
    return number(value, kl_spec(value))


def with_interval(mean: str, interval: Interval, spec: str, scale: float = 1.0) -> Text:
    """A mean and, smaller, its interval; the mean alone where there is none."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return mean
    return mean, Small(f"{number(scale * interval.low, spec)} to {number(scale * interval.high, spec)}")


def size(n_bytes: float) -> str:
    return MISSING if math.isnan(n_bytes) else format_gb(n_bytes)
