#!/usr/bin/env python3
"""Draw the pictures of README.md and docs/: KL against size, the calculator page, a report.

    make pictures

KL against size comes from reports/benchmarks.jsonl (measured, see reports/solver.md and reports/budget.md); the report
is reports/demo.html as it was recorded; the calculator page is served and photographed in headless Chromium
(`QWENQ_CHROMIUM`, /usr/bin/chromium by default), with playwright.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from qwenq.report.benchmarks import Benchmark, read_benchmarks
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
        for k, colour in enumerate(("#14529c", "#a83c10", "#2b7148", "#77408f"))
    )
)


def main() -> None:
    """Write the three pictures."""
    PICTURES.mkdir(exist_ok=True)
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
    svg = draw_kl_size(points, "stored bits per linear weight", 760, "kl-size").svg()
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return svg.replace("<title", f"<style>{STYLE}</style>{ground}<title", 1) + "\n"


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
