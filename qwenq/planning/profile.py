"""A rig's own measurements (`qwenq vram measure`) turned into corrections of the estimator's fitted terms, and back.

Per kind of device: measured allocator peak = weights + KV cache (exact) + scale x working memory (fitted terms) +
constant, by least squares over the measured rows; what the driver counts beyond torch's reserve replaces the CUDA
context, and what torch reserves beyond its peak the slack. A device with one row gets a scale only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError, PlanError
from qwenq.io.json import read_object
from qwenq.planning.memory import Term

KIND = "qwenq-vram-profile"
VERSION = 1
WORKING = ("activations", "logits", "dequantization")
_MAX_BYTES = 4_000_000
_MAX_ROWS = 10_000


@dataclass(frozen=True)
class MeasuredRow:
    """One device at one context and phase: measured bytes beside the estimate's parts."""

    context: int
    phase: str  # prefill, decode
    device: str  # GPU 0 RTX 3090
    kind: str  # RTX 3090, CPU
    allocated_bytes: int
    reserved_bytes: int
    driver_bytes: int
    exact_bytes: int  # weights and KV cache
    working_bytes: int

    @property
    def predicted_bytes(self) -> int:
        return self.exact_bytes + self.working_bytes

    @property
    def error_percent(self) -> float:
        return 100 * (self.predicted_bytes / self.allocated_bytes - 1) if self.allocated_bytes else math.nan

    def to_json(self) -> dict[str, Any]:
        error = self.error_percent
        shown = {"predicted_bytes": self.predicted_bytes, "error_percent": None if math.isnan(error) else error}
        return asdict(self) | shown


@dataclass(frozen=True)
class DeviceFit:
    """Corrections for one kind of device; None where nothing was measured."""

    kind: str
    rows: int
    scale: float  # of working memory
    constant_bytes: int
    context_bytes: int | None
    slack_ratio: float | None  # of what comes and goes
    worst_error_percent: float  # of the fitted rows, after the fit

    def working(self, n_bytes: float) -> float:
        return self.scale * n_bytes + self.constant_bytes


@dataclass(frozen=True)
class Profile:
    """Fits of a rig's devices, and where they are from."""

    source: str
    fits: tuple[DeviceFit, ...]

    def fit_for(self, gpu: str) -> DeviceFit:
        """The fit of a kind of GPU; `GPU` (no rig was given) takes the only one. PlanError when there is none."""
        if gpu == "GPU" and len(self.fits) == 1:
            return self.fits[0]
        for fit in self.fits:
            if fit.kind == gpu:
                return fit
        known = ", ".join(fit.kind for fit in self.fits)
        raise PlanError(f"{self.source} was measured on {known}, not on {gpu}", hint="measure there, or name that GPU")

    def corrected(self, gpu: str, terms: Sequence[Term]) -> list[Term]:
        """Terms of one GPU with the fitted and reported ones as this rig has them."""
        fit = self.fit_for(gpu)
        note = f"measured: {self.source}, {fit.rows} rows"
        spread = max(0.01, fit.worst_error_percent / 100)
        found: list[Term] = []
        moving = 0
        for term in terms:
            if term.name in WORKING:
                term = _measured(term, round(term.n_bytes * fit.scale), note, spread)
            elif term.name == "non_torch":
                term = _measured(term, fit.constant_bytes, note, spread)
            elif term.name == "context" and fit.context_bytes is not None:
                term = _measured(term, fit.context_bytes, note, spread)
            if term.name in (*WORKING, "kv_cache"):
                moving += term.n_bytes
            found.append(term)
        if fit.slack_ratio is not None:
            slack = round(fit.slack_ratio * moving)
            found = [_measured(t, slack, note, spread) if t.name == "slack" else t for t in found]
        return found


def _measured(term: Term, n_bytes: int, note: str, spread: float) -> Term:
    low, high = round(n_bytes * (1 - spread)), round(n_bytes * (1 + spread))
    return replace(term, n_bytes=n_bytes, provenance="fitted", source=note, low_bytes=max(0, low), high_bytes=high)


def fit_rows(rows: Sequence[MeasuredRow]) -> tuple[DeviceFit, ...]:
    """One fit a kind of device, in the order they appear; rows without a measurement are left out."""
    kinds = dict.fromkeys(row.kind for row in rows if row.allocated_bytes > 0)
    return tuple(_fit(kind, [row for row in rows if row.kind == kind and row.allocated_bytes > 0]) for kind in kinds)


def _fit(kind: str, rows: list[MeasuredRow]) -> DeviceFit:
    x = [float(row.working_bytes) for row in rows]
    y = [float(row.allocated_bytes - row.exact_bytes) for row in rows]
    scale, constant = _line(x, y)
    fit = DeviceFit(kind, len(rows), scale, round(constant), None, None, 0.0)
    errors = [
        abs(row.exact_bytes + fit.working(row.working_bytes) - row.allocated_bytes) / row.allocated_bytes
        for row in rows
    ]
    seen = [row.driver_bytes - row.reserved_bytes for row in rows if row.driver_bytes > row.reserved_bytes > 0]
    slack = [(row.reserved_bytes - row.allocated_bytes) / row.allocated_bytes for row in rows if row.reserved_bytes > 0]
    return replace(
        fit,
        context_bytes=max(seen) if seen else None,
        slack_ratio=max(0.0, sum(slack) / len(slack)) if slack else None,
        worst_error_percent=100 * max(errors),
    )


def _line(x: list[float], y: list[float]) -> tuple[float, float]:
    """y ~ scale * x + constant, both at least 0; through the origin when x hardly varies."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((v - mean_x) ** 2 for v in x)
    if mean_x > 0 and spread > (0.05 * mean_x) ** 2 * len(x):
        scale = sum((v - mean_x) * (w - mean_y) for v, w in zip(x, y, strict=True)) / spread
        constant = mean_y - scale * mean_x
        if scale >= 0 and constant >= 0:
            return scale, constant
    total = sum(v * v for v in x)
    return (max(0.0, sum(v * w for v, w in zip(x, y, strict=True)) / total), 0.0) if total else (1.0, max(0.0, mean_y))


def profile_json(rows: Sequence[MeasuredRow], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The file that `qwenq vram measure` writes and `--profile` reads."""
    return {
        "kind": KIND,
        "version": VERSION,
        **facts,
        "rows": [row.to_json() for row in rows],
        "fits": [asdict(fit) for fit in fit_rows(rows)],
    }


def read_profile(path: Path) -> Profile:
    """A measured profile; its fits are made again from its rows. PlanError for a file that is none."""
    try:
        content = read_object(path, limit=_MAX_BYTES)
    except CheckpointError as error:
        raise PlanError(error.message, hint="wanted what `qwenq vram measure -o FILE` writes") from None
    if content.get("kind") != KIND or content.get("version") != VERSION:
        raise PlanError(
            f"{path}: not a profile of version {VERSION}", hint="write one with `qwenq vram measure -o FILE`"
        )
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows:
        raise PlanError(f"{path}: no rows")
    if len(rows) > _MAX_ROWS:
        raise PlanError(f"{path}: {len(rows)} rows, more than {_MAX_ROWS}")
    fits = fit_rows([_row(row, f"{path}: row {k}") for k, row in enumerate(rows, 1)])
    if not fits:
        raise PlanError(f"{path}: no row has a measured peak", hint="measure where the system reports memory")
    return Profile(path.name, fits)


def _row(row: Any, where: str) -> MeasuredRow:
    fields = MeasuredRow.__dataclass_fields__
    if not isinstance(row, dict):
        raise PlanError(f"{where} is {type(row).__name__}, wanted an object")
    for name, field in fields.items():
        value = row.get(name)
        good = isinstance(value, str) if field.type == "str" else type(value) is int and 0 <= value < 1 << 50
        if not good:
            raise PlanError(f"{where}: {name} is {str(value)[:40]!r}")
    return MeasuredRow(**{name: row[name] for name in fields})
