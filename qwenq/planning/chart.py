"""A chart of memory against context for a terminal: one bar a context, stacked by term, the limit drawn across."""

from __future__ import annotations

from collections.abc import Sequence

from qwenq.planning.memory import MemoryEstimate
from qwenq.planning.terms import TERM_NAMES, GpuMemory
from qwenq.units import GIB, format_tokens

# ASCII letter and ANSI colour of each term
MARKS = {
    "weights": ("#", 34),
    "kv_cache": ("=", 32),
    "activations": ("+", 33),
    "logits": ("l", 35),
    "dequantization": ("d", 36),
    "graphs": ("g", 95),
    "non_torch": ("n", 94),
    "context": ("c", 90),
    "slack": (".", 37),
}


def memory_chart(estimates: Sequence[MemoryEstimate], width: int = 60, colour: bool = False) -> list[str]:
    """Lines of the chart: for each kind of GPU in use, a bar for every context.

    Equal GPUs are shown once, by the fullest of them. Plain text holds letters, colour holds blocks.
    """
    lines: list[str] = []
    names = dict.fromkeys(gpu.name for gpu in estimates[0].gpus if gpu.terms)
    seen: set[str] = set()
    for name in names:
        bars = [max((g for g in found.gpus if g.name == name), key=lambda g: g.total_bytes) for found in estimates]
        limit = bars[0].limit_bytes
        scale = max([gpu.total_bytes for gpu in bars] + ([limit] if limit else [])) * 1.02
        count = sum(gpu.name == name for gpu in estimates[0].gpus)
        title = f"{count}x {name}, the fullest" if count > 1 else name
        lines.append(title + (f"; | is the limit, {limit / GIB:.2f} GiB" if limit else ""))
        for found, gpu in zip(estimates, bars, strict=True):
            bar = _bar(gpu, width, scale, limit, colour)
            over = " over" if gpu.fits is False else ""
            lines.append(f"{format_tokens(found.work.context):>7} {bar} {gpu.total_bytes / GIB:7.2f} GiB{over}")
            seen |= {term.name for term in gpu.terms}
    legend = [f"{_painted(MARKS[name], colour)} {TERM_NAMES[name]}" for name in MARKS if name in seen]
    return [*lines, "        " + "  ".join(legend)]


def _bar(gpu: GpuMemory, width: int, scale: float, limit: int | None, colour: bool) -> str:
    cells: list[str] = []
    reached = 0
    for term in gpu.terms:
        reached += term.n_bytes
        cells += [_painted(MARKS[term.name], colour)] * (round(reached / scale * width) - len(cells))
    cells += [" "] * (width - len(cells))
    if limit is not None:
        cells[min(width - 1, round(limit / scale * width))] = "\x1b[1;31m|\x1b[0m" if colour else "|"
    return "".join(cells)


def _painted(mark: tuple[str, int], colour: bool) -> str:
    return f"\x1b[{mark[1]}m█\x1b[0m" if colour else mark[0]
