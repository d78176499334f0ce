"""Before a quantization: its files byte for byte, disk and peak memory, from shapes alone; and its place. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwenq.checkpoint.shards import NOTHING, Beside, stored_files
from qwenq.errors import JobError
from qwenq.formats.base import GROUP_SIZES, Recipe, get_format, label_of
from qwenq.io.json import resolved
from qwenq.io.safetensors import tensor_bytes
from qwenq.machine import free_disk
from qwenq.model.architectures import Stage
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.config import (
    BACKWARD_TOKENS,
    BATCH_TOKENS,
    MOST_WORKERS,
    NOISE_WINDOWS,
    PARTS,
    PROBE_TOKENS,
    PROBE_WINDOWS,
    SAMPLES,
    SENSITIVITY_ROWS,
    SOLVER_WINDOWS,
    SPILL_BYTES,
    WORKERS_UP_TO,
    Tokens,
    cpu_batch_tokens,
    head_windows,
)
from qwenq.pipeline.shares import Share, parts_of, passes
from qwenq.planning.tensor_parallel import sizes_of_recipe
from qwenq.solver.triangle import Triangle
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
    schemes: dict[str, str]  # stage -> labels of the schemes met in it
    stage_bytes: dict[str, int]
    peak_ram_bytes: int
    peak_vram_bytes: int
    state_vram_bytes: int  # more, where a job's only GPU has them free: hidden states then stay there
    state_bytes: int  # hidden states kept on disk to resume from, both copies
    spill_bytes: int  # token buffers in a memory-mapped file
    disk_needed_bytes: int
    disk_free_bytes: int | None
    tensor_parallel: dict[str, str]  # "1", "2", "4", "8" -> "" or why not; none of GGUF
    ranks: int = 1  # peaks are one rank's
    wire_layer_bytes: int = 0  # that a rank receives for each layer
    wire_head_bytes: int = 0  # and for a head that is solved
    wire_state_bytes: int = 0  # that the first rank receives whenever hidden states are saved

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
    compute_bytes: int  # of a value that a layer computes with on the evaluation windows
    on_gpu: bool = False
    several_gpus: bool = False  # hidden states stay in host memory then
    out: Path | None = None
    dtype_of: Callable[[str], str] = lambda name: "BF16"  # stored dtype of what is not quantized
    source_dtype_of: Callable[[str], str] = lambda name: "BF16"
    source_spec: ModelSpec | None = None  # where `spec` is padded
    rotated: bool = False
    beside: Beside = NOTHING
    ranks: int = 1


def preflight(job: PlannedJob) -> Preflight:
    """Exact sizes and predicted peaks of a quantization; raises PlanError where groups do not divide."""
    spec, recipe, tokens = job.spec, job.recipe, job.tokens
    recipe.check(spec)
    files = stored_files(spec, recipe, job.dtype_of, job.beside)
    tensor_total, file_total = files.tensor_bytes, files.file_bytes
    source_total = sum(tensor_bytes(job.source_dtype_of(t.name), t.shape) for t in (job.source_spec or spec).tensors())
    wide = weight_bytes(spec, job.source_dtype_of, job.rotated)
    host, device = peak_bytes(spec, tokens, job.compute_bytes, job.on_gpu, job.ranks, wide)
    states = hidden_state_bytes(spec, tokens, job.compute_bytes)
    buffers = token_buffer_bytes(spec, tokens, job.compute_bytes, job.ranks)
    spill = buffers if buffers > SPILL_BYTES else 0
    solves = tokens.calibration_windows and recipe.outer_scheme(spec.outer_linears[-1]) is not None
    embedding, layer, head = (sum(t.nbytes for t in files.parts[k]) for k in (0, 1, -1))
    if spec.tie_word_embeddings:
        head += 2 * embedding  # read for the first hidden states, and for the divergence
    alone = job.on_gpu and not job.several_gpus and job.ranks == 1
    labels: dict[str, set[str]] = {}
    stage_bytes: dict[str, int] = {}
    for lin in spec.linears:
        labels.setdefault(lin.stage, set()).add(label_of(recipe.scheme_of(lin)))
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
        schemes={stage: ", ".join(sorted(found)) for stage, found in labels.items()},
        stage_bytes=stage_bytes,
        peak_ram_bytes=host,
        peak_vram_bytes=device,
        state_vram_bytes=gpu_state_bytes(spec, tokens) if alone else 0,
        state_bytes=2 * states,
        spill_bytes=spill,
        disk_needed_bytes=file_total + 2 * states + spill + _SLACK_BYTES,
        disk_free_bytes=free_disk(job.out) if job.out else None,
        tensor_parallel=sizes_of_recipe(spec, recipe),
        ranks=job.ranks,
        wire_layer_bytes=wire_layer_bytes(spec, tokens, layer, job.ranks),
        wire_head_bytes=wire_head_bytes(spec, tokens, head, job.ranks) if solves else 0,
        wire_state_bytes=states - states // job.ranks,
    )


def partial_directory(out: Path) -> Path:
    """Where a job works until it is whole; JobError for what names no directory that could be made."""
    if not out.name:
        raise JobError(f"{out}: no name for a new directory", hint="choose another directory")
    return out.with_name(out.name + ".partial")


def refuse_place(out: Path, source: Path) -> None:
    """Raise JobError when `out` is there already, or is the directory `source` or inside it."""
    place, source = resolved(out.absolute(), JobError), resolved(source)
    if place == source or source in place.parents:
        raise JobError(
            f"{out}: the output may not be the model's own directory or inside it", hint="choose another directory"
        )
    refuse_existing(out)


def refuse_existing(out: Path) -> None:
    """Raise JobError when `out` is there already."""
    if os.path.lexists(out):
        raise JobError(f"{out}: already exists", hint="choose another --output, or delete it")


def check_output(out: Path, resume: bool) -> None:
    """Raise JobError when the output or an unfinished job is in the way, or there is none to resume."""
    work = partial_directory(out)
    refuse_existing(out)
    if work.exists() and not resume:
        raise unfinished(work)
    if resume and not work.exists():
        raise JobError(f"{work}: no unfinished job there to resume", hint="leave --resume out")


def unfinished(work: Path) -> JobError:
    """The error of a job's directory that is in the way."""
    return JobError(f"{work}: an unfinished job is there", hint="go on with --resume, or delete it")


def weight_bytes(spec: ModelSpec, source_dtype_of: Callable[[str], str], rotated: bool) -> int:
    """Of a value of the source's layer, as it is held: float32 of a rotated one, otherwise as stored."""
    if rotated:
        return 4
    return max(tensor_bytes(source_dtype_of(f"{lin.name}.weight"), (1,)) for lin in spec.layer_linears(0))


def scratch_width(spec: ModelSpec) -> int:
    """Values a calibration token needs beside its states: inputs of the stage that ends a block, and 16-bit states
    after this block and those behind it but the last.
    """
    ends = [stage for stage in spec.architecture.stages if stage.adds]
    return max(spec.size(stage.inputs) + spec.hidden_size * (len(ends) - k) for k, stage in enumerate(ends, 1))


def _passes(spec: ModelSpec, tokens: Tokens) -> tuple[list[range], list[range]]:
    """Passes of the calibration windows, and of those among them that the 16-bit layers take too."""
    corrected = tokens.original(spec) // tokens.length
    return passes(tokens.calibration_windows, corrected), passes(corrected, corrected)


def _of_rank(spec: ModelSpec, tokens: Tokens, ranks: int) -> tuple[int, int, int, int]:
    """Windows of the rank that has the most, the first: calibration, original, evaluation, in float32."""
    evaluation = Share((range(tokens.evaluation_windows),), 0, ranks)
    calibration, original = (len(Share(tuple(p), 0, ranks).windows) for p in _passes(spec, tokens))
    return calibration, original, len(evaluation.windows), len(evaluation.up_to(NOISE_WINDOWS).windows)


def hidden_state_bytes(spec: ModelSpec, tokens: Tokens, compute_bytes: int, ranks: int = 1) -> int:
    """Hidden states of all tokens of a rank, in float32 for the noise floor too."""
    calibration, original, evaluation, few = _of_rank(spec, tokens, ranks)
    noise = few if compute_bytes < 4 else 0
    states = (calibration + original) * tokens.calibration_bytes + 4 * (2 * evaluation + noise)
    return states * tokens.length * spec.hidden_size


def token_buffer_bytes(spec: ModelSpec, tokens: Tokens, compute_bytes: int, ranks: int = 1) -> int:
    """Hidden states of all tokens of a rank, and the calibration tokens' scratch."""
    calibration = _of_rank(spec, tokens, ranks)[0] * tokens.length
    scratch = calibration * scratch_width(spec) * tokens.calibration_bytes
    return hidden_state_bytes(spec, tokens, compute_bytes, ranks) + scratch


def gpu_state_bytes(spec: ModelSpec, tokens: Tokens) -> int:
    """Hidden states of the calibration tokens and their scratch, where one GPU has room for them."""
    none = replace(tokens, calibration_windows=0)
    wide = tokens.calibration_bytes
    return token_buffer_bytes(spec, tokens, wide) - token_buffer_bytes(spec, none, wide)


def peak_bytes(
    spec: ModelSpec, tokens: Tokens, compute_bytes: int, on_gpu: bool, ranks: int = 1, weight_bytes: int = 2
) -> tuple[int, int]:
    """Predicted peak (host, GPU) of a rank in bytes; the layer count is not in it: one layer is held at a time.

    weight_bytes: of a value of the source's layer.
    """
    stages, width, hidden = spec.architecture.stages, _widest(spec), spec.hidden_size
    parameters = sum(lin.parameters for lin in spec.layer_linears(0))
    source = weight_bytes * parameters
    shared = not on_gpu and spec.intermediate_size <= WORKERS_UP_TO
    workers = min(MOST_WORKERS, PARTS // ranks) if shared else 1
    evaluation = _of_rank(spec, tokens, ranks)[2] * tokens.length
    batch = max(tokens.length, BATCH_TOKENS if on_gpu else cpu_batch_tokens(spec.intermediate_size))
    at_once = min(workers * batch, tokens.calibration + tokens.evaluation)
    part, states = at_once * width, 2 * at_once * hidden
    corrects = tokens.error_correction_share > 0
    triangle, residual = Triangle(width).size, width * hidden if corrects else 0
    sums = triangle + residual
    collecting = 4 * (workers * sums + (sums + residual) // ranks)  # parts; their sum, and the first half's residual
    between = 4 * (sums + (sums if ranks > 1 else 0) // ranks + 2 * residual // ranks)  # both halves' residuals
    squaring = 4 * (triangle + width**2)
    activations = tokens.calibration_bytes * (4 * part + states)
    calibrating = max(activations + collecting, between, squaring)
    solving = max(_solving(spec, stage, corrects, ranks) for stage in stages)
    written = 4 * parameters if on_gpu or compute_bytes < 4 else 0  # the layer as it was written, dequantized
    evaluating = written + compute_bytes * (parameters + 4 * part + states) + 4 * states
    if compute_bytes < 4:  # the noise floor's windows go through the source's layer
        few = min(at_once, _of_rank(spec, tokens, ranks)[3] * tokens.length)
        evaluating = max(evaluating, 4 * (parameters + 4 * few * width + 4 * few * hidden))
    head = 6 * 4 * 1024 * 4096 + 8 * 4096 * hidden + 8 * evaluation * hidden
    work = max(tokens.calibration_bytes * parameters + max(calibrating, solving), evaluating)
    buffers = token_buffer_bytes(spec, tokens, compute_bytes, ranks)
    outside = 2 * spec.vocab_size * hidden  # embedding or head, as written
    if on_gpu:
        return BASE_BYTES + buffers + max(2 * source, outside), max(work, head)  # the next layer is read meanwhile
    none = replace(tokens, calibration_windows=0)
    at_the_head = hidden_state_bytes(spec, none, compute_bytes, ranks) + head
    return BASE_BYTES + max(buffers + max(source + work, outside), at_the_head), 0


def wire_layer_bytes(spec: ModelSpec, tokens: Tokens, written: int, ranks: int) -> int:
    """Bytes that a rank receives for each layer: parts of sums, the sums, and codes of other ranks' rows.

    From the first rank it receives the layer as it was written too, `written` bytes.
    """
    if ranks == 1:
        return 0
    others = (ranks - 1) / ranks
    every, corrected = _passes(spec, tokens)
    total = float(written)
    for stage in spec.architecture.stages:
        linears = spec.stage_linears(0, stage)
        both = stage.adds and corrected
        if tokens.calibration_windows:
            triangle = Triangle(spec.size(stage.inputs)).size
            total += _summed(triangle, every, 1 + len(corrected) if both else 1, ranks)
            total += others * sum(lin.parameters for lin in linears)
        if both:
            total += _summed(spec.size(stage.inputs) * spec.hidden_size, corrected, len(corrected), ranks)
    return round(total)


def wire_head_bytes(spec: ModelSpec, tokens: Tokens, written: int, ranks: int) -> int:
    """The same for a head that is solved; `written` bytes are the head's, as often as it is read, and the last norm's.
    """
    if ranks == 1:
        return 0
    every, _ = _passes(spec, tokens)
    if spec.tie_word_embeddings:
        every = [range(head_windows(spec, tokens.calibration_windows, tokens.length))]
    codes = (ranks - 1) / ranks * spec.vocab_size * spec.hidden_size
    return round(written + _summed(Triangle(spec.hidden_size).size, every, 1, ranks) + codes)


def _summed(values: int, over: list[range], totals: int, ranks: int) -> float:
    """Bytes of a float32 sum over passes that a rank receives: of each part that another rank made a piece, of each
    total the pieces of all others.
    """
    turns = sum(-(-len(parts_of(windows)) // ranks) for windows in over)  # in each, one part of every rank
    return 4 * values * (ranks - 1) / ranks * (turns + totals)


def sensitivity_rows(rows: int) -> range:
    """Rows, of a linear with so many, whose errors a sensitivity is measured with: about SENSITIVITY_ROWS.

    They are evenly spaced. The step is odd: heads are powers of two wide, and an even step would meet the same few
    dimensions of each.
    """
    step = max(1, rows // SENSITIVITY_ROWS)
    step -= 1 - step % 2
    return range(step // 2, rows, step)


def sensitivity_bytes(
    spec: ModelSpec,
    length: int,
    compute_bytes: int,
    on_gpu: bool,
    schemes: int = len(GROUP_SIZES),
    ranks: int = 1,
    format: str = "gptq",
    weight_bytes: int = 2,
) -> tuple[int, int]:
    """Predicted peak (host, GPU) in bytes of measuring sensitivities on windows of `length` tokens; see peak_bytes.

    schemes: that errors are solved of, in bfloat16. weight_bytes: of a value of the source's layer.
    """
    hidden, probed = spec.hidden_size, PROBE_WINDOWS * PROBE_TOKENS // ranks
    parameters = sum(lin.parameters for lin in spec.layer_linears(0))
    outputs = sum(lin.out_features for lin in spec.layer_linears(0))
    solved = {lin.kind: len(sensitivity_rows(lin.out_features)) for lin in spec.layer_linears(0)}  # rows
    errors = sum(solved[lin.kind] * lin.in_features for lin in spec.layer_linears(0))
    largest = max(solved[lin.kind] * lin.in_features for lin in spec.layer_linears(0))
    states = (SOLVER_WINDOWS * length // ranks + probed) * hidden * compute_bytes
    passing = 16 * _widest(spec) + 24 * hidden + outputs + (schemes + 1) * sum(solved.values())  # a token
    backward = compute_bytes * (parameters + largest + BACKWARD_TOKENS * passing)
    head = gradients_bytes(spec, ranks)
    work = max(errors_bytes(spec, length, compute_bytes), backward)
    kept = 4 * Triangle(_widest(spec)).size  # the Hessian, from which each scheme takes a copy
    gradients = 8 * SAMPLES * probed * hidden  # twice
    held = weight_bytes * parameters + schemes * 2 * errors + gradients
    if get_format(format).outer and spec.tie_word_embeddings:  # errors of the embedding's rows that tokens name
        looked_up = 4 * schemes * PROBE_WINDOWS * PROBE_TOKENS * hidden
        held, states = held + looked_up, states + looked_up
    if on_gpu:
        return BASE_BYTES + max(states, held + kept), max(work, head)
    return BASE_BYTES + max(states + head, held + kept + work), 0


def gradients_bytes(spec: ModelSpec, ranks: int = 1) -> int:
    """Predicted peak in bytes, on the device, of drawing labels at the head and of the gradients behind the last layer.

    The most is held in the last norm's backward pass, or in few tokens' while logits of a slice of the head are read.
    """
    states, rows = 4 * PROBE_WINDOWS * PROBE_TOKENS // ranks * spec.hidden_size, 4 * 4096 * spec.hidden_size
    logits = 4 * 4096 * (PROBE_WINDOWS // PARTS * PROBE_TOKENS)  # of one part's tokens
    return rows + max((3 * SAMPLES + 4) * states + 2 * logits, (SAMPLES + 3) * states + 4 * logits)


def errors_bytes(spec: ModelSpec, length: int, compute_bytes: int) -> int:
    """Predicted peak in bytes, on the device, of solving a layer for the errors that sensitivities are read from."""
    layer, width = spec.layer_linears(0), _widest(spec)
    at_once = min(BATCH_TOKENS, SOLVER_WINDOWS // PARTS * length)  # of one part
    collecting = 8 * Triangle(width).size + compute_bytes * at_once * (7 * width + 4 * spec.hidden_size)
    solving = 0
    for stage in spec.architecture.stages:
        columns = spec.size(stage.inputs)
        weights = sum(len(sensitivity_rows(lin.out_features)) * columns for lin in spec.stage_linears(0, stage))
        more = max(9 * weights, 4 * Triangle(columns).size)  # errors and codes; the Hessian before it is written out
        solving = max(solving, 4 * columns**2 + 4 * weights + more)
    return compute_bytes * sum(lin.parameters for lin in layer) + max(collecting, solving)


def _widest(spec: ModelSpec) -> int:
    """Columns of the widest stage that adds to the hidden states: down's inputs, the FFN."""
    return max(spec.size(stage.inputs) for stage in spec.architecture.stages if stage.adds)


def _solving(spec: ModelSpec, stage: Stage, corrects: bool, ranks: int) -> int:
    """The Hessian; float32 weights; and of a rank's rows their errors twice while they are permuted, and uint8 codes.

    corrects: two sums of residuals too.
    """
    parameters = sum(lin.parameters for lin in spec.stage_linears(0, stage))
    own = 9 * parameters + (8 * parameters if corrects and stage.adds else 0)
    return 4 * spec.size(stage.inputs) ** 2 + 4 * parameters + own // ranks
