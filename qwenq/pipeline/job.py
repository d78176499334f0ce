"""One quantization, entirely described, and what it made."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
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
from qwenq.pipeline.preflight import original_windows
from qwenq.pipeline.workers import Workers
from qwenq.results import BlockResult, DriftReport
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
    """One quantization, entirely described: equal jobs on equal machines give equal bytes."""

    source: Checkpoint
    out: Path
    recipe: Recipe
    calibration: TokenWindows | None  # None for rounding to nearest, which reads none
    evaluation: TokenWindows
    options: SolverOptions = field(default_factory=SolverOptions)
    device: str = "cpu"  # or GPUs that share the work: cuda:0,cuda:1
    compute_dtype: str = "float32"  # of the evaluation windows' hidden states
    calibration_dtype: str = "float32"  # of calibration's; Hessians and solving are always in float32
    dtype: str = "auto"  # of tensors that are not quantized; auto keeps the source's bytes
    seed: int = 0
    overlap: float | None = None  # share of the evaluation text that is also in the calibration text
    beside: tuple[tuple[str, bytes], ...] = ()  # files put into the checkpoint as they are: the recipe it follows

    def __post_init__(self) -> None:
        if self.calibration_dtype not in ("float32", "bfloat16"):
            raise JobError(
                f"calibration_dtype is {self.calibration_dtype!r}, wanted float32 or bfloat16",
                hint="float16 overflows in Qwen2.5's activations, and their squares are summed",
            )

    @property
    def devices(self) -> tuple[str, ...]:
        """`device`, one by one."""
        return tuple(self.device.split(","))

    @property
    def original_windows(self) -> int:
        """Calibration windows that run through the 16-bit layers too; 0 without error correction."""
        if self.calibration is None or self.options.error_correction == 0:
            return 0
        windows, length = self.calibration.ids.shape
        return original_windows(self.source.spec, windows, length, self.options.error_correction_share)

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
        return self.source.dtype_of(name) if self.dtype == "auto" else DTYPE_NAMES[DTYPES[self.dtype]]

    def convert(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Unquantized tensor `name`, or rows of it, as written; CheckpointError when a value does not fit the dtype."""
        if self.dtype == "auto" or tensor.dtype == DTYPES[self.dtype]:
            return tensor
        converted = tensor.to(DTYPES[self.dtype])
        if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(converted).all()):
            raise CheckpointError(
                f"{self.source.tensors[name].file.name}: {name} holds a value of {float(tensor.abs().max()):.6g}, "
                f"which does not fit {self.dtype}",
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
            "options": asdict(self.options),
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "calibration_dtype": self.calibration_dtype,
            "dtype": self.dtype,
            "seed": self.seed,
            "calibration": self.calibration.to_json() if self.calibration else None,
            "evaluation": self.evaluation.to_json(),
            "overlap": self.overlap,
            "numerics": numerics(self.devices),
        }


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
