"""The dry run of a quantization, from shapes alone: files byte for byte, disk, peak memory. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwenq.checkpoint.shards import NOTHING, Beside, stored_files
from qwenq.errors import JobError
from qwenq.formats.base import GROUP_SIZES, Recipe
from qwenq.io.safetensors import tensor_bytes
from qwenq.machine import free_disk
from qwenq.model.architectures import Stage
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.config import (
    BACKWARD_TOKENS,
    BATCH_TOKENS,
    MOST_WORKERS,
    NOISE_WINDOWS,
    PROBE_TOKENS,
    PROBE_WINDOWS,
    SAMPLES,
    SOLVER_WINDOWS,
    SPILL_BYTES,
    WORKERS_UP_TO,
    Tokens,
)
from qwenq.planning.tensor_parallel import row_groups, tensor_parallel_sizes
from qwenq.units import format_gb

BASE_BYTES = 560_000_000  # interpreter, torch, transformers and thread pools; measured on Linux with torch 2.13
_SLACK_BYTES = 1 << 20  # config, tokenizer copies are added exactly; journal and model card are not


@dataclass(frozen=True)
class Preflight:
    """The dry run's answer. Bytes; GPU figures are 0 for a job on the CPU."""

    model: str
    parameters: int
    scheme: str
    format: str
    bits_per_linear_weight: float
    tensor_bytes: int
    file_bytes: int
    source_tensor_bytes: int
    units: dict[str, str]  # unit -> scheme labels met in it
    unit_bytes: dict[str, int]
    peak_ram_bytes: int
    peak_vram_bytes: int
    state_bytes: int  # hidden states kept on disk to resume from, both copies
    spill_bytes: int  # token buffers in a memory-mapped file
    disk_needed_bytes: int
    disk_free_bytes: int | None
    tensor_parallel: dict[str, str]  # "1", "2", "4", "8" -> "" or why not

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check_disk(self, where: Path) -> None:
        """Raise JobError when the disk cannot hold what will be written."""
        if self.disk_free_bytes is not None and self.disk_needed_bytes > self.disk_free_bytes:
            raise JobError(
                f"{where}: needs {format_gb(self.disk_needed_bytes)} of disk, "
                f"{format_gb(self.disk_free_bytes)} are free",
                hint="choose an --output on another disk, or free some space",
            )


@dataclass(frozen=True)
class PlannedJob:
    """A quantization as the dry run sees it: shapes, recipe, tokens and where it computes."""

    spec: ModelSpec
    recipe: Recipe
    tokens: Tokens
    compute_bytes: int  # of a value in the evaluation windows' hidden states
    on_gpu: bool = False
    out: Path | None = None
    dtype_of: Callable[[str], str] = lambda name: "BF16"  # stored dtype of what is not quantized
    source_dtype_of: Callable[[str], str] = lambda name: "BF16"
    source_spec: ModelSpec | None = None  # where `spec` is padded
    beside: Beside = NOTHING


def preflight(job: PlannedJob) -> Preflight:
    """Exact sizes and predicted peaks of a quantization; raises PlanError where groups do not divide."""
    spec, recipe, tokens = job.spec, job.recipe, job.tokens
    recipe.check(spec)
    files = stored_files(spec, recipe, job.dtype_of, job.beside)
    tensor_total, file_total = files.tensor_bytes, files.file_bytes
    source_total = sum(tensor_bytes(job.source_dtype_of(t.name), t.shape) for t in (job.source_spec or spec).tensors())
    host, device = peak_bytes(spec, tokens, job.compute_bytes, job.on_gpu)
    states = hidden_state_bytes(spec, tokens, job.compute_bytes)
    buffers = token_buffer_bytes(spec, tokens, job.compute_bytes)
    spill = buffers if buffers > SPILL_BYTES else 0
    labels: dict[str, set[str]] = {}
    stage_bytes: dict[str, int] = {}
    for lin in spec.linears:
        scheme = recipe.scheme_of(lin)
        labels.setdefault(lin.stage, set()).add(scheme.label if scheme else "16-bit")
        size = sum(t.nbytes for t in recipe.linear_tensors(lin, job.dtype_of))
        stage_bytes[lin.stage] = stage_bytes.get(lin.stage, 0) + size
    return Preflight(
        model=spec.name,
        parameters=spec.parameters,
        scheme=recipe.label,
        format=recipe.format,
        bits_per_linear_weight=recipe.bits_per_linear_weight(spec),
        tensor_bytes=tensor_total,
        file_bytes=file_total,
        source_tensor_bytes=source_total,
        units={stage: ", ".join(sorted(found)) for stage, found in labels.items()},
        unit_bytes=stage_bytes,
        peak_ram_bytes=host,
        peak_vram_bytes=device,
        state_bytes=2 * states,
        spill_bytes=spill,
        disk_needed_bytes=file_total + 2 * states + spill + _SLACK_BYTES,
        disk_free_bytes=free_disk(job.out) if job.out else None,
        tensor_parallel=tensor_parallel_sizes(spec, row_groups(spec, recipe)),
    )


def scratch_width(spec: ModelSpec) -> int:
    """Values a calibration token needs beside its states: inputs of the stage that ends a block, and 16-bit states
    after this block and those behind it but the last.
    """
    ends = [stage for stage in spec.architecture.stages if stage.adds]
    return max(spec.size(stage.inputs) + spec.hidden_size * (len(ends) - k) for k, stage in enumerate(ends, 1))


def hidden_state_bytes(spec: ModelSpec, tokens: Tokens, compute_bytes: int) -> int:
    """Hidden states of all tokens, in float32 for the noise floor too."""
    noise = min(NOISE_WINDOWS, tokens.evaluation_windows) * tokens.length * 4 if compute_bytes < 4 else 0
    calibration = (tokens.calibration + tokens.original(spec)) * tokens.calibration_bytes
    return (calibration + 2 * tokens.evaluation * compute_bytes + noise) * spec.hidden_size


def token_buffer_bytes(spec: ModelSpec, tokens: Tokens, compute_bytes: int) -> int:
    """Hidden states of all tokens, and the calibration tokens' scratch."""
    scratch = tokens.calibration * scratch_width(spec) * tokens.calibration_bytes
    return hidden_state_bytes(spec, tokens, compute_bytes) + scratch


def peak_bytes(spec: ModelSpec, tokens: Tokens, compute_bytes: int, on_gpu: bool) -> tuple[int, int]:
    """Predicted peak (host, GPU) in bytes; the layer count is not in it, because one layer is held at a time."""
    stages, width = spec.architecture.stages, _widest(spec)
    parameters = sum(lin.parameters for lin in spec.layer_linears(0))
    source = 2 * parameters
    at_once = min(BATCH_TOKENS, tokens.calibration + tokens.evaluation)
    part, states = at_once * width, 2 * at_once * spec.hidden_size
    corrects = tokens.error_correction_share > 0
    solving = tokens.calibration_bytes * parameters + max(_solving(spec, stage, corrects) for stage in stages)
    workers = MOST_WORKERS if not on_gpu and spec.intermediate_size <= WORKERS_UP_TO else 1
    residual = width * spec.hidden_size if corrects else 0
    summing = 4 * (workers * (width**2 + residual) + 2 * residual)  # also the first half's, and one being made
    calibrating = tokens.calibration_bytes * (parameters + 4 * part + states) + summing
    evaluating = compute_bytes * (parameters + 4 * part + states)
    head = 6 * 4 * 1024 * 4096 + 8 * 4096 * spec.hidden_size + 8 * tokens.evaluation * spec.hidden_size
    work = max(solving, calibrating, evaluating)
    buffers = token_buffer_bytes(spec, tokens, compute_bytes)
    if on_gpu:
        return BASE_BYTES + buffers + source, max(work, head)
    at_the_head = hidden_state_bytes(spec, replace(tokens, calibration_windows=0), compute_bytes) + head
    return BASE_BYTES + max(buffers + source + work, at_the_head), 0


def sensitivity_bytes(
    spec: ModelSpec, length: int, compute_bytes: int, on_gpu: bool, schemes: int = len(GROUP_SIZES)
) -> tuple[int, int]:
    """Predicted peak (host, GPU) in bytes of measuring sensitivities on windows of `length` tokens; see peak_bytes.

    schemes: that errors are solved of, in bfloat16.
    """
    hidden, probed = spec.hidden_size, PROBE_WINDOWS * PROBE_TOKENS
    parameters = sum(lin.parameters for lin in spec.layer_linears(0))
    outputs = sum(lin.out_features for lin in spec.layer_linears(0))
    largest = max(lin.parameters for lin in spec.layer_linears(0))
    states = (SOLVER_WINDOWS * length + probed) * hidden * compute_bytes
    passing = 16 * _widest(spec) + 24 * hidden + (schemes + 1) * outputs  # values a token
    backward = compute_bytes * (parameters + largest + BACKWARD_TOKENS * passing)
    head = 4 * probed * hidden * (3 * SAMPLES + 3) + 4 * 4096 * (hidden + 4 * 1024)
    work = max(errors_bytes(spec, length, compute_bytes), backward)
    kept = 4 * _widest(spec) ** 2  # the Hessian, from which each scheme takes a copy
    held = 2 * parameters + schemes * 2 * parameters + 8 * SAMPLES * probed * hidden  # source, errors, gradients twice
    if on_gpu:
        return BASE_BYTES + max(states, held + kept), max(work, head)
    return BASE_BYTES + max(states + head, held + kept + work), 0


def errors_bytes(spec: ModelSpec, length: int, compute_bytes: int) -> int:
    """Predicted peak in bytes, on the device, of solving a layer for the errors that sensitivities are read from."""
    layer, width = spec.layer_linears(0), _widest(spec)
    at_once = min(BATCH_TOKENS, SOLVER_WINDOWS * length)
    collecting = 4 * width**2 + compute_bytes * at_once * (5 * width + 4 * spec.hidden_size)
    solving = max(_solving(spec, stage, corrects=False) for stage in spec.architecture.stages)
    return compute_bytes * sum(lin.parameters for lin in layer) + max(collecting, solving)


def _widest(spec: ModelSpec) -> int:
    """Columns of the widest stage that adds to the hidden states: down's inputs, the FFN."""
    return max(spec.size(stage.inputs) for stage in spec.architecture.stages if stage.adds)


def _solving(spec: ModelSpec, stage: Stage, corrects: bool) -> int:
    """The Hessian; float32 weights, their errors twice while they are permuted, uint8 codes; two sums of residuals."""
    parameters = sum(lin.parameters for lin in spec.stage_linears(0, stage))
    residuals = 8 * parameters if corrects and stage.adds else 0
    return 4 * spec.size(stage.inputs) ** 2 + 13 * parameters + residuals
