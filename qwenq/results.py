"""Results of a run: one object for the progress line, the journal row, the report and the plot."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class LayerResult:
    """One quantized linear."""

    name: str
    scheme: str  # Scheme.label
    error_db: float | None  # 10 log10 of output error over output energy, on the calibration inputs; None without any
    weight_error_db: float  # the same of the weights themselves
    damp_percent: float
    fallback: str = ""  # why GPTQ was given up for rounding to nearest, else ""

    @property
    def shown_db(self) -> float:
        """The output error where there is one, else the weight error."""
        return self.weight_error_db if self.error_db is None else self.error_db

    @staticmethod
    def from_json(row: Any) -> LayerResult:
        """The inverse of `asdict` after JSON; ValueError for anything else."""
        return LayerResult(**_fields(row, _kinds(LayerResult)))


@dataclass(frozen=True)
class BlockResult:
    """One decoder layer: its linears, what reached its output, and the time by stage."""

    layer: int
    linears: tuple[LayerResult, ...]
    stream_error_db: float | None  # quantized against reference hidden states after this layer, on evaluation tokens
    seconds: float
    stages_s: dict[str, float]

    @property
    def worst(self) -> LayerResult:
        """The linear with the largest shown error."""
        return max(self.linears, key=lambda r: r.shown_db)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(row: Any) -> BlockResult:
        """The inverse of `to_json` after JSON; ValueError for anything else."""
        block = _fields(row, _kinds(BlockResult))
        linears = tuple(map(LayerResult.from_json, block["linears"]))
        _fields(block["stages_s"], dict.fromkeys(block["stages_s"], _NUMBER))
        return BlockResult(**block | {"linears": linears})


_NUMBER = (float, int)
_NUMBER_OR_NONE = (float, int, type(None))
_TYPES: dict[str, tuple[type, ...]] = {  # of JSON, by those of a dataclass's fields
    "str": (str,), "int": (int,), "float": _NUMBER, "float | None": _NUMBER_OR_NONE, "Interval": (dict,),
    "dict[str, float]": (dict,), "tuple[LayerResult, ...]": (list, tuple),
}  # fmt: skip


def _kinds(of: type[Any]) -> dict[str, tuple[type, ...]]:
    """Types of JSON that the fields of a dataclass have."""
    return {field.name: _TYPES[str(field.type)] for field in fields(of)}


def _fields(row: Any, kinds: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """An object of JSON with exactly these fields, of these types; ValueError otherwise."""
    if not isinstance(row, dict) or row.keys() != kinds.keys():
        raise ValueError("wanted an object of " + ", ".join(kinds))
    for key, kind in kinds.items():
        if type(row[key]) not in kind:
            raise ValueError(f"{key} is {type(row[key]).__name__}")
    return row


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval (percentiles of a bootstrap over windows of text), NaN of one window."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class DriftReport:
    """A checkpoint against its 16-bit reference on one text; perplexities are exp of the mean loss in nats."""

    reference_perplexity: float
    reference_perplexity_se: float
    perplexity: float
    perplexity_se: float
    perplexity_increase_percent: Interval  # paired: both read the same windows
    kl: Interval  # KL(reference || checkpoint), nats per token
    kl_median: float
    kl_p99: float
    top1_agreement: Interval  # share of positions with the same most likely token
    noise_floor_kl: float  # reference in the compute dtype against the reference in float32
    non_finite: int  # logit rows with a NaN or infinity, in either stream
    tokens: int  # predicted tokens
    windows: int
    window_tokens: int
    text: str
    text_sha256: str
    compute_dtype: str
    metrics_version: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(row: Any) -> DriftReport:
        """Read what `finite_json` of `to_json` gave: null is a figure that was not finite. ValueError for another."""

        def figure(value: Any, kind: tuple[type, ...]) -> Any:
            if kind == _TYPES["Interval"]:
                parts = _fields(value, dict.fromkeys(_kinds(Interval), _NUMBER_OR_NONE))
                return Interval(**{key: figure(part, _NUMBER) for key, part in parts.items()})
            return math.nan if value is None else value

        kinds = _kinds(DriftReport)
        found = _fields(row, {name: _NUMBER_OR_NONE if kind == _NUMBER else kind for name, kind in kinds.items()})
        return DriftReport(**{name: figure(value, kinds[name]) for name, value in found.items()})


def finite_json(value: Any) -> Any:
    """`value` with figures that are not finite as None: JSON knows no NaN or infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(v) for v in value]
    return value
