"""The page in a real Chromium: controls move, numbers are the command line's, no console errors, screenshots kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path(os.environ.get("QWENQ_CHROMIUM", "/usr/bin/chromium"))
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("fastapi", reason="the page's extra is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no Chromium at {CHROMIUM} (the distribution's package)"),
]
GIB = 1 << 30


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of its own on a free port."""
    command = [sys.executable, "-m", "qwenq", "vram", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline().strip()
            assert line.startswith("http://127.0.0.1:"), line
            yield line
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield found
        found.close()


class Opened:
    """A page, with everything it complained about."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda r: self.foreign.append(r.url) if not r.url.startswith(address) else None)
        self.page.set_default_timeout(30_000)

    def go(self, url: str) -> None:
        self.page.goto(url)
        self.answered()

    def answered(self) -> None:
        """Wait until the last change is answered."""
        self.page.wait_for_timeout(250)
        self.page.wait_for_selector("body[data-state=answered]")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def total(self) -> str:
        return self.text("#total")

    def slide(self, selector: str, value: int) -> None:
        self.page.eval_on_selector(
            selector, "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", value
        )
        self.answered()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Opened]:
    found = Opened(browser, address, viewport={"width": 1280, "height": 900})
    yield found
    found.context.close()
    assert not found.complaints
    assert not [url for url in found.foreign if not url.startswith(("data:", "blob:"))]


def command_line(command: str) -> Any:
    """What the command that the page shows prints as JSON."""
    import shlex

    words = [sys.executable, "-m", *shlex.split(command), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["estimates"][0]


def check_numbers(opened: Opened) -> None:
    """Total, range and every cell of the table against the command line."""
    said = command_line(opened.text("#command"))
    assert opened.total() == f"{said['total_bytes'] / GIB:.2f} GiB"
    assert opened.text("#range").startswith(f"{said['low_bytes'] / GIB:.2f} to {said['high_bytes'] / GIB:.2f} GiB")
    for index, gpu in enumerate(said["gpus"]):
        column = opened.page.eval_on_selector_all(
            "#table tbody tr",
            f"rows => rows.map(r => [r.children[0].textContent, r.children[{index + 1}].textContent])",
        )
        cells = dict(column)
        assert cells["total"] == f"{gpu['total_bytes'] / GIB:.2f}"
        weights = next(term for term in gpu["terms"] if term["name"] == "weights")
        assert cells["weights"] == f"{weights['bytes'] / GIB:.2f}"


def test_numbers_are_the_command_lines(opened: Opened, address: str) -> None:
    opened.go(address)
    check_numbers(opened)
    assert opened.text("#fits") == "fits" and opened.text("#largest") == "17,672"
    before = opened.total()
    opened.slide("#context", 31)
    assert opened.text("#context_text") == "32,768 tokens" and opened.total() != before
    assert opened.text("#fits") == "does not fit"
    check_numbers(opened)
    opened.page.select_option("#model", "Qwen2.5-7B")
    opened.page.select_option("#bits", "8")
    opened.page.select_option("#engine", "vllm")
    opened.page.select_option("#kv_cache_dtype", "fp8")
    opened.slide("#batch_size", 4)
    check_numbers(opened)


def test_every_slider_step_moves_the_total(opened: Opened, address: str) -> None:
    opened.go(address)
    seen = []
    for step in (0, 7, 63, 127):
        opened.slide("#context", step)
        seen.append(float(opened.total().split()[0]))
    assert seen == sorted(seen) and len(set(seen)) == 4


def test_rig_of_several_kinds(opened: Opened, address: str) -> None:
    opened.go(address)
    opened.page.select_option("#rig li:nth-child(1) select", "RTX 4090")
    opened.page.fill("#rig li:nth-child(1) input", "1")
    opened.page.press("#rig li:nth-child(1) input", "Tab")
    opened.page.click("#add")
    opened.page.select_option("#rig li:nth-child(2) select", "RTX 3060 12GB")
    opened.page.fill("#rig li:nth-child(2) input", "2")
    opened.page.press("#rig li:nth-child(2) input", "Tab")
    opened.answered()
    assert "--gpu 'RTX 4090 + 2x RTX 3060 12GB'" in opened.text("#command")
    assert opened.page.locator(".chart").count() == 2
    check_numbers(opened)
    for _ in range(2):
        opened.page.click("#rig li:nth-child(1) button")
        opened.answered()
    assert opened.text("#fits") == "no rig" and "--gpu" not in opened.text("#command")
    opened.page.wait_for_selector("body[data-rigs=listed]")
    opened.page.click("#recommended tbody tr:nth-child(1) button")
    opened.answered()
    assert opened.text("#fits").startswith("fits")


def test_address_holds_the_state(opened: Opened, address: str) -> None:
    opened.go(address)
    opened.page.select_option("#model", "Qwen2.5-32B")
    opened.slide("#context", 15)
    url, total = opened.page.url, opened.total()
    assert "model=Qwen2.5-32B" in url and "context=16384" in url
    opened.page.goto(url)
    opened.answered()
    assert opened.total() == total and opened.page.input_value("#model") == "Qwen2.5-32B"
    opened.page.goto(address + "?model=<b>x</b>&context=99999999&bits=7&rig=99x%20Nothing&engine=no&batch_size=-3")
    opened.answered()
    assert opened.page.input_value("#model") == "Qwen2.5-0.5B"  # what is unknown becomes the first choice


def test_keyboard_alone(opened: Opened, address: str) -> None:
    opened.go(address)
    for _ in range(30):
        opened.page.keyboard.press("Tab")
        if opened.page.evaluate("document.activeElement.id") == "context":
            break
    before = opened.total()
    opened.page.keyboard.press("End")
    opened.answered()
    assert opened.text("#context_text") == "131,072 tokens" and opened.total() != before
    opened.page.keyboard.press("ArrowLeft")
    opened.answered()
    assert opened.text("#context_text") == "130,048 tokens"
    unnamed = opened.page.evaluate(
        """() => [...document.querySelectorAll('input, select, button')].filter(e =>
            !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())).length"""
    )
    assert unnamed == 0
    label = opened.page.get_attribute(".chart", "aria-label")
    assert label and re.search(r"RTX 3090.*GiB at the chosen 130,048; limit 23.58 GiB", label)


def test_a_stopped_server_is_said(opened: Opened, address: str) -> None:
    opened.go(address)
    opened.page.route("**/api/estimate", lambda route: route.abort())
    opened.page.select_option("#bits", "8")
    opened.page.wait_for_selector("body[data-state=failed]")
    assert "does not answer" in opened.text("#error")
    opened.complaints.clear()  # Chromium reports the request that this test broke


@pytest.mark.parametrize(
    ("name", "scheme", "width", "height"),
    [("light", "light", 1280, 900), ("dark", "dark", 1280, 900), ("phone", "light", 390, 844)],
)
def test_screenshots(
    browser: Any, address: str, tmp_path: Path, name: str, scheme: str, width: int, height: int
) -> None:
    """Nothing is wider than the window, the chart is drawn. QWENQ_SCREENSHOTS keeps the pictures."""
    found = Opened(browser, address, viewport={"width": width, "height": height}, color_scheme=scheme)
    found.go(address)
    found.page.wait_for_selector("body[data-rigs=listed]")
    folder = Path(os.environ.get("QWENQ_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    found.page.screenshot(path=str(folder / f"page-{name}.png"), full_page=True)
    assert found.page.evaluate("document.documentElement.scrollWidth") <= width
    assert found.page.locator(".chart .main-svg").count() >= 1
    assert found.page.locator(".chart path.js-fill").count() >= 5
    ground, ink = found.page.evaluate(
        "(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; })()"
    )
    assert _contrast(ground, ink) > 7
    found.context.close()
    assert not found.complaints


def test_without_script(browser: Any, address: str) -> None:
    found = Opened(browser, address, java_script_enabled=False)
    found.page.goto(address)
    assert "qwenq vram Qwen2.5-72B --gpu" in found.page.inner_text("noscript")
    found.context.close()


def test_export_needs_no_server(browser: Any, tmp_path: Path) -> None:
    out = tmp_path / "comparison.html"
    words = [
        "qwenq",
        "vram",
        "export",
        "Qwen2.5-72B",
        "-o",
        str(out),
        "--bits",
        "4,8",
        "--gpu",
        "2x RTX 3090",
        "-c",
        "8k",
    ]
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
    found = Opened(browser, out.as_uri(), viewport={"width": 390, "height": 844})
    found.page.goto(out.as_uri())
    assert found.page.locator("svg rect").count() > 8 and "does not fit" in found.page.inner_text("body")
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not found.complaints and not found.foreign
    found.context.close()


def _contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two rgb() colours."""

    def luminance(text: str) -> float:
        parts = [int(n) / 255 for n in re.findall(r"\d+", text)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
