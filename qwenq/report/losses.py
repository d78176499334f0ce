"""Sections on what was lost: warnings first, the figures, KL against size, errors by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qwenq.model.architectures import known_kinds
from qwenq.report.benchmarks import Benchmark
from qwenq.report.document import (
    MISSING,
    Block,
    Code,
    Details,
    Figure,
    Items,
    Paragraph,
    Part,
    Section,
    Small,
    Table,
    Text,
    kl,
    kl_spec,
    known,
    number,
    size,
    with_interval,
)
from qwenq.report.drawing import MARKERS
from qwenq.report.plots import Point, Series, draw_kl_size, draw_layers
from qwenq.report.runs import Run
from qwenq.units import GB, counted, format_gb

MAX_LINES = 20  # of warnings a run
OWN_TOOL = "qwenq"  # as benchmarks name it


def warnings_section(runs: Sequence[Run], left_out: Sequence[str] = ()) -> Section:
    """Omissions, each run's warnings, and anything that makes the runs hard to compare."""
    lines: list[Text] = [*left_out]
    for run in runs:
        found = list(run.warnings)
        if run.fallbacks and not any("fell back" in line for line in found):
            linears = counted(len(run.fallbacks), "linear")
            found.insert(0, f"{linears} fell back to rounding to nearest: {run.fallbacks[0]}, ...")
        if math.isnan(run.drift.kl.mean) and not any("not finite" in line for line in found):
            found.append("its drift is not a finite number")
        lines += [(Code(run.name), ": ", line) for line in found[:MAX_LINES]]
        if len(found) > MAX_LINES:
            lines.append((Code(run.name), f": and {len(found) - MAX_LINES} more, in its manifest"))
    lines += incomparable(runs)
    if lines:
        return Section("warnings", "Warnings and fallbacks", (Items(tuple(lines), stressed=True),))
    count = sum(len(layer.schemes) for run in runs for layer in run.layers)
    text = f"None. All {count} linears were quantized as asked, none fell back, and every figure below is finite."
    return Section("warnings", "Warnings and fallbacks", (Paragraph(text),))


def incomparable(runs: Sequence[Run]) -> list[Text]:
    """Why figures of one run may not be set beside the first one's."""
    first, found = runs[0], list[Text]()
    same: tuple[tuple[str, Callable[[Run], object]], ...] = (
        ("was made from different source files than", lambda run: run.job.get("source")),
        ("has its drift measured on different tokens than", lambda run: run.drift.text_sha256),
        ("has its drift defined differently from", lambda run: run.drift.metrics_version),
    )
    for run in runs[1:]:
        for words, what in same:
            if what(run) != what(first):
                found.append((Code(run.name), f" {words} ", Code(first.name), ": do not compare their figures"))
        if run.drift.compute_dtype != first.drift.compute_dtype:
            noise = 2 * max(run.drift.noise_floor_kl, first.drift.noise_floor_kl)  # of both models of a run
            found.append((
                Code(run.name), f" has its drift computed in {run.drift.compute_dtype}, ", Code(first.name),
                f" in {first.drift.compute_dtype}: differences of KL below {noise:.1g} mean nothing",
            ))  # fmt: skip
    return found


def summary_section(runs: Sequence[Run]) -> Section:
    """The headline: one column a run."""
    drift = runs[0].drift
    floor = (
        "float32 has no noise floor: narrower types are compared with it"
        if drift.compute_dtype == "float32"
        else f"noise floor of KL {drift.noise_floor_kl:.2g}"
    )
    lead = (
        "Against the 16-bit model, on ", Code(drift.text), f": {drift.windows} windows of {drift.window_tokens} "
        f"tokens, computed in {drift.compute_dtype} ({floor}). The 16-bit model's perplexity there is "
        f"{number(drift.reference_perplexity, '.3f')} (standard error {known(drift.reference_perplexity_se, '.3f')}). "
        "KL is KL(16-bit || quantized) per token in nats. Intervals are 95 %, from a bootstrap over windows; the "
        "perplexity increase is paired, both models read the same windows.",
    )  # fmt: skip
    figures: tuple[tuple[str, Callable[[Run], Text]], ...] = (
        ("scheme", _scheme),
        ("method", lambda r: r.method),
        ("size of all files", lambda r: format_gb(r.file_bytes)),
        ("bits per linear weight", lambda r: number(r.bits_per_linear_weight, ".3f")),
        ("mean KL", lambda r: with_interval(r.drift.kl, kl_spec(r.drift.kl.mean))),
        ("KL, 99th percentile", lambda r: kl(r.drift.kl_p99)),
        ("top-1 agreement", lambda r: with_interval(r.drift.top1_agreement, ".2f", "%", 100)),
        (
            "perplexity",
            lambda r: (number(r.drift.perplexity, ".3f"), Small(f"SE {known(r.drift.perplexity_se, '.3f')}")),
        ),
        ("perplexity increase", lambda r: with_interval(r.drift.perplexity_increase_percent, "+z.2f", "%")),
    )
    rows: list[tuple[Text, ...]] = [(name, *(show(run) for run in runs)) for name, show in figures]
    blocks: list[Block] = [
        Paragraph(lead),
        *_key(runs),
        Table.of("The variants and what each loses", ("", *(run.label for run in runs)), rows),
    ]
    if lines := ratios(runs):
        blocks.append(Items(tuple(lines)))
    return Section("summary", "What was lost", tuple(blocks))


def _key(runs: Sequence[Run]) -> list[Block]:
    """A key to the labels, if they are not the names."""
    if all(run.label == run.name for run in runs):
        return []
    key: list[Part] = ["The runs: "]
    for run in runs:
        key += [f"{run.label} is ", Code(run.name), ", "]
    return [Paragraph((*key[:-1], "."))]


def _scheme(run: Run) -> Text:
    counts = run.scheme_counts
    if len(counts) < 2:
        return run.scheme
    return "mixed", *(Small(f"{counted(count, 'linear')} {name}") for name, count in list(counts.items())[:4])


def ratios(runs: Sequence[Run]) -> list[Text]:
    """KL beside rounding to nearest, for runs of one scheme on the same tokens."""
    found: list[Text] = []
    for run in runs:
        for base in runs:
            same = run.scheme == base.scheme and run.drift.text_sha256 == base.drift.text_sha256
            if same and run.method != "rtn" and base.method == "rtn" and base.drift.kl.mean > 0:
                share = run.drift.kl.mean / base.drift.kl.mean
                found.append(f"{run.label} has {share:.2f} of the KL of rounding to nearest, {base.label}.")
    return found


def size_section(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> Section:
    """KL against size, one figure for each text that a drift was read on."""
    texts = list(dict.fromkeys([*(run.drift.text for run in runs), *(b.text for b in benchmarks)]))
    tools = list(dict.fromkeys(b.tool for b in benchmarks if b.tool != OWN_TOOL))
    blocks: list[Block] = []
    for k, text in enumerate(texts):
        ours = [run for run in runs if run.drift.text == text]
        theirs = [b for b in benchmarks if b.text == text]
        blocks.append(_size_figure(text, ours, theirs, tools, k, len(texts) > 1))
    return Section("size", "KL against size", tuple(blocks))


def _size_figure(
    text: str, runs: Sequence[Run], benchmarks: Sequence[Benchmark], tools: Sequence[str], k: int, named: bool
) -> Block:
    by_bytes = all(b.n_bytes > 0 for b in benchmarks)
    points = [
        Point(
            run.label, run.file_bytes / GB if by_bytes else run.bits_per_linear_weight, run.drift.kl.mean,
            run.drift.kl.low, run.drift.kl.high, 0 if run.method != "rtn" else 1, True,
        )
        for run in runs
    ]  # fmt: skip
    points += [
        Point(
            b.label, b.n_bytes / GB if by_bytes else b.bits_per_linear_weight, b.kl.mean, b.kl.low, b.kl.high,
            _series(b.tool, tools), b.tool == OWN_TOOL,
        )
        for b in benchmarks
    ]  # fmt: skip
    drawn = [p for p in points if math.isfinite(p.kl) and p.kl > 0 and math.isfinite(p.size)]
    rows: list[tuple[Text, ...]] = [
        (
            run.label, run.scheme, size(run.file_bytes), number(run.bits_per_linear_weight, ".3f"),
            with_interval(run.drift.kl, kl_spec(run.drift.kl.mean)),
            number(100 * run.drift.top1_agreement.mean, ".2f", "%"),
        )
        for run in runs
    ]  # fmt: skip
    rows += [
        (
            f"{b.tool} {b.version}".strip(), b.setting or MISSING, size(b.n_bytes),
            known(b.bits_per_linear_weight, ".3f"), with_interval(b.kl, kl_spec(b.kl.mean)),
            known(100 * b.top1, ".2f", "%"),
        )
        for b in benchmarks
    ]  # fmt: skip
    head = ("variant", "setting", "files", "bits per linear weight", "mean KL", "top-1 agreement")
    table = Table.of(f"KL against size on {text}", head, rows, "llrrrr")
    if not drawn:
        return table
    gb = max(p.size for p in drawn) >= 1 or not by_bytes
    unit = ("size of all files, GB" if gb else "size of all files, MB") if by_bytes else "stored bits per linear weight"
    if not gb:
        drawn = [replace(p, size=1000 * p.size) for p in drawn]
    marks = ["circles: this project's solver"] if any(p.series == 0 for p in drawn) else []
    marks += ["squares: rounding to nearest"] if any(p.series == 1 for p in drawn) else []
    marks += ["hollow marks: other tools"] if any(not p.ours for p in drawn) else []
    said = f". Down and left is better. Bars are 95 % intervals; {', '.join(marks)}."
    caption: Text = ("Read on ", Code(text), said)
    return Figure(
        f"kl-size-{k}", f"Read on {text}" if named else "", caption, lambda w, i: draw_kl_size(drawn, unit, w, i), table
    )


def _series(tool: str, tools: Sequence[str]) -> int:
    """Marker and colour of a benchmarked tool; this project's solver keeps its own."""
    return 0 if tool == OWN_TOOL else 2 + tools.index(tool) % (len(MARKERS) - 2)


def layers_section(runs: Sequence[Run]) -> Section:
    """Error by kind of linear and layer, and what reached the residual stream."""
    blocks: list[Block] = []
    kinds = [kind for kind in known_kinds() if _has(runs, kind)]
    kinds += sorted({kind for run in runs for layer in run.layers for kind in layer.error_db} - set(kinds))[:5]
    panels = {kind: _kind_series(runs, kind) for kind in kinds if _has(runs, kind)}
    if panels:
        silent = [run.name for run in runs if not any(v is not None for la in run.layers for v in la.error_db.values())]
        note = f" Without calibration inputs there is no such error: {', '.join(silent)}." if silent else ""
        caption = (
            "Energy of each linear's output error over the energy of its output, on the calibration inputs that "
            f"reached it, 10 log10. Lower is better; 3 dB is half the energy.{note}"
        )
        blocks.append(
            Figure(
                "error-kinds",
                "Output error by kind of linear",
                caption,
                lambda w, i: draw_layers(panels, "output error, dB", _kinds_words(panels), w, i),
                _kinds_table(runs, list(panels)),
            )
        )
    streams = [
        Series(run.label, {layer.layer: layer.stream_error_db for layer in run.layers}, k) for k, run in enumerate(runs)
    ]
    if any(series.points for series in streams):
        blocks.append(
            Figure(
                "error-stream",
                "Error of the hidden states after each layer",
                "Quantized against 16-bit hidden states on the evaluation tokens, relative to the energy of the 16-bit "
                "ones, 10 log10: the combined effect of all layers so far.",
                lambda w, i: draw_layers(
                    {"": streams}, "error of hidden states, dB", _kinds_words({"stream": streams}), w, i
                ),
                _stream_table(streams),
            )
        )
    blocks.append(Details("Every layer", tuple(_layer_table(run, list(panels)) for run in runs)))
    return Section("layers", "Where it was lost", tuple(blocks))


def _has(runs: Sequence[Run], kind: str) -> bool:
    return any(layer.error_db.get(kind) is not None for run in runs for layer in run.layers)


def _kind_series(runs: Sequence[Run], kind: str) -> list[Series]:
    return [
        Series(run.label, {layer.layer: layer.error_db.get(kind) for layer in run.layers}, k)
        for k, run in enumerate(runs)
    ]


def _kinds_words(panels: Mapping[str, Sequence[Series]]) -> str:
    return "; ".join(
        f"{kind}, {series.label}: {min(v for _, v in series.points):.1f} to {max(v for _, v in series.points):.1f} dB"
        for kind, panel in panels.items()
        for series in panel
        if series.points
    )


def _kinds_table(runs: Sequence[Run], kinds: Sequence[str]) -> Table:
    rows: list[tuple[Text, ...]] = []
    for kind in kinds:
        cells: list[Text] = []
        for series in _kind_series(runs, kind):
            values = [value for _, value in series.points]
            if not values:
                cells.append(MISSING)
                continue
            worst_layer, worst = max(series.points, key=lambda point: point[1])
            mean = number(sum(values) / len(values), ".1f")
            cells.append((mean, Small(f"worst {number(worst, '.1f')}, layer {worst_layer}")))
        rows.append((kind, *cells))
    return Table.of("Output error in dB, mean over layers", ("linear", *(run.label for run in runs)), rows)


def _stream_table(streams: Sequence[Series]) -> Table:
    layers = sorted({at for series in streams for at, _ in series.points})
    picked = sorted({layers[round(k * (len(layers) - 1) / 4)] for k in range(5)}) if layers else []
    rows: list[tuple[Text, ...]] = []
    for layer in picked:
        values = [dict(series.points).get(layer, math.nan) for series in streams]
        rows.append((str(layer), *(known(value, ".1f") for value in values)))
    head = ("after layer", *(series.label for series in streams))
    return Table.of("Error of the hidden states, dB", head, rows)


def _layer_table(run: Run, kinds: Sequence[str]) -> Table:
    def cell(value: float | None) -> str:
        return MISSING if value is None else known(value, ".1f")

    rows: list[tuple[Text, ...]] = [
        (str(layer.layer), *(cell(layer.error_db.get(kind)) for kind in kinds), cell(layer.stream_error_db))
        for layer in run.layers
    ]
    return Table.of(f"{run.name}: errors in dB", ("layer", *(k.removesuffix("_proj") for k in kinds), "stream"), rows)
