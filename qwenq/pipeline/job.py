"""One quantization, entirely described, and what it made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qwenq import __version__
from qwenq.checkpoint.reader import Checkpoint
from qwenq.checkpoint.shards import Beside, StoredFiles, stored_files
from qwenq.errors import CheckpointError, JobError
from qwenq.formats.base import Recipe, Scheme, get_format
from qwenq.io.safetensors import FLOAT_NAMES, FLOATS
from qwenq.io.tensors import TORCH_DTYPES, all_finite
from qwenq.machine import numerics, return_freed_memory
from qwenq.pipeline.activations import TokenSets
from qwenq.pipeline.block import SolverOptions
from qwenq.pipeline.card import rotated_too
from qwenq.pipeline.config import (
    CPU_BATCH_TOKENS,
    PARTS,
    QuantizeConfig,
    Windows,
    cpu_batch_tokens,
    head_windows,
    original_windows,
)
from qwenq.pipeline.container import containers
from qwenq.pipeline.ranks import ALONE, Ranks
from qwenq.pipeline.shares import passes
from qwenq.pipeline.workers import Workers
from qwenq.results import BlockResult, DriftReport, LayerResult
from qwenq.solver.gptq import DAMP_PERCENT, damping_of_products, round_rows
from qwenq.solver.grid import QTensor
from qwenq.text.tokens import TokenWindows

SUMS = f"{PARTS} parts, products in the states' dtype"  # how sums over calibration windows are taken
GPU_SUMS = f"{SUMS}, summed in float32"
DTYPES = {name: TORCH_DTYPES[dtype] for name, dtype in FLOATS.items()}


def builtin_lacks(config: QuantizeConfig, calibration: TokenWindows) -> str:
    """A line on windows of the built-in set that were wanted and are not there; empty where all are."""
    taken = calibration.provenance.get("builtin")
    if taken is None:  # none were wanted
        return ""
    windows, length = calibration.ids.shape
    asked = config.builtin_windows(windows, tokenizer=True)
    said = f"{taken['windows']} of {asked} windows asked of the built-in set: it has no more of {length} tokens"
    return said if taken["windows"] < asked else ""


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
        if self.config.rotate is None:
            raise JobError("rotate is open, wanted true or false")

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each thing that is read otherwise than the model's config.json says, or left out of a text, for
        windows that the built-in set lacks, for an idle option, and for a recipe that is not what its name says.
        """
        texts = [text.left_out for text in (self.calibration, self.evaluation) if text is not None]
        texts += [builtin_lacks(self.config, self.calibration)] if self.calibration else []
        name = self.config.mixture
        named = get_format(self.recipe.format).notes(name, self.source.spec) if name else []
        return (*self.source.notes, *filter(None, (*texts, self.config.idle_share)), *named)

    @property
    def options(self) -> SolverOptions:
        """What the solver is asked to do, the same for every layer."""
        config = self.config
        assert config.error_correction is not None
        damping, down = config.damp_percent, None
        if damping is None:
            damping = DAMP_PERCENT
            if self.calibration is not None and not config.error_correction:  # which the same factor would damp
                down = damping_of_products(self.source.spec.intermediate_size, self.calibration.ids.numel())
        return SolverOptions(config.solver, damping, down, config.fold, config.error_correction, config.sink_weight)

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

    def tokens(self, ranks: Ranks = ALONE) -> TokenSets:
        """The job's tokens, and a rank's share of them."""
        calibrated = 0 if self.calibration is None else len(self.calibration.ids)
        corrected = self.original_windows
        return TokenSets(
            self.evaluation.ids,
            DTYPES[self.config.compute_dtype],
            ranks.share(range(len(self.evaluation.ids))),
            None if self.calibration is None else self.calibration.ids,
            DTYPES[self.config.calibration_dtype],
            ranks.share(*passes(calibrated, corrected)),
            ranks.share(*passes(corrected, corrected)),
        )

    def workers(self, dtype: torch.dtype, windows: TokenWindows | None, ranks: Ranks = ALONE) -> Workers:
        """Workers on the job's devices for these windows, or for those of the evaluation."""
        spec, length = self.source.spec, (windows or self.evaluation).ids.shape[1]
        return Workers(
            self.source.config, spec, dtype=dtype, window_tokens=length, devices=self.devices, ranks=ranks
        )

    def stored_dtype(self, name: str) -> str:
        """safetensors dtype in which tensor `name` is written when it is not quantized."""
        asked = self.source.dtype_of(name) if self.config.dtype == "auto" else FLOATS[self.config.dtype]
        return get_format(self.recipe.format).stored_dtype(name, asked, self.config.mixture)

    @property
    def outside(self) -> dict[str, str]:
        """What became of embedding, norms and head: rotated, in a dtype that lacks values of the source's."""
        spec = self.source.spec
        names = {"embedding": spec.embedding_tensor, "norms": spec.norm_tensor, "head": spec.head_tensor}
        pairs = {part: (self.source.dtype_of(name), self.stored_dtype(name)) for part, name in names.items()}
        narrowed = {part: f"in {FLOAT_NAMES[new]}" for part, (old, new) in pairs.items() if new not in (old, "F32")}
        return rotated_too(narrowed) if self.config.rotate else narrowed

    @cached_property
    def files(self) -> StoredFiles:
        """The files that it writes."""
        return stored_files(self.source.spec, self.recipe, self.stored_dtype, self.container)

    @cached_property
    def container(self) -> Beside:
        """What these files hold beside tensors."""
        found = containers(self.source, self.config)(self.source.spec, self.recipe)
        return_freed_memory()  # a tokenizer's JSON takes more than what is kept of it
        return found

    @property
    def converts(self) -> bool:
        """Whether embedding, last norm or head are written as other values than they are read."""
        outer = self.source.spec.outer_linears
        if self.config.rotate or self.config.dtype != "auto":
            return True
        return any(self.recipe.outer_scheme(lin) is not None for lin in outer)

    @property
    def head_scheme(self) -> Scheme | None:
        """What the head is solved for, be it the embedding too; None where it stays in 16 bit or nothing is calibrated.
        """
        return None if self.calibration is None else self.recipe.outer_scheme(self.source.spec.outer_linears[-1])

    @property
    def head_windows(self) -> int:
        """Calibration windows, the first ones, whose Hessian an embedding is solved with that is the head too; else 0.
        """
        if self.calibration is None or self.head_scheme is None or not self.source.spec.tie_word_embeddings:
            return 0
        return head_windows(self.source.spec, *self.calibration.ids.shape)

    def _rounded(self, name: str) -> Callable[[torch.Tensor], QTensor] | None:
        """A function that rounds rows of the embedding or the head to their grid; None for what stays as it is.

        It knows nothing of their inputs: what it makes of a row does not depend on others.
        """
        linears = {lin.name + ".weight": lin for lin in self.source.spec.outer_linears}
        scheme = self.recipe.outer_scheme(linears[name]) if name in linears else None
        if scheme is None:
            return None
        grid, device = scheme.grid(), self.devices[0]
        return lambda rows_OI: round_rows(rows_OI.to(device).float(), grid)

    def packer(self, name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A function from rows of the embedding or the head to their bytes; None where these are not quantized."""
        rounded, form = self._rounded(name), get_format(self.recipe.format)
        return None if rounded is None else lambda rows_OI: form.pack(rounded(rows_OI))["weight"].cpu()

    def convert(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Unquantized tensor `name`, or rows of it, as written; CheckpointError when a value does not fit the dtype."""
        if (rounded := self._rounded(name)) is not None:
            return rounded(tensor).dequantize().cpu()
        dtype = TORCH_DTYPES[self.stored_dtype(name)]
        if tensor.dtype == dtype:
            return tensor
        converted = tensor.to(dtype)
        if not all_finite(converted) and all_finite(tensor):
            raise CheckpointError(
                f"{self.source.tensors[name].file.name}: {name} holds a value of {float(tensor.abs().max()):.6g}, "
                f"which does not fit {str(dtype).removeprefix('torch.')}",
                hint=f"{'--gguf-type BF16' if self.config.mixture else '--dtype bfloat16'} holds it",
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
                "damp_percent": self.config.damp_percent,
                "fold": self.options.fold,
                "error_correction": self.config.error_correction,
                "error_correction_share": self.config.error_correction_share,
                "sink_weight": self.config.sink_weight,
                "rotate": self.config.rotate,
            },
            "device": self.config.device,
            "compute_dtype": self.config.compute_dtype,
            "calibration_dtype": self.config.calibration_dtype,
            "dtype": self.config.dtype,
            "seed": self.config.seed,
            "calibration": self.calibration.to_json() if self.calibration else None,
            "evaluation": self.evaluation.to_json(),
            "overlap": self.overlap,
            "numerics": self.numerics,
        } | self._whole_files

    @property
    def _whole_files(self) -> dict[str, Any]:
        """Of files that are the whole model their names, the mixture of their types, and where one ends."""
        if not self.files.whole:
            return {}
        asked = {
            "gguf_type": self.config.mixture, "split_size": self.config.split_size, "head_windows": self.head_windows,
        }  # fmt: skip
        return {"files": self.files.names} | {name: value for name, value in asked.items() if value}

    @property
    def numerics(self) -> dict[str, Any]:
        """What decides the last bits of sums on this machine: a resumed job needs the same."""
        sums = SUMS if self.devices == ("cpu",) else GPU_SUMS
        if self.calibration is None:
            return numerics(self.devices)
        length = self.calibration.ids.shape[1]
        batch = cpu_batch_tokens(self.source.spec.intermediate_size)
        windows, once = max(1, batch // length), max(1, CPU_BATCH_TOKENS // length)
        if self.devices == ("cpu",) and windows < once:  # the bits of narrower FFNs are those of earlier versions
            sums += f", batches of {windows} window{'s' if windows > 1 else ''}"
        return numerics(self.devices) | {"sums": sums}

    def same_everywhere(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """Of `describe`, what every rank has to have the same: all but its directory's name and what it computes on."""
        free = ("threads", "instructions")
        kept = {name: value for name, value in described["numerics"].items() if name not in free}
        return {**described, "numerics": kept, "device": "", "model": ""}


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
    head: LayerResult | None = None  # where it was solved

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> QuantizeResult:
        """What `finite_json` of `to_json` gave."""
        layers = tuple(BlockResult.from_json(layer) for layer in row["layers"])
        drift, warnings = DriftReport.from_json(row["drift"]), tuple(row["warnings"])
        head = None if row["head"] is None else LayerResult.from_json(row["head"])
        return QuantizeResult(
            **{**row, "out": Path(row["out"]), "drift": drift, "layers": layers, "warnings": warnings, "head": head}
        )
