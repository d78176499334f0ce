#!/usr/bin/env python3
"""Draw the pictures of README.md and docs/: KL by text, KL against size, the calculator page, a report.

    make pictures

KL by text comes from reports/qwen25.jsonl (measured, see reports/qwen25.md), KL against size from
reports/benchmarks.jsonl (reports/solver.md and reports/budget.md); the report
is reports/demo.html as it was recorded; the calculator page is served and photographed in headless Chromium
(`QWENQ_CHROMIUM`, /usr/bin/chromium by default), with playwright.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from qwenq.report.benchmarks import Benchmark, read_benchmarks
from qwenq.report.drawing import MARKERS, Drawing, Scale, figure_text, nice_range, text_width
from qwenq.report.plots import Point, draw_kl_size

HERE = Path(__file__).parent
PICTURES = HERE / "pictures"
REPORTS = HERE.parent / "reports"
CHROMIUM = os.environ.get("QWENQ_CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

TEXT = "wikitext"
MOST_BITS = 6.0  # 8 bits lose a hundredth of what 4 bits lose: on one plot with them, nothing could be told apart
NAMES = {"qwenq": "qwenq", "gptqmodel": "GPTQModel", "llamacpp": "llama.cpp", "llmcompressor": "llm-compressor"}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.grid{stroke:#e4e5e6}.axis{stroke:#666}.leader{stroke:#999}"
    ".label{font-size:12.5px}.stroke{fill:none;stroke-width:1.5}.hollow{fill:#fff;stroke-width:1.8}"
    + "".join(
        f".s{k}{{stroke:{colour}}}.mark.s{k}{{fill:{colour}}}"
        for k, colour in enumerate(("#14529c", "#a83c10", "#2b7148", "#77408f", "#3f8ad6"))
    )
)


def main() -> None:
    """Write the four pictures."""
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "qwen25-kl.svg").write_text(kl_by_text(), encoding="utf-8")
    (PICTURES / "kl-size.svg").write_text(kl_size(), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        photograph_page(browser, PICTURES / "page.png")
        photograph_report(browser, PICTURES / "report.png")
        browser.close()


def kl_size() -> str:
    """The plot as an SVG file with a style and a ground of its own."""
    found = [
        b
        for b in read_benchmarks(REPORTS / "benchmarks.jsonl")
        if b.text == TEXT and b.bits_per_linear_weight < MOST_BITS
    ]
    points = [
        Point(_label(b), b.bits_per_linear_weight, b.kl.mean, b.kl.low, b.kl.high, list(NAMES).index(b.tool),
              ours=b.tool == "qwenq")
        for b in found
    ]  # fmt: skip
    return _file(draw_kl_size(points, "stored bits per linear weight", 760, "kl-size"))


def _file(drawing: Drawing) -> str:
    """With a style and a ground of its own."""
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return drawing.svg().replace("<title", f"<style>{STYLE}</style>{ground}<title", 1) + "\n"


# Of the real Qwen2.5: what is drawn, in the order of the legend
SHOWN = {
    ("qwenq", "4-bit g128 --rotate"): "qwenq",
    ("gptqmodel", "4-bit g128 mse=2.4"): "GPTQModel, mse=2.4",
    ("gptqmodel", "4-bit g128"): "GPTQModel",
    ("llmcompressor", "4-bit g128 imatrix_mse"): "llm-compressor, imatrix_mse",
    ("qwenq", "4-bit g128"): "qwenq --no-rotate",
}
WINDOWS = 10  # of each text: those that every tool's checkpoint was read on
ROW_PX = 60.0


def kl_by_text() -> str:
    """Mean KL of a real Qwen2.5 at 4 bits, by kind of text and tool, all given the same encyclopedia windows."""
    lines = (REPORTS / "qwen25.jsonl").read_text(encoding="utf-8").splitlines()
    every = map(json.loads, lines)
    rows = [row for row in every if (row["calibration"], row["windows"]) == ("encyclopedia", WINDOWS)]
    found = {(row["text"], SHOWN[key]): row for row in rows if (key := (row["tool"], row["setting"])) in SHOWN}
    texts = list(dict.fromkeys(text for text, _ in found))
    said = "; ".join(
        f"{text}, {name}: {row['kl']:.4f} ({row['kl_low']:.4f} to {row['kl_high']:.4f})"
        for (text, name), row in found.items()
    )
    wide, top = 760, 58.0
    bottom = top + ROW_PX * len(texts)
    drawing = Drawing(wide, round(bottom + 46), "qwen25-kl", "KL divergence by kind of text", said)
    low, high = nice_range([row[key] for row in found.values() for key in ("kl_low", "kl_high")], log=True)
    x = Scale(low, high, 104.0, wide - 16.0, log=True)
    for tick in x.ticks(6):
        drawing.line(x(tick), top, x(tick), bottom, "grid")
        drawing.text(x(tick), bottom + 18, figure_text(tick), "middle", "tick")
    drawing.text(x.stop, bottom + 36, "mean KL, nats per token, log scale; bars are 95 % intervals", "end", "title")
    at = 12.0
    for k, name in enumerate(SHOWN.values()):
        drawing.mark(MARKERS[k], at, 20, _mark(k))
        drawing.text(at + 12, 24.5, name)
        at += text_width(name) + 34
    for row, text in enumerate(texts):
        middle = top + ROW_PX * (row + 0.5)
        drawing.line(x.start, middle - ROW_PX / 2, x.stop, middle - ROW_PX / 2, "grid")
        drawing.text(x.start - 10, middle + 4.5, text, "end")
        for k, name in enumerate(SHOWN.values()):
            y, measured = middle + 10.0 * (k - (len(SHOWN) - 1) / 2), found[text, name]
            drawing.line(x(measured["kl_low"]), y, x(measured["kl_high"]), y, f"stroke s{k}")
            drawing.mark(MARKERS[k], x(measured["kl"]), y, _mark(k))
    drawing.line(x.start, bottom, x.stop, bottom, "axis")
    return _file(drawing)


def _mark(series: int) -> str:
    return f"{'mark' if series == 0 else 'hollow'} s{series}"


def _label(benchmark: Benchmark) -> str:
    return f"{NAMES[benchmark.tool]} {benchmark.setting}"


def photograph_page(browser: Browser, file: Path) -> None:
    """The calculator as it opens: Qwen2.5-72B on two RTX 3090."""
    command = [sys.executable, "-m", "qwenq", "vram", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            page = browser.new_page(viewport={"width": 1180, "height": 760}, color_scheme="light")
            page.goto(server.stdout.readline().strip())
            page.wait_for_selector("body[data-rigs=listed]")
            page.wait_for_selector("body[data-state=answered]")
            page.wait_for_selector(".chart .main-svg")
            page.screenshot(path=file)
        finally:
            server.terminate()


def photograph_report(browser: Browser, file: Path) -> None:
    """The recorded demo report's opening screen."""
    page = browser.new_page(viewport={"width": 860, "height": 1000}, color_scheme="light")
    page.goto((REPORTS / "demo.html").as_uri())
    page.screenshot(path=file)


if __name__ == "__main__":
    main()
