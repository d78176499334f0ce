"""One comparison as a self-contained HTML file: a table and a drawn chart for each variant, no script, no network."""

from __future__ import annotations

from collections.abc import Sequence

from qwenq.escaping import html
from qwenq.planning.memory import TERM_NAMES
from qwenq.planning.questions import Spread
from qwenq.units import GIB, format_gb, format_tokens

COLOURS = {
    "weights": "#4477aa", "kv_cache": "#228833", "activations": "#ccbb44", "logits": "#aa3377",
    "dequantization": "#66ccee", "graphs": "#ee7733", "non_torch": "#997700", "context": "#777777", "slack": "#bbbbbb",
}  # fmt: skip
STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --ground: #fbfbf9; --line: #d9dce0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9ebee; --ground: #14171a; --line: #363c43; --bad: #ff8a80; } }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.no { color: var(--bad); font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
.limit { stroke: var(--bad); stroke-width: 2; stroke-dasharray: 6 4; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
"""


def comparison_html(variants: Sequence[Spread], title: str) -> str:
    """The document. Every number in it is the command line's; bars are those of the GPU with the least room."""
    top = max(_scale(variant) for variant in variants)
    parts = [_section(variant, top) for variant in variants]
    names = [n for n in TERM_NAMES if any(gpu.term(n) for v in variants for e in v.estimates for gpu in e.gpus)]
    keys = "".join(f'<span class="key" style="background:{COLOURS[n]}"></span>{TERM_NAMES[n]}' for n in names)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html(title)}</title><style>{STYLE}</style></head>\n<body><h1>{html(title)}</h1>\n"
        f"<p>GiB on the GPU with the least room; the dashed line is what it offers.</p><p>{keys}</p>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _scale(variant: Spread) -> int:
    return max(max(gpu.total_bytes, gpu.limit_bytes or 0) for e in variant.estimates for gpu in e.gpus)


def _section(variant: Spread, top: int) -> str:
    q = variant.question
    heading = f"{q.spec.name}, {q.weights.label}, {format_gb(q.weights.total_bytes)}, KV {q.template.kv_dtype}"
    where = f"{q.engine.label}, batch {q.template.batch}" + (f", on {q.rig.label}" if q.rig else "")
    rows = []
    for found in variant.estimates:
        gpu = found.tightest
        fits = {None: "", True: "fits", False: '<span class="no">does not fit</span>'}[found.fits]
        rows.append(
            f"<tr><td>{format_tokens(found.work.context)}</td><td>{found.total_bytes / GIB:.2f}</td>"
            f"<td>{found.low_bytes / GIB:.2f} to {found.high_bytes / GIB:.2f}</td><td>{gpu.total_bytes / GIB:.2f}</td>"
            f"<td>{fits}</td></tr>"
        )
    head = "<tr><th>context</th><th>all GPUs</th><th>range</th><th>tightest GPU</th><th></th></tr>"
    return (
        f"<h2>{html(heading)}</h2><p>{html(where)}</p>{_bars(variant, top)}"
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    )


def _bars(variant: Spread, top: int) -> str:
    """An SVG of horizontal bars, one a context; 600 units wide for `top` bytes."""
    height = 30 * len(variant.estimates)
    label = f"Memory of the tightest GPU at {len(variant.estimates)} contexts"
    shapes = []
    for index, found in enumerate(variant.estimates):
        gpu = found.tightest
        x, y = 70.0, 30 * index + 4
        shapes.append(f'<text x="62" y="{y + 16}" text-anchor="end">{format_tokens(found.work.context)}</text>')
        for term in gpu.terms:
            wide = 600 * term.n_bytes / top
            shapes.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="22" fill="{COLOURS[term.name]}">'
                f"<title>{TERM_NAMES[term.name]}: {term.n_bytes / GIB:.2f} GiB</title></rect>"
            )
            x += wide
        at = 70 + 600 * (gpu.limit_bytes or 0) / top
        shapes.append(f'<text x="{max(x, at) + 6:.1f}" y="{y + 16}">{gpu.total_bytes / GIB:.2f}</text>')
        if gpu.limit_bytes is not None:
            shapes.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 4}" y2="{y + 26}"/>')
    return f'<svg viewBox="0 0 740 {height}" role="img" aria-label="{html(label)}">{"".join(shapes)}</svg>'
