"""Manifests of finished checkpoints, read as hostile input: a wrong type is an error that names the place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from qwenq.checkpoint.manifest import MANIFEST_NAME, read_manifest
from qwenq.errors import CheckpointError
from qwenq.io.fields import Fields
from qwenq.io.gguf import is_gguf
from qwenq.io.json import resolved, shown
from qwenq.results import DriftReport

MAX_LAYERS = 1000
_LONG_NAME = 16  # longer ones become letters, so that plots can carry them


@dataclass(frozen=True)
class LayerErrors:
    """One decoder layer: output error in dB by kind of linear (None without calibration), and of the stream."""

    layer: int
    error_db: Mapping[str, float | None]
    schemes: tuple[str, ...]
    fallbacks: tuple[str, ...]  # names of linears that were rounded instead
    stream_error_db: float | None


@dataclass(frozen=True)
class Run:
    """One finished quantization, perhaps converted since. `job` and `host` are the manifest's own, for provenance."""

    name: str
    label: str  # short, for plots
    directory: Path
    model: str
    method: str
    drift: DriftReport
    layers: tuple[LayerErrors, ...]
    file_bytes: int
    bits_per_linear_weight: float
    warnings: tuple[str, ...]
    job: Mapping[str, Any]
    host: Mapping[str, Any]
    converted: bool = False  # `host` is of the conversion then, all else of the quantization

    @property
    def scheme_counts(self) -> dict[str, int]:
        """Linears by scheme, the most frequent first."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            for scheme in layer.schemes:
                counts[scheme] = counts.get(scheme, 0) + 1
        return {name: counts[name] for name in sorted(counts, key=lambda name: -counts[name])}

    @property
    def scheme(self) -> str:
        """`4-bit g64`, or `mixed`."""
        counts = self.scheme_counts
        return "mixed" if len(counts) > 1 else next(iter(counts), "16-bit")

    @property
    def fallbacks(self) -> tuple[str, ...]:
        return tuple(name for layer in self.layers for name in layer.fallbacks)


class NoDrift(CheckpointError):
    """A manifest of a conversion whose source had none."""


def load_runs(directories: Sequence[Path], leave_out: Callable[[str], None] | None = None) -> tuple[Run, ...]:
    """The runs in these checkpoint directories, or of GGUF files in them, in this order; CheckpointError for no run.

    `leave_out` is told each one without a drift, which is then left out; without it that is an error too.
    """
    directories = [path.parent if is_gguf(path) else path for path in directories]
    places = [resolved(path) for path in directories]
    if len(set(places)) < len(places):
        raise CheckpointError("the same directory was given twice", hint="name each run once")
    depth, names = 1, [path.name for path in places]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in places]
    runs = []
    for path, name in zip(directories, names, strict=True):
        try:
            runs.append(_load_run(path, shown(name, 60)))
        except NoDrift as error:
            if leave_out is None or (not runs and path == directories[-1]):
                raise
            leave_out(f"{error.message}: left out")
    return label_runs(runs)


def label_runs(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs with short labels: their names, or these without a common beginning, where all are short; else letters."""
    names = [run.name for run in runs]
    same = len(list(takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))))
    cut = max(names[0].rfind(mark, 0, same) for mark in "-_. ") + 1 if len(names) > 1 else 0
    for labels in (names, [name[cut:] for name in names]):
        if all(0 < len(label) <= _LONG_NAME for label in labels):
            return tuple(replace(run, label=label) for run, label in zip(runs, labels, strict=True))
    return tuple(replace(run, label=_letter(k)) for k, run in enumerate(runs))


def _letter(k: int) -> str:
    return chr(65 + k) if k < 26 else _letter(k // 26 - 1) + chr(65 + k % 26)


def _load_run(directory: Path, name: str) -> Run:
    if not directory.is_dir():
        raise CheckpointError(f"{shown(str(directory))}: no such directory", hint="give the output of `qwenq quantize`")
    manifest, findings = read_manifest(directory)
    run = read_run(manifest, name, directory)
    return replace(run, warnings=(*map(str, findings), *run.warnings))


def read_run(manifest: Mapping[str, Any], name: str, directory: Path) -> Run:
    """A manifest's figures, checked; CheckpointError names the first one of a wrong type.

    A conversion keeps the codes: its drift and errors are those it hands on. NoDrift where its source had none.
    """
    found = Fields(manifest, f"{name}: {MANIFEST_NAME}", "")
    converted = "drift" not in manifest
    if converted and not (isinstance(origin := manifest.get("made_from"), Mapping) and "layers" in origin):
        raise NoDrift(
            f"{found.file}: no drift in it, nor errors by layer",
            hint="it was converted from a checkpoint without them: report that one, or `qwenq eval` this one",
        )
    made = found.sub("made_from") if converted else found
    job, host = made.sub("job"), found.sub("run")
    own = {key: found.sub("job").value.get(key) for key in ("convert", "format")} if converted else {}
    layers = made.objects("layers", MAX_LAYERS)
    options = job.sub("options")
    return Run(
        name=name,
        label=name,
        directory=directory,
        model=job.text("model"),
        method=options.text("method"),
        drift=_drift(made.sub("drift")),
        layers=tuple(_layer(layer) for layer in layers),
        file_bytes=found.whole("file_bytes"),
        bits_per_linear_weight=found.number("bits_per_linear_weight"),
        warnings=tuple(made.texts("warnings")),
        job={**job.value, **own},
        host=host.value,
        converted=converted,
    )


def _drift(found: Fields) -> DriftReport:
    """The measured drift; NaN for anything that was not a number."""
    read: dict[str, Callable[[str], Any]] = {
        "Interval": found.interval, "float": found.number, "int": found.whole, "str": found.text,
    }  # fmt: skip
    return DriftReport(**{field.name: read[str(field.type)](field.name) for field in fields(DriftReport)})


def _layer(found: Fields) -> LayerErrors:
    linears = found.objects("linears", 100)
    return LayerErrors(
        layer=found.whole("layer", below=MAX_LAYERS),
        error_db={lin.text("name").rsplit(".", 1)[-1]: lin.optional_number("error_db") for lin in linears},
        schemes=tuple(lin.text("scheme") for lin in linears),
        fallbacks=tuple(lin.text("name") for lin in linears if lin.text("fallback")),
        stream_error_db=found.optional_number("stream_error_db"),
    )
