"""From runs to a document, and from a document to files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq import __version__
from qwenq.errors import PlanError
from qwenq.io.durable import write_bytes
from qwenq.io.json import shown
from qwenq.report.benchmarks import Benchmark, Measurement
from qwenq.report.document import Code, Document
from qwenq.report.html import to_html
from qwenq.report.losses import layers_section, size_section, summary_section, warnings_section
from qwenq.report.machines import engine_named, load, loaders_section, memory_section, rigs_named, rigs_section
from qwenq.report.provenance import cost_section, notes_section, provenance_section
from qwenq.report.runs import Run
from qwenq.report.writing import to_markdown
from qwenq.results import finite_json


@dataclass(frozen=True)
class Extras:
    """Contents of a report besides its runs."""

    title: str = ""
    command: str = ""  # that made the runs
    notes: tuple[str, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    left_out: tuple[str, ...] = ()  # lines on checkpoints that were given and have nothing to report
    rigs: tuple[str, ...] = ()  # none: common ones
    engine: str = "qwenq"


def compose(runs: Sequence[Run], extras: Extras) -> Document:
    """The report of these runs, in the order given; UsageError for a rig or an engine that nobody knows."""
    engine, rigs = engine_named(extras.engine), rigs_named(extras.rigs)
    found = [load(run, extras.engine) for run in runs]
    loaded = [one for one in found if not isinstance(one, str)]
    missing = [one for one in found if isinstance(one, str)]
    models = list(dict.fromkeys(run.model for run in runs))
    count = "1 variant" if len(runs) == 1 else f"{len(runs)} variants"
    sections = [warnings_section(runs, extras.left_out), summary_section(runs)]
    if extras.notes:
        sections.append(notes_section(extras.notes))
    sections += [
        size_section(runs, extras.benchmarks),
        layers_section(runs),
        rigs_section(loaded, missing, rigs, engine),
        memory_section(loaded, engine, extras.measurements),
        loaders_section(loaded, missing),
        cost_section(runs),
        provenance_section(runs, extras.command),
    ]
    return Document(
        title=shown(extras.title, 200) or f"{', '.join(models)}, quantized: {count}",
        subtitle=("Written by qwenq ", __version__, " from the runs’ own ", Code("qwenq-manifest.json"), "."),
        sections=tuple(sections),
        data={"qwenq": __version__, "runs": [_figures(run) for run in runs]},
    )


def write_report(document: Document, page: Path, markdown: Path) -> None:
    """Write both files, each whole or not at all; PlanError when that fails."""
    for path, text in ((page, to_html(document)), (markdown, to_markdown(document))):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, text.encode())
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}", hint="choose another place for the report") from None


def _figures(run: Run) -> dict[str, Any]:
    """A run's figures for programs; null where there is no number."""
    drift = run.drift
    intervals = {name: getattr(drift, name) for name in ("kl", "top1_agreement", "perplexity_increase_percent")}
    kinds = dict.fromkeys(kind for layer in run.layers for kind in layer.error_db)
    figures = {
        "name": run.name,
        "scheme": run.scheme,
        "method": run.method,
        "file_bytes": run.file_bytes,
        "bits_per_linear_weight": run.bits_per_linear_weight,
        **{k: [v.mean, v.low, v.high] for k, v in intervals.items()},
        "perplexity": drift.perplexity,
        "reference_perplexity": drift.reference_perplexity,
        "error_db": {kind: [_hundredth(layer.error_db.get(kind)) for layer in run.layers] for kind in kinds},
        "stream_error_db": [_hundredth(layer.stream_error_db) for layer in run.layers],
    }
    found: dict[str, Any] = finite_json(figures)
    return found


def _hundredth(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
