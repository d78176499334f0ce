"""The calibration and held-out text as shipped, and what the recipes of named sets ask the hub for."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwenq.errors import CalibrationError
from qwenq.text.calibration import _corpus, overlap, set_names

SETS = Path(__file__).parents[2] / "calibration"
KINDS = {"chat", "prose", "code", "math", "tables", "chinese", "multilingual"}
RECIPES = sorted(path.stem for path in SETS.glob("*.toml"))


def documents(folder: str) -> list[tuple[str, str]]:
    """File name and text of every document of a set; a conversation's turns are joined."""
    found = []
    for path in sorted((SETS / folder).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.append(
                (path.stem, row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"]))
            )
    return found


@pytest.mark.parametrize("folder", ["builtin", "heldout"])
def test_every_line_is_a_document(folder: str) -> None:
    files = sorted((SETS / folder).glob("*.jsonl"))
    assert {path.stem for path in files} == KINDS
    for path in files:
        raw = path.read_bytes()
        assert raw.endswith(b"\n") and b"\r" not in raw and b"\\u" not in raw.replace(b"\\\\u", b"")
        for number, line in enumerate(raw.decode("utf-8").splitlines(), 1):
            row, where = json.loads(line), f"{path.name}, line {number}"
            if "text" in row:
                assert path.stem != "chat" and set(row) == {"text"} and len(row["text"]) > 100, where
                continue
            assert set(row) == {"messages"} and all(set(m) == {"role", "content"} for m in row["messages"]), where
            roles = [m["role"] for m in row["messages"]]
            turns = roles[roles[0] == "system" :]
            assert turns == (["user", "assistant"] * len(turns))[: len(turns)], where
            assert all(m["content"].strip() for m in row["messages"]), where


def test_sizes_are_those_of_the_readme() -> None:
    readme = (SETS / "README.md").read_text(encoding="utf-8")
    sizes = {
        folder: sum(p.stat().st_size for p in (SETS / folder).glob("*.jsonl")) for folder in ("builtin", "heldout")
    }
    assert sizes["builtin"] > 100_000 and sizes["heldout"] > 40_000
    for folder, size in sizes.items():
        assert f"| **Total** | **{len(documents(folder))}** | **{size:,}** | |" in readme
        for path in (SETS / folder).glob("*.jsonl"):
            rows = len(path.read_text(encoding="utf-8").splitlines())
            assert f"| `{path.name}` | {rows} | {path.stat().st_size:,} |" in readme


def test_no_document_twice() -> None:
    texts = [" ".join(text.split()) for folder in ("builtin", "heldout") for _, text in documents(folder)]
    assert len(set(texts)) == len(texts)
    beginnings = [text[:60] for text in texts if not text.startswith(("You have access", "Tools, called"))]
    assert len(set(beginnings)) == len(beginnings)


def test_held_out_text_shares_nothing_with_calibration_text() -> None:
    """No 13 words in a row, and for scripts without spaces no 20 letters."""

    def words(folder: str) -> set[tuple[str, ...]]:
        return {tuple(w[i : i + 13]) for _, t in documents(folder) for w in [t.split()] for i in range(len(w) - 12)}

    def letters(folder: str) -> set[str]:
        prose = [t for kind, t in documents(folder) if kind in ("chinese", "multilingual", "prose")]
        return {t[i : i + 20] for t in prose for i in range(len(t) - 19)}

    assert words("heldout") and not words("builtin") & words("heldout")
    assert letters("heldout") and not letters("builtin") & letters("heldout")
    assert overlap("builtin", "heldout") == 0  # this Python's documentation and library included


def test_python_in_the_code_parses() -> None:
    texts = [t for folder in ("builtin", "heldout") for kind, t in documents(folder) if kind == "code"]
    python = [t for t in texts if re.search(r"^(import \w+|from \w+ import .*)$", t, re.M) and "\ndef " in t]
    assert len(python) >= 2
    for text in python:
        ast.parse(text)


class Rows:
    """What `load_dataset(..., streaming=True)` gives back, as far as it is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def take(self, count: int) -> Iterator[dict[str, Any]]:
        return iter(self.rows[:count])


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the datasets package that remembers what it was asked for."""
    module = ModuleType("datasets")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}]
    rows = [{"text": f"row {k}", "messages": turns, "url": "x"} for k in range(50_000)]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Rows:
        calls.append((args, kwargs))
        return Rows(rows)

    module.calls, module.load_dataset = calls, load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


ASKED = {
    "c4": ("allenai/c4", "en", "train", 4096),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", 2048),
    "wikipedia-zh": ("wikimedia/wikipedia", "20231101.zh", "train", 2048),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", 36718),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_ask_for_the_right_rows(name: str, datasets: Any) -> None:
    dataset, subset, split, rows = ASKED[name]
    corpus = _corpus(name)
    found, provenance = corpus.documents, corpus.provenance
    ((args, kwargs),) = datasets.calls
    assert args == ((dataset, subset) if args[1:] else (dataset,))
    assert kwargs == {"split": split, "revision": kwargs.get("revision"), "streaming": True}
    assert provenance["dataset"] == dataset and provenance["split"] == split
    text = "".join(d.text + "".join(m["content"] for m in d.messages) for d in found)
    if name == "ultrachat":
        assert len(found) == rows and found[0].messages[1] == {"role": "assistant", "content": "good morning"}
    else:
        assert "row 0" in text and f"row {rows - 1}" in text and f"row {rows}" not in text


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete_and_described(name: str) -> None:
    text = (SETS / f"{name}.toml").read_text(encoding="utf-8")
    recipe = tomllib.loads(text)
    assert set(recipe) >= {"dataset", "split", "rows", "columns"}
    assert list(recipe["columns"]) in (["text"], ["messages"])
    assert "# Licence: " in text and "# Size: " in text
    readme = (SETS / "README.md").read_text(encoding="utf-8")
    assert f"| `{name}` | `{recipe['dataset']}`" in readme and f"| {recipe['rows']:,} |" in readme
    assert name in set_names()


def test_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError) as caught:
        _corpus("c4")
    assert "c4" in caught.value.message and "allenai/c4" in caught.value.message
    assert "qwenq[hub]" in caught.value.hint and "builtin" in caught.value.hint


def test_a_set_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, datasets: Any) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Rows:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CalibrationError) as caught:
        _corpus("wikitext2")
    assert "Couldn't reach the Hub" in caught.value.message and "\n" not in caught.value.message
    assert "network" in caught.value.hint

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Rows([{"body": "another column"}]))
    with pytest.raises(CalibrationError, match="neither `text` nor `messages`"):
        _corpus("wikitext2")
