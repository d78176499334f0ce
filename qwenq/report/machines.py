"""Sections on machines: which rigs hold the checkpoints, memory against context, which engines load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenq.errors import QwenqError, UsageError
from qwenq.formats.base import UNTRIED, Loader, Variant, get_format, plain_loaders, read_quantization_config
from qwenq.io.gguf import gguf_model
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Workload
from qwenq.planning.engines.base import Engine, engine_names, get_engine
from qwenq.planning.memory import TERM_NAMES, MemoryEstimate, estimate
from qwenq.planning.models import WeightsAsked, load_model, model_weights
from qwenq.planning.placement import cutting_reasons
from qwenq.planning.rig import Rig, find_gpu, parse_rig
from qwenq.planning.tensor_parallel import SIZES
from qwenq.planning.weights import Weights
from qwenq.report.benchmarks import Measurement, gpu_peaks
from qwenq.report.document import MISSING, Block, Code, Figure, Items, Paragraph, Section, Small, Table, Text, number
from qwenq.report.plots import MemoryCurve, draw_memory
from qwenq.report.runs import Run
from qwenq.units import GIB, format_gib, format_tokens

TABLE_CONTEXTS = 6


def rigs_section(loaded: Sequence[Loaded], missing: Sequence[str], rigs: Sequence[Rig], engine: Engine) -> Section:
    """The longest context of one sequence on each rig, everything on the GPUs."""
    blocks: list[Block] = []
    if loaded:
        limit = max(one.spec.extended_context for one in loaded)
        found = [(rig, [longest_context(one, rig, engine) for one in loaded]) for rig in rigs]
        where = f"Estimated for {engine.label}, one sequence, a 16-bit KV cache, every layer on the GPUs"
        if all(longest == limit for _, row in found for longest in row):
            fewest = min(found, key=lambda pair: sum(pair[0].limits))[0]
            text = f"{where}: every rig listed holds every variant at the model's full context of {limit:,} tokens"
            blocks.append(Paragraph(f"{text}, the smallest being {fewest.label}."))
        else:
            blocks.append(Paragraph(f"{where}. The model's own limit is {limit:,} tokens."))
            rows: list[tuple[Text, ...]] = [
                (rig.label, format_gib(sum(rig.limits)), *(_context(longest) for longest in row)) for rig, row in found
            ]
            head = ("rig", "usable", *(one.run.label for one in loaded))
            blocks.append(Table.of("Longest context in tokens; no: not even a short one", head, rows))
    blocks += _left_out(missing)
    return Section("rigs", "Which rigs hold it", tuple(blocks))


def _context(longest: int | None) -> str:
    if longest is None:
        return "no such engine there"
    return f"{longest:,}" if longest else "no"


def _left_out(missing: Sequence[str]) -> list[Block]:
    return [Items(tuple(f"not computed for {line}" for line in missing))] if missing else []


def memory_section(loaded: Sequence[Loaded], engine: Engine, measurements: Sequence[Measurement]) -> Section:
    """Memory against context, estimated with its range, and measured where somebody did."""
    if not loaded:
        return Section("memory", "Memory against context", (Paragraph("Not computed: no tensors beside a manifest."),))
    estimates = {one.run.name: memory_by_context(one, engine) for one in loaded}
    highest = max(found[-1].high_bytes for found in estimates.values())
    lowest = min(found[0].total_bytes for found in estimates.values())
    cards = [(gpu.name, gpu.limit_bytes / GIB) for gpu in map(find_gpu, REFERENCE_GPUS)]
    limits = [(name, value) for name, value in cards if value * GIB > lowest]
    own = {
        one.run.name: tuple(m for m in measurements if m.checkpoint == one.run.directory.resolve().name)
        for one in loaded
    }
    measured = {name: gpu_peaks(found) for name, found in own.items()}
    curves = [
        MemoryCurve(
            one.run.label,
            [(e.work.context, e.low_bytes / GIB, e.total_bytes / GIB, e.high_bytes / GIB)
             for e in estimates[one.run.name]],
            [(context, peak / GIB) for context, peak in measured[one.run.name].items()],
            k,
        )
        for k, one in enumerate(loaded)
    ]  # fmt: skip
    smallest = min(cards, key=lambda pair: pair[1])
    text = f"Estimated for {engine.label}, one sequence on one GPU, the whole context filled; the band is the range. "
    if any(measured.values()):
        text += "Crosses are measurements, all GPUs together. "
    else:
        text += "No GPU measurements were given. "
    if highest < smallest[1] * GIB:
        text += f"Everything stays below the smallest card listed ({smallest[0]}, {smallest[1]:.2f} GiB usable)."
    else:
        text += "Dotted lines show the memory that single cards offer."
    blocks: list[Block] = [
        Figure(
            "memory-context",
            "",
            text,
            lambda w, i: draw_memory(curves, limits, "GPU memory, GiB", w, i),
            _memory_table(loaded, estimates, measured),
        )
    ]
    first = loaded[0]
    blocks.append(_terms_table(first, estimates[first.run.name]))
    blocks += [_measured_table(one.run.label, own[one.run.name]) for one in loaded if own[one.run.name]]
    known = {m for found in own.values() for m in found}
    strays = dict.fromkeys(m.checkpoint for m in measurements if m not in known)
    blocks += [Paragraph(f"A measurement of {name} was given, which is not one of these runs.") for name in strays]
    return Section("memory", "Memory against context", tuple(blocks))


def _some(estimates: Sequence[MemoryEstimate]) -> list[MemoryEstimate]:
    last = len(estimates) - 1
    picked = sorted({round(k * last / (TABLE_CONTEXTS - 1)) for k in range(TABLE_CONTEXTS)})
    return [estimates[k] for k in picked]


def _memory_table(
    loaded: Sequence[Loaded],
    estimates: Mapping[str, Sequence[MemoryEstimate]],
    measured: Mapping[str, Mapping[int, int]],
) -> Table:
    first = estimates[loaded[0].run.name]
    contexts = sorted(
        {e.work.context for e in _some(first)} | {context for row in measured.values() for context in row}
    )
    rows: list[tuple[Text, ...]] = []
    for context in contexts:
        cells: list[Text] = []
        for one in loaded:
            estimate = next((e for e in estimates[one.run.name] if e.work.context == context), None)
            peak = measured[one.run.name].get(context)
            shown = f"{estimate.total_bytes / GIB:.2f}" if estimate else MISSING
            notes = [f"{estimate.low_bytes / GIB:.2f} to {estimate.high_bytes / GIB:.2f}"] if estimate else []
            notes += [f"measured {peak / GIB:.2f}"] if peak is not None else []
            cells.append((shown, Small("; ".join(notes))) if notes else shown)
        rows.append((format_tokens(context), *cells))
    return Table.of("GPU memory in GiB", ("context", *(one.run.label for one in loaded)), rows)


def _measured_table(label: str, measurements: Sequence[Measurement]) -> Table:
    """Every measured peak beside what was predicted of it: the allocator's figure on a GPU, resident bytes on a CPU."""
    rows: list[tuple[Text, ...]] = []
    for m in sorted(measurements, key=lambda m: (m.context, m.device, m.phase)):
        error = number(100 * (m.predicted_bytes / m.allocated_bytes - 1), "+.1f", "%") if m.allocated_bytes else MISSING
        driver = f"{m.driver_bytes / GIB:.3f}" if m.driver_bytes else MISSING
        figures = f"{m.allocated_bytes / GIB:.3f}", driver, f"{m.predicted_bytes / GIB:.3f}", error
        rows.append((f"{m.context:,}", m.device, m.phase, *figures))
    head = ("context", "device", "phase", "allocated", "driver", "predicted", "error")
    return Table.of(f"Measured peaks in GiB, {label}", head, rows, "lllrrrr")


def _terms_table(one: Loaded, estimates: Sequence[MemoryEstimate]) -> Table:
    """Sources of the estimate, for the first variant."""
    picked = _some(estimates)
    names = [name for name in TERM_NAMES if any(e.term(name) for e in picked)]
    kinds = {term.name: term.provenance for e in picked for gpu in e.gpus for term in gpu.terms}
    rows: list[tuple[Text, ...]] = [
        (TERM_NAMES[name], kinds[name], *(f"{e.term(name) / GIB:.3f}" for e in picked)) for name in names
    ]
    rows.append(("total", "", *(f"{e.total_bytes / GIB:.3f}" for e in picked)))
    head = ("term", "provenance", *(format_tokens(e.work.context) for e in picked))
    return Table.of(f"Terms of the estimate in GiB, {one.run.name}", head, rows, "ll" + "r" * len(picked))


def loaders_section(loaded: Sequence[Loaded], missing: Sequence[str]) -> Section:
    """Engines by variant: whether they read it, and over how many GPUs they can cut it."""
    blocks: list[Block] = []
    if loaded:
        loaders = [one.loaders for one in loaded]
        names = list(dict.fromkeys(loader.name for row in loaders for loader in row))
        rows: list[tuple[Text, ...]] = []
        for name in names:
            found = [next((loader for loader in row if loader.name == name), None) for row in loaders]
            cells = [_cell(loader, one) if loader else "no" for loader, one in zip(found, loaded, strict=True)]
            tried = dict.fromkeys(loader.tried for loader in found if loader and not loader.reason)
            rows.append((name, *cells, "; ".join(tried) or UNTRIED))
        head = ("engine", *(one.run.label for one in loaded), "tried here")
        blocks.append(Table.of("Engines, and the tensor-parallel sizes the shapes allow", head, rows, "l" * len(head)))
        if reasons := _reasons(loaded):
            blocks.append(Items(tuple(reasons)))
        text = (
            "TP n is tensor parallelism: every layer cut over n GPUs. “By layers” is whole layers on GPU after GPU, "
            "which any shape allows. “Tried here” says what this project’s tests and ", Code("make interop"), " have "
            "really run on such checkpoints of small models, not what the engines’ authors state.",
        )  # fmt: skip
        blocks.append(Paragraph(text))
    blocks += _left_out(missing)
    return Section("loaders", "Engines and tensor parallelism", tuple(blocks))


def _cell(loader: Loader, one: Loaded) -> Text:
    if loader.reason:
        return "no", Small(loader.reason)
    if not loader.tensor_parallel:
        return "by layers"
    return "TP " + ", ".join(str(n) for n, reason in one.tensor_parallel.items() if not reason)


def _reasons(loaded: Sequence[Loaded]) -> list[Text]:
    """Why not the other tensor-parallel sizes, said once for all variants it holds for."""
    found: dict[tuple[int, str], list[str]] = {}
    for one in loaded:
        for ranks, reason in one.tensor_parallel.items():
            if reason:
                found.setdefault((ranks, reason), []).append(one.run.label)
    return [
        f"No TP {ranks} for {'any' if len(names) == len(loaded) else ', '.join(names)}: {reason}."
        for (ranks, reason), names in found.items()
    ]


RIGS = (
    "RTX 3060 12GB", "RTX 5080", "RTX 4090", "RTX 5090", "2x RTX 3060 12GB", "2x RTX 3090", "2x RTX 5090",
    "3x RTX 3090", "4x RTX 3090", "RTX A6000", "RTX PRO 6000 Blackwell", "A100 PCIe 80GB", "H200 SXM 141GB",
)  # fmt: skip
REFERENCE_GPUS = ("RTX 3060 12GB", "RTX 5080", "RTX 4090", "RTX 5090", "RTX A6000", "A100 PCIe 80GB", "H200 SXM 141GB")


@dataclass(frozen=True)
class Loaded:
    """A run's checkpoint as the planner sees it, from config.json and the shards' headers."""

    run: Run
    spec: ModelSpec
    weights: Weights
    loaders: tuple[Loader, ...]

    @property
    def tensor_parallel(self) -> dict[int, str]:
        """Ranks to the reason why the shapes forbid them; empty when they do not."""
        return {n: next(iter(cutting_reasons(self.spec, self.weights, n)), "") for n in SIZES}


def load(run: Run, engine: str) -> Loaded | str:
    """The checkpoint beside the manifest, or why it cannot be planned with."""
    if not any(run.directory.glob("*.safetensors")) and gguf_model(run.directory) is None:
        return f"{run.name}: no tensors beside its manifest"
    try:
        model = load_model(str(run.directory))
        weights = model_weights(model, WeightsAsked(gguf=get_engine(engine).needs_gguf))
        mixed = len({scheme for layer in run.layers for scheme in layer.schemes}) > 1
        loaders = loaders_of(model.config, Variant(weights.bits, weights.group_size, mixed))
    except QwenqError as error:
        return f"{run.name}: {error.message}"
    return Loaded(run, model.spec, weights, loaders)


def loaders_of(config: Mapping[str, Any], variant: Variant) -> tuple[Loader, ...]:
    """Engines for a checkpoint with that config.json, as its format knows them; CheckpointError for one not read."""
    if not config.get("quantization_config"):
        return tuple(plain_loaders())
    stored = read_quantization_config(config["quantization_config"], "config.json")
    return tuple(get_format(stored.format).loaders(variant._replace(version=stored.version)))


def longest_context(loaded: Loaded, rig: Rig, engine: Engine) -> int | None:
    """Most tokens of one sequence with everything on the rig's GPUs; 0 when none, None where the engine cannot run."""
    if not all(engine.runs_on(gpu) for gpu in rig.gpus):
        return None
    return engine.longest_context(Case(loaded.spec, loaded.weights, engine, Workload(1), rig))


def contexts_of(spec: ModelSpec) -> list[int]:
    """Powers of two from 1,024 (less for small models) to the model's longest context, and that one."""
    limit = spec.extended_context
    first = min(1024, max(1, limit // 4))
    found = []
    while first < limit:
        found.append(first)
        first *= 2
    return [*found, limit]


def memory_by_context(loaded: Loaded, engine: Engine) -> list[MemoryEstimate]:
    """The estimate at each context, everything on one GPU."""
    return [estimate(Case(loaded.spec, loaded.weights, engine, Workload(c))) for c in contexts_of(loaded.spec)]


def rigs_named(names: tuple[str, ...]) -> list[Rig]:
    """The rigs asked for, or those people have; UsageError for one that nobody knows."""
    return [parse_rig(name) for name in names or RIGS]


def engine_named(name: str) -> Engine:
    """The engine; UsageError for one that nobody knows, or that reads none of these checkpoints."""
    engine = get_engine(name)
    if engine.needs_gguf:
        hint = f"--engine {engine_names(checkpoints=True)}"
        raise UsageError(f"{name} reads GGUF, not these checkpoints", hint=hint)
    return engine
