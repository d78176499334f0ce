"""The dry run: sizes and peaks of a quantization, their assumptions, and shortages of this machine. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import UsageError
from qwenq.formats.base import get_format, label_of
from qwenq.io.safetensors import fingerprint
from qwenq.machine import total_memory
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.config import (
    DEFAULT_EVALUATION_WINDOWS,
    DEFAULT_WINDOWS,
    MOST_WORKERS,
    PARTS,
    SET_TOKENS,
    WORKERS_UP_TO,
    QuantizeConfig,
    Resolution,
    Windows,
    device_names,
    of_builtin,
    tokens_of,
)
from qwenq.pipeline.container import containers
from qwenq.pipeline.preflight import PlannedJob, Preflight, preflight, sensitivity_bytes, weight_bytes
from qwenq.pipeline.shares import refuse_few
from qwenq.pipeline.source import source_shapes
from qwenq.planning.budget import Budgeted
from qwenq.planning.rig import sees_gpu
from qwenq.planning.sensitivity import OUTER, solved_schemes
from qwenq.planning.tensor_parallel import lines_of_recipe
from qwenq.units import format_gb

_TEXT_FILES = (".txt", ".md", ".jsonl", ".json", ".parquet", ".npy", ".gz")


@dataclass(frozen=True)
class Assumed:
    """What sizes and peaks count with."""

    calibration_windows: int
    builtin_windows: int  # of these, that the built-in set replaces
    evaluation_windows: int
    window_tokens: int
    counted: bool  # in the text itself, by the model's tokenizer
    original_windows: int  # that o_proj and down_proj are corrected by
    calibration_dtype: str
    compute_dtype: str
    device: str
    workers: int  # of a CPU, at most
    rotated: bool | None  # hidden states; None where the model's activations decide it

    def line(self, calibration: str) -> str:
        """In words; calibration: the text's name."""
        about = "" if self.counted else "about "
        parts = [f"{self.evaluation_windows} evaluation windows in {self.compute_dtype}"]
        if self.calibration_windows:
            corrected = f"error correction of o and down from {self.original_windows} of them"
            parts = [
                f"{about}{self.calibration_windows} calibration windows of {self.window_tokens} tokens of "
                f"{calibration} in {self.calibration_dtype}{of_builtin(self.builtin_windows)}",
                corrected if self.original_windows else "no error correction",
                *parts,
            ]
        workers = f", up to {self.workers} workers" if self.workers > 1 else ""
        if self.rotated is not False:
            parts.append(("massive activations, so " if self.rotated is None else "") + "rotated hidden states")
        return f"assumed: {'; '.join(parts)}; on {self.device}{workers}"


@dataclass(frozen=True)
class DryRun:
    """The answer: exact sizes, predicted peaks, and the assumptions behind them. Bytes."""

    preflight: Preflight
    spec: ModelSpec  # as written, FFN padded
    budgeted: Budgeted | None  # the mixture, if one was asked for
    sensitivity_bytes: tuple[int, int] | None  # peaks of measuring them, host and GPU; None when they are not measured
    assumed: Assumed
    tensor_parallel: tuple[str, ...]  # `2, 4: yes`, or why not; none of GGUF
    local: bool  # the source is on this machine
    warnings: tuple[str, ...]
    network: str = ""  # between ranks: 10gbps

    def wire_s(self, count: int) -> float:
        """Seconds that so many bytes take a rank that has a link of the network to itself."""
        return 8 * count / network_bits(self.network)

    def to_json(self) -> dict[str, Any]:
        check = self.preflight
        more: dict[str, Any] = {
            "device": self.assumed.device.partition(":")[0],
            "assumed": asdict(self.assumed),
            "warnings": list(self.warnings),
            "source_download_bytes": 0 if self.local else check.source_tensor_bytes,
        }
        if self.sensitivity_bytes:
            host, device = self.sensitivity_bytes
            more |= {"sensitivity_ram_bytes": host, "sensitivity_vram_bytes": device}
        if self.network:
            more["network"] = self.network
            more["wire_layer_s"] = self.wire_s(check.wire_layer_bytes)
            more["wire_head_s"] = self.wire_s(check.wire_head_bytes)
        if self.budgeted:
            more["recipe"] = recipe_json(self.budgeted)
        return check.to_json() | more


def network_bits(network: str) -> float:
    """Bits a second of a network as its cards are sold: 1gbps, 10gbps, 25gbps."""
    found = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)gbps", network.lower())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"--network {network[:40]}: wanted a speed", hint="for instance 10gbps")
    return 1e9 * float(found[1])


def dry_run(
    model: str, config: QuantizeConfig, output: Path | None = None, *, ranks: int = 1, network: str = ""
) -> DryRun:
    """What quantizing `model` as configured comes to. Reads headers, and the texts when the tokenizer is here.

    output: where it would be written, whose disk is asked; None for the current directory's. ranks: that would do it;
    memory is one rank's. network: what they are connected by, to say how long it takes.
    """
    _check_ranks(ranks, network)
    source = source_shapes(model)
    on_gpu = sees_gpu() if config.device == "auto" else device_names(config.device) != ["cpu"]
    place = "cuda" if on_gpu else "cpu"
    device = config.device if on_gpu and config.device != "auto" else place
    found = Resolution.of(
        config, source.spec, source.dtype_of, device=device,
        fingerprint=fingerprint(source.directory) if source.directory and config.mixed else "",
        beside=containers(source, config),
    )  # fmt: skip
    windows, warnings = _windows(found.config, model, source.spec)
    refuse_few(ranks, calibration=windows.calibration or None, evaluation=windows.evaluation)
    settled = found.settled(windows)
    tokens = tokens_of(settled, windows)
    check = preflight(
        PlannedJob(
            found.spec,
            found.recipe,
            tokens,
            compute_bytes=found.compute_bytes,
            on_gpu=on_gpu,
            several_gpus="," in device,
            out=output or Path.cwd() / "out",
            dtype_of=found.dtype_of,
            source_dtype_of=source.dtype_of,
            rotated=found.config.rotate is not False,
            source_spec=source.spec,
            beside=found.beside(found.recipe),
            ranks=ranks,
        )
    )
    measuring = None
    if found.measures(windows):
        schemes = solved_schemes(found.spec, config.format, bool(config.asymmetric))
        shape = windows.length, found.compute_bytes, on_gpu
        wide = weight_bytes(source.spec, source.dtype_of, bool(config.rotate))
        measuring = sensitivity_bytes(found.spec, *shape, schemes, ranks, config.format, wide)
    local = source.directory is not None
    tokenized = source.directory is None or (source.directory / "tokenizer.json").is_file()
    builtin = found.config.builtin_windows(windows.calibration, tokenizer=tokenized)
    assumed = Assumed(
        calibration_windows=windows.calibration,
        builtin_windows=min(builtin, SET_TOKENS["builtin"] // windows.length),
        evaluation_windows=windows.evaluation,
        window_tokens=windows.length,
        counted=windows.counted,
        original_windows=tokens.original(found.spec) // windows.length,
        calibration_dtype=settled.calibration_dtype,
        compute_dtype=settled.compute_dtype,
        device=device,
        workers=1 if on_gpu or found.spec.intermediate_size > WORKERS_UP_TO else min(MOST_WORKERS, PARTS // ranks),
        rotated=settled.rotate,
    )
    if found.config.mixture:
        warnings += get_format(config.format).notes(found.config.mixture, found.spec)
    warnings += _lacking(check, measuring, output is None)
    cut = tuple(lines_of_recipe(found.spec, found.recipe))
    warnings = [*source.notes, *warnings, *filter(None, [settled.idle_share])]
    return DryRun(check, found.spec, found.budgeted, measuring, assumed, cut, local, tuple(warnings), network)


def _check_ranks(ranks: int, network: str) -> None:
    """Raise UsageError for a number of ranks that windows cannot be shared among, and a network between none."""
    if ranks < 1 or ranks > PARTS or PARTS % ranks:
        raise UsageError(f"--ranks {ranks}: wanted 1, 2, 4 or {PARTS}")
    if network:
        network_bits(network)
        if ranks == 1:
            raise UsageError("--network is between ranks, and there is one", hint="--ranks 2, 4 or 8")


def recipe_json(found: Budgeted) -> dict[str, Any]:
    """The recipe, its prediction and its bound."""
    outer = {name: label_of(scheme) for (layer, name), scheme in found.choice.items() if layer == OUTER}
    return {
        "target": found.target,
        "predicted_kl": found.predicted_kl,
        "bound_kl": found.bound_kl,
        "sensitivity": found.sensitivity,
        "file_bytes": found.file_bytes,
        "bits_per_linear_weight": found.bits_per_linear_weight,
        "layers": [
            {stage: label_of(scheme) for (_, stage), scheme in row}
            for layer, row in itertools.groupby(found.choice.items(), key=lambda item: item[0][0])
            if layer != OUTER
        ],
    } | ({"outer": outer} if outer else {})


def _windows(config: QuantizeConfig, model: str, spec: ModelSpec) -> tuple[Windows, list[str]]:
    """Windows that a job would read, and a warning where these are fewer than asked for."""
    calibrated = config.solver == "gptq"
    most = config.num_samples or DEFAULT_WINDOWS
    most_held = config.eval_samples or DEFAULT_EVALUATION_WINDOWS
    tokenizers = ("tokenizer.json", "vocab.json", "tokenizer.model")
    tokenized = any((Path(model) / name).is_file() for name in tokenizers)
    count = _counter(Path(model), spec, config.strict) if tokenized else _estimated
    windows, length, counted = 0, config.sequence_length, tokenized
    if calibrated:
        windows, length, counted = count(config.calibration, most, length, config.seed)
    held_out, _, _ = count(config.eval_text, most_held, length, None)
    warnings = []
    for option, name, wanted, found in (
        ("--num-samples", config.calibration, config.num_samples if calibrated else None, windows),
        ("--eval-samples", config.eval_text, config.eval_samples, held_out),
    ):
        if wanted is not None and found < wanted:
            about = "" if counted else "about "
            warnings.append(f"{option} {wanted}: {name} has {about}{found} windows of {length} tokens")
    return Windows(windows, held_out, length, counted), warnings


def _estimated(name: str, most: int, length: int, seed: int | None) -> tuple[int, int, bool]:
    """A text's windows without a tokenizer: sets that are known have about as many tokens whatever the model."""
    known = max(1, SET_TOKENS[name] // length) if name in SET_TOKENS else most
    return min(most, known), length, False


def _counter(
    directory: Path, spec: ModelSpec, strict: bool
) -> Callable[[str, int, int, int | None], tuple[int, int, bool]]:
    """A function that counts a text's windows, `most` at most, as a job draws them; sets of the hub are not fetched.

    It returns their number, their length, and whether the text itself was counted.
    """
    from qwenq.text.calibration import load_windows
    from qwenq.text.tokens import ModelTokenizer

    tokenizer = ModelTokenizer(directory)

    def count(name: str, most: int, length: int, seed: int | None) -> tuple[int, int, bool]:
        if name not in SET_TOKENS and not name.endswith(_TEXT_FILES):
            return most, length, False
        ids = load_windows(name, tokenizer, spec, length=length, count=None, seed=seed, up_to=most, strict=strict).ids
        return ids.shape[0], ids.shape[1], True

    return count


def _lacking(check: Preflight, measuring: tuple[int, int] | None, placeless: bool) -> list[str]:
    """What this machine has too little of, a line each; of disk only where no output says which is meant."""
    lines = []
    ram, peak = total_memory(), max(check.peak_ram_bytes, measuring[0] if measuring else 0)
    if ram is not None and peak > ram:
        lines.append(f"the predicted peak of memory is {format_gb(peak)}, this machine has {format_gb(ram)}")
    free, needed = check.disk_free_bytes, check.disk_needed_bytes
    if placeless and free is not None and needed > free:
        lines.append(f"{format_gb(needed)} of disk are needed, {format_gb(free)} are free here: choose another with -o")
    return lines
