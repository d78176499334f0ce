"""README.md and docs/: short enough, every link leads somewhere, every command shown is one that qwenq takes."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from qwenq.cli.main import app
from tests.conftest import answer, run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES if not page.name.startswith(("adding-", "cli", "api"))]  # pages on qwenq's own options
OLD_OPTIONS = {"--pull", "--pull-share"}  # still taken, under new names
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(page: Path) -> Iterator[str]:
    """Lines of a page's code blocks that call qwenq."""
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        yield from (line for line in block.splitlines() if line.startswith("qwenq "))


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)[1:]


SHOWN = sorted({shlex.join(words_of(line)) for page in PAGES for line in commands(page)})


def parsed(words: list[str]) -> list[Any]:
    """The contexts of a command and its groups, outermost first; click's UsageError where it would exit with 2."""
    contexts = [typer.main.get_command(app).make_context("qwenq", list(words))]
    while hasattr(contexts[-1].command, "resolve_command"):
        rest = [*contexts[-1]._protected_args, *contexts[-1].args]
        name, command, rest = contexts[-1].command.resolve_command(contexts[-1], rest)
        contexts.append(command.make_context(name, rest, parent=contexts[-1]))
    return contexts


def every_command(group: Any = None) -> Iterator[Any]:
    """The commands and their subcommands; those that are imported when they are asked for, imported."""
    for command in (group or typer.main.get_command(app)).commands.values():
        loaded = command.load() if hasattr(command, "load") else command
        yield loaded
        if hasattr(loaded, "commands"):
            yield from every_command(loaded)


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{names(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{names(page)}: {link}"


def test_index_has_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = set(LINK.findall(index.read_text(encoding="utf-8")))
    assert {page.name for page in index.parent.glob("*.md")} - {"README.md"} <= linked


def test_commands_are_found() -> None:
    assert len(SHOWN) > 40


@pytest.mark.parametrize("line", SHOWN)
def test_shown_commands_parse(line: str) -> None:
    parsed(shlex.split(line))


@pytest.mark.parametrize(
    "words", ["plan Qwen2.5-72B --no-such-option", "quantise ./model", "eval out", "vram serve -x"]
)
def test_other_commands_do_not_parse(words: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|extra"):
        parsed(words.split())


def on_shapes_alone(line: str) -> bool:
    """Whether a command needs neither files nor a network: planning, and dry runs, for a family by name."""
    words = shlex.split(line)
    plans = words[0] in ("plan", "vram") or (words[0] == "quantize" and "--dry-run" in words)
    files = {"--recipe", "--profile", "--save-recipe", "-o"}
    return plans and words[1].startswith("Qwen2.5-") and not files & set(words)


@pytest.mark.parametrize("line", [line for line in SHOWN if on_shapes_alone(line)])
def test_planning_commands_answer(line: str) -> None:
    result = run(*shlex.split(line))
    assert result.exit_code == 0, result.output
    assert result.stdout


def test_the_walk_through_says_what_plan_says() -> None:
    """The figures beside the first command of the 72B's walk-through."""
    line = next(line for line in commands(README) if line.startswith("qwenq plan Qwen2.5-72B --gpu"))
    found = re.search(r"fits: ([\d.]+) of ([\d.]+) GiB on each, up to (\d+)k tokens", line)
    assert found
    output = run(*words_of(line)).stdout
    used, limit = re.findall(r"GPU 0 RTX 3090: ([\d.]+) of ([\d.]+) GiB", output)[0]
    largest = re.findall(r"largest context that fits: (\d+)", output)[0]
    assert found.groups() == (f"{float(used):.1f}", f"{float(limit):.1f}", str(int(largest) // 1024))


def test_the_dry_runs_figures_are_what_it_says() -> None:
    """Those of the 72B on the page on quantizing, on a CPU with bfloat16 and on one without."""
    text = " ".join((ROOT / "docs" / "quantize.md").read_text(encoding="utf-8").split())
    files, memory, disk, source, more_memory, more_disk, less = re.findall(
        r"it predicts ([\d.]+) GB of files, ([\d.]+) GB of peak memory and ([\d.]+) GB of disk in addition to the "
        r"([\d.]+) GB source; a CPU that calibrates in float32 needs ([\d.]+) GB of memory and ([\d.]+) GB of disk "
        r"\(([\d.]+) GB less memory with `--no-rotate`\)",
        text,
    )[0]

    def predicted(dtype: str, *words: str) -> tuple[float, ...]:
        dtypes = ("--calibration-dtype", dtype, "--compute-dtype", dtype)
        found = answer("quantize", "Qwen2.5-72B", "--bits", 4, "--dry-run", "--device", "cpu", *dtypes, *words)
        keys = ("file_bytes", "peak_ram_bytes", "disk_needed_bytes", "source_download_bytes")
        return tuple(found[key] / 1e9 for key in keys)

    narrow, wide, unrotated = predicted("bfloat16"), predicted("float32"), predicted("float32", "--no-rotate")
    assert [f"{value:.{2 - (k > 0)}f}" for k, value in enumerate(narrow)] == [files, memory, disk, source]
    assert [f"{value:.1f}" for value in wide[1:3]] == [more_memory, more_disk]
    assert f"{wide[1] - unrotated[1]:.1f}" == less


@pytest.mark.parametrize("page", GUIDES, ids=names)
def test_options_named_in_sentences_exist(page: Path) -> None:
    """`--option`, and `qwenq command --option`, in running text."""
    known = {opt for command in every_command() for p in command.params for opt in (*p.opts, *p.secondary_opts)}
    known |= OLD_OPTIONS
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    groups = {command.name: command for command in every_command()}
    for code in CODE.findall(text):
        words = code.split()
        if words[0] == "qwenq" and len(words) > 1:
            assert words[1] in groups, f"{names(page)}: `{code}`"
        if words[0] == "qwenq" or words[0].startswith("--") or words[0] in groups:
            for option in (word for word in words if word.startswith("--")):
                assert option in known, f"{names(page)}: `{code}`"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:`(?:[A-Z_]+=\S+ )?|^)make ([a-z-]+)", text, re.MULTILINE)
        assert set(named) <= targets, f"{names(page)}: {set(named) - targets}"


@pytest.mark.parametrize(("name", "function"), [("kl-size", "kl_size"), ("qwen25-kl", "kl_by_text")])
def test_plot_is_drawn_from_the_recorded_figures(name: str, function: str) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    drawn = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))[function]()
    assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == drawn, "run make pictures"
