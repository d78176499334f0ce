"""One quantization, entirely described, and what it made."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwenq import __version__
from qwenq.checkpoint.reader import Checkpoint
from qwenq.errors import CheckpointError, JobError
from qwenq.formats.base import Recipe
from qwenq.io.tensors import DTYPE_NAMES
from qwenq.machine import numerics
from qwenq.pipeline.block import SolverOptions, passes
from qwenq.pipeline.config import QuantizeConfig, Windows, original_windows
from qwenq.pipeline.workers import Workers
from qwenq.results import BlockResult, DriftReport
from qwenq.solver.gptq import DAMP_PERCENT
from qwenq.text.tokens import TokenWindows

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def partial_directory(out: Path) -> Path:
    """Where a job works until it is whole."""
    return out.with_name(out.name + ".partial")


def refuse_place(out: Path, source: Path) -> None:
    """Raise JobError when `out` is there already, or is the directory `source` or inside it."""
    resolved, source = out.absolute().resolve(), source.resolve()
    if resolved == source or source in resolved.parents:
        raise JobError(
            f"{out}: the output may not be the model's own directory or inside it", hint="choose another --output"
        )
    if os.path.lexists(out):
        raise JobError(f"{out}: exists already", hint="choose another --output, or delete it")


@dataclass(frozen=True)
class QuantizeJob:
    """One quantization, entirely described: equal jobs on equal machines give equal bytes.

    config: settled, so that nothing in it is left to be chosen. recipe: the bits, which the configuration names only as
    they were asked for. calibration: None for rounding to nearest, which reads none.
    """

    source: Checkpoint
    out: Path
    recipe: Recipe
    config: QuantizeConfig
    calibration: TokenWindows | None
    evaluation: TokenWindows
    overlap: float | None = None  # share of the evaluation text that is also in the calibration text
    beside: tuple[tuple[str, bytes], ...] = ()  # files put into the checkpoint as they are: the recipe it follows

    def __post_init__(self) -> None:
        settled = {name: getattr(self.config, name) for name in ("device", "compute_dtype", "calibration_dtype")}
        if open_ := [name for name, value in settled.items() if value == "auto"]:
            raise JobError(f"{open_[0]} is auto, wanted a choice")
        if self.config.error_correction is None:
            raise JobError("error_correction is open, wanted 0 to 1")

    @property
    def options(self) -> SolverOptions:
        """What the solver is asked to do, the same for every layer."""
        config = self.config
        damping = DAMP_PERCENT if config.damp_percent is None else config.damp_percent
        assert config.error_correction is not None
        return SolverOptions(
            config.solver, damping, config.fold, config.error_correction, config.error_correction_share,
            config.sink_weight,
        )  # fmt: skip

    @property
    def devices(self) -> tuple[str, ...]:
        """The configuration's devices, one by one."""
        return tuple(self.config.device.split(","))

    @property
    def windows(self) -> Windows:
        """Counts of the windows."""
        return windows_of(self.calibration, self.evaluation)

    @property
    def original_windows(self) -> int:
        """Calibration windows that run through the 16-bit layers too; 0 without error correction."""
        if self.calibration is None or self.config.error_correction == 0:
            return 0
        windows, length = self.calibration.ids.shape
        return original_windows(self.source.spec, windows, length, self.config.error_correction_share)

    def passes(self, name: str) -> list[range] | None:
        """In which ranges of windows hidden states of calibration go through a layer; None for others."""
        if self.calibration is None or name not in ("calibration", "original"):
            return None
        corrected = self.original_windows
        return passes(len(self.calibration.ids) if name == "calibration" else corrected, corrected)

    def workers(self, dtype: torch.dtype, windows: TokenWindows | None) -> Workers:
        """Workers on the job's devices for these windows, or for those of the evaluation."""
        spec, length = self.source.spec, (windows or self.evaluation).ids.shape[1]
        return Workers(self.source.config, spec, dtype=dtype, window_tokens=length, devices=self.devices)

    def stored_dtype(self, name: str) -> str:
        """safetensors dtype in which tensor `name` is written when it is not quantized."""
        return self.source.dtype_of(name) if self.config.dtype == "auto" else DTYPE_NAMES[DTYPES[self.config.dtype]]

    def convert(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Unquantized tensor `name`, or rows of it, as written; CheckpointError when a value does not fit the dtype."""
        dtype = self.config.dtype
        if dtype == "auto" or tensor.dtype == DTYPES[dtype]:
            return tensor
        converted = tensor.to(DTYPES[dtype])
        if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(converted).all()):
            raise CheckpointError(
                f"{self.source.tensors[name].file.name}: {name} holds a value of {float(tensor.abs().max()):.6g}, "
                f"which does not fit {dtype}",
                hint="--dtype bfloat16 holds it",
            )
        return converted

    def describe(self) -> dict[str, Any]:
        """Everything that decides the output, for the journal and the manifest."""
        return {
            "qwenq": __version__,
            "model": self.source.spec.name,
            "intermediate_size": self.source.spec.intermediate_size,  # the source's, or padded
            "scheme": asdict(self.recipe.default) if self.recipe.default else None,
            "format": self.recipe.format,
            "overrides": {name: asdict(s) if s else None for name, s in self.recipe.overrides},
            "options": {
                "method": self.options.method,
                "damp_percent": self.options.damp_percent,
                "fold": self.options.fold,
                "error_correction": self.config.error_correction,
                "error_correction_share": self.config.error_correction_share,
                "sink_weight": self.config.sink_weight,
            },
            "device": self.config.device,
            "compute_dtype": self.config.compute_dtype,
            "calibration_dtype": self.config.calibration_dtype,
            "dtype": self.config.dtype,
            "seed": self.config.seed,
            "calibration": self.calibration.to_json() if self.calibration else None,
            "evaluation": self.evaluation.to_json(),
            "overlap": self.overlap,
            "numerics": numerics(self.devices),
        }


def windows_of(calibration: TokenWindows | None, evaluation: TokenWindows) -> Windows:
    """Counts of the windows of two texts."""
    length = calibration.ids.shape[1] if calibration else evaluation.ids.shape[1]
    return Windows(len(calibration.ids) if calibration else 0, len(evaluation.ids), length)


@dataclass(frozen=True)
class QuantizeResult:
    """What a finished job made."""

    out: Path
    drift: DriftReport
    layers: tuple[BlockResult, ...]
    tensor_bytes: int
    file_bytes: int
    bits_per_linear_weight: float
    seconds: float
    peak_rss_bytes: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}
