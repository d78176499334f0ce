"""The page in a real Chromium: controls move, numbers are the command line's, no console errors, screenshots kept."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import answer, run

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
    program, *words = shlex.split(command)
    assert program == "qwenq"
    return answer(*words)["estimates"][0]


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
    assert opened.text("#fits") == "fits" and opened.text("#largest") == "20,991"
    before = opened.total()
    opened.slide("#context", 40)
    assert opened.text("#context_text") == "32,768 tokens" and opened.total() != before
    assert opened.text("#fits") == "does not fit"
    check_numbers(opened)
    opened.page.select_option("#model", "Qwen2.5-7B")
    opened.page.select_option("#bits", "8")
    opened.page.select_option("#engine", "vllm")
    opened.page.select_option("#kv_cache_dtype", "fp8")
    opened.slide("#batch_size", 4)
    check_numbers(opened)


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
    opened.slide("#context", 32)
    url, total = opened.page.url, opened.total()
    assert "model=Qwen2.5-32B" in url and "context=16384" in url
    opened.page.goto(url)
    opened.answered()
    assert opened.total() == total and opened.page.input_value("#model") == "Qwen2.5-32B"
    assert opened.text("#link_notes") == ""
    bad = "?model=<b>x</b>&context=99999999&bits=3&rig=99x%20Nothing%2B1x%20RTX%204090&engine=no&batch_size=-3"
    opened.page.goto(address + bad + "&colour=red")
    opened.answered()
    said = opened.text("#link_notes")
    for part in ("<b>x</b>", "99999999", "bits “3”", "99x Nothing", "engine “no”", "“-3”", "colour"):
        assert part in said, part
    assert opened.page.input_value("#model") == "Qwen2.5-72B" and opened.page.input_value("#bits") == "4"
    assert opened.text("#context_text") == "8,192 tokens" and "--gpu 'RTX 4090'" in opened.text("#command")


def test_the_slider_is_logarithmic(opened: Opened, address: str) -> None:
    """1k to 16k is more than half of the track, each step moves the total; a typed context is kept exactly."""
    opened.go(address)
    at, totals = {}, []
    for step in (0, 8, 32, 56):
        opened.slide("#context", step)
        at[step] = opened.text("#context_text")
        totals.append(float(opened.total().split()[0]))
    assert totals == sorted(set(totals))
    assert at == {0: "1,024 tokens", 8: "2,048 tokens", 32: "16,384 tokens", 56: "131,072 tokens"}
    opened.page.fill("#context_exact", "12345")
    opened.page.press("#context_exact", "Tab")
    opened.answered()
    assert opened.text("#context_text") == "12,345 tokens" and "--context 12345" in opened.text("#command")


def test_the_plan_is_on_the_page(opened: Opened, address: str) -> None:
    """Placement, speed and flags as `qwenq plan` has them."""
    opened.go(address)
    plan = answer("plan", "Qwen2.5-72B", "--gpu", "2x RTX 3090", "-c", "8192")
    cards = opened.page.locator("#placement li:not(.legend)").all_inner_texts()
    assert len(cards) == 2 and "layers 0–39, embedding" in cards[0] and "head" in cards[1]
    for card, gpu in zip(cards, plan["gpus"], strict=True):
        assert f"{gpu['total_bytes'] / GIB:.2f} of {gpu['limit_bytes'] / GIB:.2f} GiB" in card
    flags = opened.page.locator("#flags .flag").all_inner_texts()
    assert len(flags) == 3 and all(line in flag for flag, line in zip(flags, plan["flags"].values(), strict=True))
    assert "tok/s" in opened.text("#decode")
    opened.page.click("#parallel summary")
    assert opened.page.locator("#parallel li").count() == 2


def test_offloading_and_host_memory(opened: Opened, address: str) -> None:
    opened.go(address + "?rig=1x%20RTX%204090")
    assert opened.text("#fits") == "does not fit" and opened.text("#largest") == "none"
    assert "say how much there is" in opened.text("#placement")
    for gb, verdict in (("64", "; fits"), ("16", "; does not fit")):
        opened.page.fill("#ram_gb", gb)
        opened.page.press("#ram_gb", "Tab")
        opened.answered()
        assert verdict in opened.text("#placement li:nth-child(2)")


def test_every_setting_of_a_server(opened: Opened, address: str) -> None:
    opened.go(address + "?model=Qwen2.5-14B&engine=vllm&rig=2x%20L40S")
    opened.page.click("#settings summary")
    assert "KV cache would hold" in opened.text("#notes")
    before = opened.text("#notes")
    for control, value, words in (
        ("#max_num_seqs", "32", "--max-num-seqs 32"),
        ("#gpu_memory_utilization", "80", "--gpu-memory-utilization 0.8"),
        ("#reserve_gib", "20", "--reserve 20GiB"),
    ):
        opened.page.fill(control, value)
        opened.page.press(control, "Tab")
        opened.answered()
        assert words in opened.text("#command") and opened.text("#notes") != before, control
        before = opened.text("#notes")
    opened.page.check("#enforce_eager")
    opened.page.select_option("#tensor_parallel_size", "1")
    opened.page.select_option("#prefill_chunk", "512")
    opened.answered()
    command = opened.text("#command")
    assert "--enforce-eager" in command and "--tensor-parallel-size 1" in command and "--prefill-chunk 512" in command
    assert "graphs" not in opened.text("#table")
    check_numbers(opened)
    url = opened.page.url
    opened.page.goto(url)
    opened.answered()
    assert opened.text("#command") == command and opened.text("#link_notes") == ""
    opened.page.select_option("#engine", "qwenq")
    opened.answered()
    assert opened.page.is_disabled("#max_num_seqs") and "--max-num-seqs" not in opened.text("#command")


def test_formats(opened: Opened, address: str) -> None:
    opened.go(address)
    opened.page.select_option("#format", "bnb-nf4")
    opened.answered()
    assert "--format bnb-nf4" in opened.text("#command") and opened.page.is_disabled("#bits")
    check_numbers(opened)
    opened.page.select_option("#format", "gptq")
    opened.page.select_option("#bits", "8")
    opened.answered()
    assert "--bits 8 --format gptq" in opened.text("#command") and not opened.page.is_disabled("#bits")
    opened.page.select_option("#format", "awq")
    opened.answered()
    assert "--bits 4 --format awq" in opened.text("#command") and opened.page.is_disabled("#bits")
    check_numbers(opened)
    opened.page.select_option("#engine", "llama.cpp")
    opened.answered()
    opened.page.select_option("#format", "Q6_K")
    opened.answered()
    assert "--format Q6_K" in opened.text("#command")
    check_numbers(opened)
    assert opened.page.is_disabled("#group_size")


def test_the_verdict_stays_in_view(opened: Opened, address: str) -> None:
    opened.page.set_viewport_size({"width": 390, "height": 844})
    opened.go(address)
    assert opened.page.eval_on_selector("#fits", "e => e.getBoundingClientRect().bottom") < 400
    opened.page.evaluate("window.scrollTo(0, 2500)")
    where = "e => { const box = e.getBoundingClientRect(); return [box.top, box.bottom]; }"
    box = opened.page.eval_on_selector("#bar", where)
    assert 0 <= box[0] < 20 and box[1] < 300


def test_recommended_rows_open(opened: Opened, address: str) -> None:
    opened.go(address)
    opened.page.wait_for_selector("body[data-rigs=listed]")
    assert opened.page.locator("#recommended tbody tr").count() == 12
    opened.page.click("#more")
    rows = opened.page.locator("#recommended tbody tr").count()
    assert rows > 40 and opened.text("#more") == "Show the first 12"
    counts = [int(text.split("x")[0]) for text in opened.page.locator("#recommended td:first-child").all_inner_texts()]
    assert counts == sorted(counts)


def test_copying_and_themes(opened: Opened, address: str) -> None:
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.go(address)
    opened.page.click("#flags .flag:nth-child(1) button")
    assert "vllm serve" in opened.page.evaluate("navigator.clipboard.readText()")
    opened.page.click("#share")
    assert opened.page.evaluate("navigator.clipboard.readText()") == opened.page.url
    opened.page.select_option("#theme", "dark")
    dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    opened.page.select_option("#theme", "light")
    assert dark != opened.page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_every_text_has_contrast(browser: Any, address: str) -> None:
    """4.5 to 1 at least (WCAG AA), in both themes; the verdict's colours too."""
    for scheme in ("light", "dark"):
        found = Opened(browser, address, viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        found.go(address + "?rig=1x%20RTX%204090")
        pairs = found.page.evaluate(
            """() => {
              const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
              return [...document.querySelectorAll('p, strong, span, label, summary, td, th, li, pre, h2, dt, dd')]
                .filter(e => e.textContent.trim() && e.offsetParent && !e.closest('.quiet') && !e.closest('.chart'))
                .map(e => [ground(e), getComputedStyle(e).color, e.textContent.trim().slice(0, 30)]);
            }"""
        )
        assert len(pairs) > 100
        for ground, ink, text in pairs:
            assert _contrast(ground, ink) >= 4.5, (scheme, text, ground, ink)
        found.context.close()


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
    assert opened.text("#context_text") == "120,192 tokens"
    unnamed = opened.page.evaluate(
        """() => [...document.querySelectorAll('input, select, button')].filter(e =>
            !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())).length"""
    )
    assert unnamed == 0
    label = opened.page.get_attribute(".chart", "aria-label")
    assert label and re.search(r"RTX 3090.*GiB at the chosen 120,192; limit 23.58 GiB", label)


def test_a_stopped_server_is_said(opened: Opened, address: str) -> None:
    opened.go(address)
    opened.page.route("**/api/estimate", lambda route: route.abort())
    opened.page.select_option("#bits", "8")
    opened.page.wait_for_selector("body[data-state=failed]")
    assert "does not answer" in opened.text("#error")
    opened.complaints.clear()  # Chromium reports the request that this test broke


@pytest.mark.parametrize(
    ("name", "scheme", "width", "height"),
    [
        ("light", "light", 1280, 900),
        ("dark", "dark", 1280, 900),
        ("phone", "light", 390, 844),
        ("phone-dark", "dark", 390, 844),
    ],
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
    words = ["vram", "export", "Qwen2.5-72B", "-o", out, "--bits", "4,8", "--gpu", "2x RTX 3090", "-c", "8k"]
    assert run(*words).exit_code == 0
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
