"""Reports in a real Chromium, from a file: no message, no request, nothing wider than the window, no tiny text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import test_page_browser
from report_runs import manifest, write_72b, write_run
from test_report import BENCHMARK, nasty_run

from qwenq.formats.base import Scheme
from qwenq.report.benchmarks import read_benchmarks
from qwenq.report.compose import Extras, compose
from qwenq.report.html import to_html
from qwenq.report.runs import load_runs

browser, pytestmark = test_page_browser.browser, test_page_browser.pytestmark


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three reports: of small runs, of a 72B beside other tools, of hostile manifests."""
    root = tmp_path_factory.mktemp("reports")
    (root / "benchmarks.jsonl").write_text("\n".join(json.dumps(BENCHMARK | {"bytes": n}) for n in (4e10, 5e10)))
    large = write_72b(root / "Qwen2.5-72B-Instruct-4bit", manifest(layers=80), Scheme(4, 128))
    fallen = manifest(layers=80, method="rtn", kl=0.1) | {"warnings": ["layer 3 fell back to rounding to nearest"]}
    runs = {
        "small": [write_run(root / "4-bit", manifest()), write_run(root / "4-bit-rtn", manifest(method="rtn", kl=0.1))],
        "large": [large, write_72b(root / "Qwen2.5-72B-Instruct-4bit-rtn", fallen, Scheme(4, 128))],
        "hostile": [write_run(root / "<img src=x onerror=alert(1)>", nasty_run())],
    }
    found = {}
    for name, directories in runs.items():
        benchmarks = read_benchmarks(root / "benchmarks.jsonl") if name == "large" else ()
        found[name] = root / f"{name}.html"
        found[name].write_text(to_html(compose(load_runs(directories), Extras(benchmarks=benchmarks))))
    return found


@pytest.mark.parametrize("name", ["small", "large", "hostile"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_a_report_opens(
    browser: Any, pages: dict[str, Path], tmp_path: Path, name: str, width: int, scheme: str
) -> None:
    """QWENQ_SCREENSHOTS keeps the pictures."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    folder = Path(os.environ.get("QWENQ_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(folder / f"report-{name}-{width}-{scheme}.png"), full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = "els => els.filter(e => e.getBoundingClientRect().width > 0).length"
    assert page.eval_on_selector_all("figure svg", shown) == page.locator("figure").count() > 1
    smallest = """els => Math.min(...els.filter(e => e.textContent.trim() && e.getBoundingClientRect().width > 0)
        .map(e => parseFloat(getComputedStyle(e).fontSize) * (e.ownerSVGElement
            ? e.ownerSVGElement.getBoundingClientRect().width / e.ownerSVGElement.viewBox.baseVal.width : 1)))"""
    assert page.eval_on_selector_all("main *", smallest) >= 12
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    for selector, least in (("body", 7), ("figcaption", 4.5), ("nav a", 4.5), (".s0.curve, .s0.mark", 3)):
        for kind in ("color",) if "s0" not in selector else ("stroke", "fill"):
            colour = page.eval_on_selector(selector, f"e => getComputedStyle(e).{kind}")
            if colour.startswith("rgb"):
                assert test_page_browser._contrast(ground, colour) >= least, (selector, colour)
    context.close()
    assert complaints == [] and requests == [pages[name].as_uri()]


def test_labels_stay_inside_their_pictures(browser: Any, pages: dict[str, Path]) -> None:
    """Measured by the browser with its own fonts, at both widths."""
    for width in (1280, 390):
        context = browser.new_context(viewport={"width": width, "height": 900})
        page = context.new_page()
        page.goto(pages["large"].as_uri())
        outside = page.eval_on_selector_all(
            "figure svg text",
            """els => els.filter(e => { const a = e.getBoundingClientRect(),
                b = e.ownerSVGElement.getBoundingClientRect();
                return a.width > 0 && (a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1
                    || a.top < b.top - 1); }).map(e => e.textContent)""",
        )
        assert outside == [], width
        context.close()
