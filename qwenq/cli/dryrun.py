"""`qwenq quantize --dry-run`: what a job would write and need, what that assumes, and what this machine lacks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from qwenq.cli.console import out, print_json, warn
from qwenq.cli.models import device_names, pick_calibration_dtype, pick_compute_dtype, stored_dtypes
from qwenq.cli.recipe import Wanted, prediction_line, recipe_json, recipe_table
from qwenq.io.safetensors import FLOATS, fingerprint
from qwenq.machine import total_memory
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.preflight import (
    DEFAULT_WINDOWS,
    MOST_WORKERS,
    SET_TOKENS,
    WORKERS_UP_TO,
    PlannedJob,
    Preflight,
    Tokens,
    chosen_pull,
    preflight,
    sensitivity_bytes,
)
from qwenq.planning.budget import Budgeted
from qwenq.planning.rig import sees_gpu
from qwenq.units import format_gb

DEFAULT_EVALUATION_WINDOWS = 20
_FILES = (".txt", ".md", ".jsonl", ".json", ".parquet", ".npy", ".gz")


@dataclass(frozen=True)
class Asked:
    """Options of `qwenq quantize` that decide what a job needs, but for its bits."""

    model: str
    output: Path
    calibration: str
    num_samples: int | None
    sequence_length: int
    seed: int
    eval_text: str
    eval_samples: int | None
    method: str
    pull: float | None
    pull_share: float
    device: str
    dtype: str
    compute_dtype: str
    calibration_dtype: str


@dataclass(frozen=True)
class Assumed:
    """What sizes and peaks count with."""

    calibration_windows: int
    evaluation_windows: int
    window_tokens: int
    counted: bool  # in the text itself, by the model's tokenizer
    original_windows: int  # that o and down are pulled by
    calibration_dtype: str
    compute_dtype: str
    device: str
    lanes: int  # at most, on a CPU

    def line(self, calibration: str) -> str:
        about = "" if self.counted else "about "
        parts = [f"{self.evaluation_windows} evaluation windows in {self.compute_dtype}"]
        if self.calibration_windows:
            pulls = f"o and down pulled, by {self.original_windows} of them"
            parts = [
                f"{about}{self.calibration_windows} calibration windows of {self.window_tokens} tokens of "
                f"{calibration} in {self.calibration_dtype}",
                pulls if self.original_windows else "nothing pulled",
                *parts,
            ]
        lanes = f", up to {self.lanes} lanes" if self.lanes > 1 else ""
        return f"assumed: {'; '.join(parts)}; on {self.device}{lanes}"


def dry_run_of(asked: Asked, wanted: Wanted, json: bool) -> None:
    """Print sizes, peaks, disk and warnings; raises JobError where the disk of a given --output is too small."""
    source_spec, source_dtype_of = stored_dtypes(asked.model)
    spec = wanted.widened(source_spec)
    dtype_of = source_dtype_of if asked.dtype == "auto" else lambda name: FLOATS[asked.dtype]
    local = Path(asked.model).is_dir()
    table = wanted.table(spec, fingerprint(Path(asked.model)) if local else "") if wanted.mixed else None
    wanted.check_method(asked.method, table)
    chosen = wanted.choose(spec, table, dtype_of) if wanted.mixed else None
    recipe = chosen.recipe if chosen else wanted.uniform()
    windows, held_out, length, counted, warnings = _windows(asked, source_spec)
    pull = chosen_pull(asked.pull, recipe, spec, windows=windows, length=length, share=asked.pull_share)
    on_gpu = sees_gpu() if asked.device == "auto" else device_names(asked.device) != ["cpu"]
    place = "cuda" if on_gpu else "cpu"
    calibration_dtype = pick_calibration_dtype(asked.calibration_dtype, place)
    compute_dtype = pick_compute_dtype(asked.compute_dtype, place)
    share = asked.pull_share if pull else 0.0
    tokens = Tokens(windows, held_out, length, 2 if calibration_dtype == "bfloat16" else 4, share)
    compute_bytes = 2 if compute_dtype == "bfloat16" else 4
    check = preflight(
        PlannedJob(
            spec,
            recipe,
            tokens,
            compute_bytes=compute_bytes,
            on_gpu=on_gpu,
            out=asked.output if asked.output != Path() else Path.cwd() / "out",
            dtype_of=dtype_of,
            source_dtype_of=source_dtype_of,
            source_spec=source_spec,
        )
    )
    measuring = None
    if wanted.budgeted and table is None and windows:
        measuring = sensitivity_bytes(spec, length, compute_bytes, on_gpu, bool(wanted.asymmetric))
    workers = 1 if on_gpu or spec.intermediate_size > WORKERS_UP_TO else MOST_WORKERS
    device = asked.device if on_gpu and asked.device != "auto" else place
    original = tokens.original(spec) // length
    assumed = Assumed(windows, held_out, length, counted, original, calibration_dtype, compute_dtype, device, workers)
    warnings += _lacking(check, measuring, asked.output == Path())
    if chosen and wanted.save_recipe is not None:
        from qwenq.planning.recipefile import save_recipe

        save_recipe(wanted.save_recipe, spec, chosen)
    if json:
        more: dict[str, Any] = {"device": place, "assumed": asdict(assumed), "warnings": warnings}
        more |= {"source_download_bytes": 0 if local else check.source_tensor_bytes}
        more |= {"sensitivity_ram_bytes": measuring[0], "sensitivity_vram_bytes": measuring[1]} if measuring else {}
        more |= {"recipe": recipe_json(chosen)} if chosen else {}
        print_json(check.to_json() | more)
        return
    out.print(_table(check, measuring, local))
    out.print(assumed.line(asked.calibration), soft_wrap=True, markup=False)
    if chosen:
        _print_recipe(spec, chosen)
    for line in warnings:
        warn(line)
    if asked.output != Path():  # without an output directory the disk it will be on is a guess
        check.check_disk(asked.output)


def _windows(asked: Asked, spec: ModelSpec) -> tuple[int, int, int, bool, list[str]]:
    """Windows of calibration and of evaluation, their length, whether they were counted, and what to warn of."""
    calibrated = asked.method == "gptq"
    most, most_held = asked.num_samples or DEFAULT_WINDOWS, asked.eval_samples or DEFAULT_EVALUATION_WINDOWS
    if (Path(asked.model) / "tokenizer.json").is_file():
        count = _counter(asked, spec)
        windows, length, counted = 0, asked.sequence_length, True
        if calibrated:
            windows, length, counted = count(asked.calibration, most, length, asked.seed)
        held_out, _, _ = count(asked.eval_text, most_held, length, None)
    else:
        length, counted = asked.sequence_length, False

        def known(name: str, most: int) -> int:
            return min(most, max(1, SET_TOKENS[name] // length)) if name in SET_TOKENS else most

        windows, held_out = known(asked.calibration, most) if calibrated else 0, known(asked.eval_text, most_held)
    warnings = []
    for option, name, wanted, found in (
        ("--num-samples", asked.calibration, asked.num_samples if calibrated else None, windows),
        ("--eval-samples", asked.eval_text, asked.eval_samples, held_out),
    ):
        if wanted is not None and found < wanted:
            about = "" if counted else "about "
            warnings.append(f"{option} {wanted}: {name} has {about}{found} windows of {length} tokens")
    return windows, held_out, length, counted, warnings


def _counter(asked: Asked, spec: ModelSpec) -> Callable[[str, int, int, int | None], tuple[int, int, bool]]:
    """A function that counts a text's windows, `most` at most, as a job draws them; sets of the hub are not fetched."""
    from qwenq.text.calibration import load_windows
    from qwenq.text.tokens import ModelTokenizer

    tokenizer = ModelTokenizer(Path(asked.model))

    def count(name: str, most: int, length: int, seed: int | None) -> tuple[int, int, bool]:
        if name not in SET_TOKENS and not name.endswith(_FILES):
            return most, length, False
        ids = load_windows(name, tokenizer, spec, length=length, count=None, seed=seed, up_to=most).ids
        return ids.shape[0], ids.shape[1], True

    return count


def _lacking(check: Preflight, measuring: tuple[int, int] | None, placeless: bool) -> list[str]:
    """What this machine has too little of, a line each; of disk only where no --output says which is meant."""
    lines = []
    ram, peak = total_memory(), max(check.peak_ram_bytes, measuring[0] if measuring else 0)
    if ram is not None and peak > ram:
        lines.append(f"the predicted peak of memory is {format_gb(peak)}, this machine has {format_gb(ram)}")
    free, needed = check.disk_free_bytes, check.disk_needed_bytes
    if placeless and free is not None and needed > free:
        lines.append(f"{format_gb(needed)} of disk are needed, {format_gb(free)} are free here: choose another with -o")
    return lines


def _table(check: Preflight, measuring: tuple[int, int] | None, local: bool) -> Table:
    table = Table(title=f"dry run: {escape(check.model)} to {check.scheme} ({check.format})")
    table.add_column("what")
    table.add_column("", justify="right")
    for unit, label in check.units.items():
        table.add_row(f"{unit}: {label}", format_gb(check.unit_bytes[unit]))
    table.add_row("all tensors", f"{format_gb(check.tensor_bytes)} ({check.tensor_bytes} bytes)")
    table.add_row("files", f"{format_gb(check.file_bytes)} ({check.file_bytes} bytes)")
    table.add_row("source tensors", format_gb(check.source_tensor_bytes))
    table.add_row("bits per linear weight", f"{check.bits_per_linear_weight:.3f}")
    peaks = [("", check.peak_ram_bytes, check.peak_vram_bytes)]
    if measuring:
        peaks.append((", measuring sensitivities", *measuring))
    for what, host, gpu in peaks:
        table.add_row(f"peak memory, predicted{what}", format_gb(host))
        if gpu:
            table.add_row(f"peak memory of a GPU, predicted{what}", format_gb(gpu))
    table.add_row("disk needed (hidden states included)", format_gb(check.disk_needed_bytes))
    if not local:
        table.add_row("and on top the source's download", format_gb(check.source_tensor_bytes))
    table.add_row("disk free", format_gb(check.disk_free_bytes or 0))
    for ranks, reason in check.tensor_parallel.items():
        table.add_row(f"tensor parallel {ranks}", reason or "yes")
    return table


def _print_recipe(spec: ModelSpec, chosen: Budgeted) -> None:
    out.print(recipe_table(spec, chosen))
    out.print(prediction_line(chosen), soft_wrap=True)
