"""Calibration files of every kind, what is refused, and how far two texts overlap."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenq.errors import CalibrationError
from qwenq.model.spec import ModelSpec, spec_from_config
from qwenq.text.calibration import overlap, with_builtin
from qwenq.text.tokens import ModelTokenizer, TokenWindows


@pytest.fixture(scope="module")
def spec(tiny: Path) -> ModelSpec:
    return spec_from_config(json.loads((tiny / "config.json").read_text()))


def refusal(load, name: str | Path, **options: Any) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        load(name, **options)
    assert "\n" not in caught.value.message
    return caught.value


# ---------------------------------------------------------------------- the built-in set beside another text


def test_windows_of_the_builtin_set_replace_others_at_even_distances(
    load, tiny: Path, calib: Path, spec: ModelSpec
) -> None:
    own, all_there_are = load(calib, length=64).ids[:12], load("builtin", length=64, seed=3).ids
    text = TokenWindows(own, "calib.txt", {"kind": "text"})
    mixed = with_builtin(text, 4, ModelTokenizer(tiny), spec, seed=3)
    rows = [own.tolist().index(row) if row in own.tolist() else -1 for row in mixed.ids.tolist()]
    assert rows == [0, -1, 2, 3, -1, 5, 6, -1, 8, 9, -1, 11]
    picked = all_there_are[[int(len(all_there_are) * eighths / 8) for eighths in (1, 3, 5, 7)]]  # from all over the set
    assert torch.equal(mixed.ids[[1, 4, 7, 10]], picked)
    described = mixed.to_json()
    assert (described["text"], described["kind"], described["windows"]) == ("calib.txt", "text", 12)
    assert described["builtin"]["windows"] == 4
    assert described["builtin"]["tokens_sha256"] == TokenWindows(picked, "builtin", {}).sha256


def test_the_builtin_set_replaces_windows_as_far_as_it_goes(load, tiny: Path, calib: Path, spec: ModelSpec) -> None:
    there = len(load("builtin", length=512, seed=0).ids)
    text, tokenizer = load(calib, length=512), ModelTokenizer(tiny)
    text = TokenWindows(text.ids.repeat(1 + there // len(text.ids), 1), "text", {})
    assert with_builtin(text, 0, tokenizer, spec, seed=0) is text
    mixed = with_builtin(text, len(text.ids), tokenizer, spec, seed=0)
    assert int((mixed.ids != text.ids).any(1).sum()) == there < len(text.ids)


# ---------------------------------------------------------------------- kinds of file


def test_plain_text(load, tiny: Path, calib: Path) -> None:
    windows = load(calib)
    (ids,) = ModelTokenizer(tiny).encode([calib.read_text()])
    assert windows.ids.reshape(-1).tolist() == ids[: len(ids) // 16 * 16]
    assert windows.text == "calib.txt"
    text = calib.read_bytes()
    assert windows.provenance == {
        "kind": "file",
        "file_sha256": hashlib.sha256(text).hexdigest(),
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "characters": len(text.decode()),
    }


def test_json_lines_of_text_and_conversations(load, tiny: Path, tmp_path: Path) -> None:
    """Text as it is, conversations through the model's template, the separator between documents."""
    chat = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]
    rows = [{"text": "One line of text. " * 4, "id": 3}, {"messages": chat}, {"text": "The end of it. " * 4}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    tokenizer = ModelTokenizer(tiny)
    first, second, third = tokenizer.encode([rows[0]["text"], tokenizer.render_chat(chat), rows[2]["text"]])
    stream = [*first, 1021, *second, 1021, *third]
    windows = load(path)
    assert windows.ids.reshape(-1).tolist() == stream[: len(stream) // 16 * 16]
    assert windows.provenance["chat"] == "model's template" and 1022 in stream


def test_parquet(load, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    texts = [f"Document number {k} has some words in it. " * 3 for k in range(5)]
    parquet.write_table(pyarrow.table({"text": texts, "other": list(range(5))}), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    assert torch.equal(load(tmp_path / "x.parquet").ids, load(tmp_path / "x.jsonl").ids)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    assert "bad.parquet: not a Parquet file (" in refusal(load, tmp_path / "bad.parquet").message
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "y.parquet")
    assert "y.parquet, row 1: neither `text` nor `messages` in it" in refusal(load, tmp_path / "y.parquet").message


def test_token_ids_are_used_as_they_are(load, tmp_path: Path) -> None:
    ids = np.arange(60, dtype=np.uint16).reshape(6, 10)
    np.save(tmp_path / "x.npy", ids)
    windows = load(tmp_path / "x.npy", length=512)
    assert windows.ids.tolist() == ids.tolist() and windows.ids.dtype == torch.int64
    assert windows.provenance == {"kind": "token ids"}
    assert load(tmp_path / "x.npy", count=2).ids.tolist() == ids[:2].tolist()
    assert load(tmp_path / "x.npy", up_to=4).ids.tolist() == ids[:4].tolist()
    assert refusal(load, tmp_path / "x.npy", count=7).message.endswith("x.npy: 6 windows, 7 asked for")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4)), r"float64 \[2, 4\], wanted whole numbers \[windows, tokens\]"),
        (np.zeros(4, dtype=np.int64), r"int64 \[4\], wanted whole numbers"),
        (np.zeros((0, 4), dtype=np.int64), r"int64 \[0, 4\], wanted whole numbers"),
        (np.full((1, 4), 1024), "token id 1024 is outside the vocabulary of 1024"),
        (np.full((1, 4), -1), "token id -1 is outside the vocabulary of 1024"),
        (np.zeros((1, 513), dtype=np.int32), "windows of 513 tokens, the model reads 512"),
    ],
)
def test_bad_token_ids(array: np.ndarray, message: str, load, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / "x.npy")


def test_a_pickled_array_is_refused(load, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "x.npy: not a NumPy array (" in refusal(load, tmp_path / "x.npy").message


# ---------------------------------------------------------------------- which windows


def test_seeds_shuffle_and_spread_and_none_keeps_order(load, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Text {k}: " + "some words of it " * 20}) for k in range(30)))
    ordered = load(path, count=5)
    assert torch.equal(ordered.ids, load(path).ids[:5])
    first, again, other = (load(path, count=5, seed=seed).ids for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, ordered.ids)
    assert load(path, up_to=7).ids.shape == (7, 16)
    assert load(path, up_to=10_000).ids.shape == load(path).ids.shape


def test_short_text_gives_what_there_is_up_to_a_number(load, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some words of it " * 20)
    windows = load(tmp_path / "x.txt", up_to=128, seed=0)
    assert 1 <= windows.ids.shape[0] < 128


@pytest.mark.parametrize("name", ["builtin", "heldout"])
def test_shipped_sets(name: str, load) -> None:
    windows = load(name, length=64, count=4, seed=0 if name == "builtin" else None)
    assert windows.ids.shape == (4, 64) and windows.text == name and windows.provenance["kind"] == "set"


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty(content: str, load, tmp_path: Path) -> None:
    for name in ("x.txt", "x.jsonl"):
        (tmp_path / name).write_text(content)
        error = refusal(load, tmp_path / name)
        assert (error.message, error.hint) == (
            f"{tmp_path / name}: no text in it", "is it the right file?",
        )  # fmt: skip


def test_too_short_says_which_length_would_do(load, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("four words of it")
    error = refusal(load, tmp_path / "x.txt", length=256)
    assert error.message.startswith(f"{tmp_path / 'x.txt'}: ") and "shorter than one window of 256" in error.message
    length = int(error.hint.split()[1])
    assert load(tmp_path / "x.txt", length=length).ids.shape == (1, length)


def test_a_window_over_the_limit_is_named_before_the_text_is_read(load, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("short")
    error = refusal(load, tmp_path / "x.txt", length=513)
    assert error.message == f"{tmp_path / 'x.txt'}: windows of 513 tokens, the model reads 512"
    assert error.hint == "--sequence-length 512 or less"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON ("),
        ('{"body": "a"}', "neither `text` nor `messages` in it"),
        ('["a"]', "neither `text` nor `messages` in it"),
        ('{"text": 3}', "neither `text` nor `messages` in it"),
        ('{"messages": [{"content": "a"}]}', "messages want role and content, both text"),
        ('{"messages": [{"role": "user", "content": null}]}', "messages want role and content, both text"),
        ('{"messages": ["a"]}', "messages want role and content, both text"),
        ("[" * 100_000, "not JSON ("),
    ],
)
def test_malformed_lines_are_numbered(line: str, message: str, load, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    assert f"x.jsonl, line 3: {message}" in refusal(load, tmp_path / "x.jsonl").message


def test_text_that_is_not_utf8(load, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"ok \xff")
    assert refusal(load, tmp_path / "x.txt").message == f"{tmp_path / 'x.txt'}: not UTF-8 text (byte 3)"
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "x.jsonl, line 2: not JSON (" in refusal(load, tmp_path / "x.jsonl").message


def test_unknown_names(load, tmp_path: Path) -> None:
    error = refusal(load, "nosuchset")
    assert error.message == "nosuchset: no such file, nor a set of that name"
    assert error.hint.startswith("sets: builtin, heldout, c4, ")
    assert refusal(load, tmp_path).message == f"{tmp_path}: a directory, wanted a file"
    (tmp_path / "x.docx").touch()
    assert refusal(load, tmp_path / "x.docx").message == f"{tmp_path / 'x.docx'}: cannot read .docx"


def test_a_hub_set_without_its_package(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    error = refusal(load, "wikitext2")
    assert "comes from the hub" in error.message and "qwenq[hub]" in error.hint


# ---------------------------------------------------------------------- overlap


def test_overlap_by_hand(tmp_path: Path) -> None:
    """Shingles of 13 words: of 20 words 8 shingles; ten of them repeated elsewhere hold none, 16 hold 4."""
    words = [f"w{k}" for k in range(20)]
    held = tmp_path / "held.txt"
    held.write_text(" ".join(words))
    for shared, wanted in ((10, 0), (13, 1), (16, 4), (20, 8)):
        other = tmp_path / f"{shared}.txt"
        other.write_text("other text " + "\n".join(words[:shared]) + " goes on")
        assert overlap(str(other), str(held)) == wanted / 8
    assert overlap(str(held), str(held)) == 1.0
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert overlap(str(held), str(short)) == 0.0


def test_overlap_counts_all_the_text_that_is_calibrated_on(tmp_path: Path) -> None:
    words = [f"w{k}" for k in range(40)]
    for name, part in {"a": words[:20], "b": words[20:], "held": words}.items():
        (tmp_path / name).with_suffix(".txt").write_text(" ".join(part))
    first, second, held = (str(tmp_path / f"{name}.txt") for name in ("a", "b", "held"))
    assert overlap(first, held) == overlap(second, held) == 8 / 28
    assert overlap(first, held, second) == 16 / 28


def test_overlap_reads_conversations(tmp_path: Path) -> None:
    words = " ".join(f"w{k}" for k in range(15))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": words}]}))
    (tmp_path / "held.txt").write_text(words)
    assert overlap(str(tmp_path / "chat.jsonl"), str(tmp_path / "held.txt")) == 1.0


def test_the_test_texts_do_not_overlap(calib: Path, heldout: Path) -> None:
    assert overlap(str(calib), str(heldout)) == 0.0
