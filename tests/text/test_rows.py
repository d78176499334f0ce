"""Rows of data sets in every shape that is read, what is refused by name, and files from small to endless."""

from __future__ import annotations

import gzip
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenq.errors import CalibrationError, CheckpointError
from qwenq.io.json import check_regular, open_regular, read_limited, read_object
from qwenq.text import corpus
from qwenq.text.calibration import overlap
from qwenq.text.conversation import Document, fitted, read_messages, read_row
from qwenq.text.corpus import SMALL_ROWS_BYTES, SMALL_TEXT_BYTES, Sample, read_corpus
from qwenq.text.tokens import ModelTokenizer

USER, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add"}}
SPEAK = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}


def chat(*messages: Any, **more: Any) -> Document:
    return Document("", tuple(messages), **more)


SYSTEM = {"role": "system", "content": "Be brief."}

READ: list[tuple[str, Any, Document]] = [
    ("a column without a name, an index say", {"": 7, "question": "Hi", "answer": "Yes?"}, chat(USER, YES)),
    ("text", {"text": "abc", "id": 3}, Document("abc")),
    ("a string", "abc", Document("abc")),
    ("content, as code sets have it", {"content": "x = 1", "path": "a.py"}, Document("x = 1")),
    ("messages", {"messages": [USER, YES]}, chat(USER, YES)),
    ("ShareGPT", {"conversations": [*SPEAK], "id": "a"}, chat(USER, YES)),
    ("ShareGPT with a system", {"conversations": [*SPEAK], "system": "Be brief."}, chat(SYSTEM, USER, YES)),
    ("ShareGPT's other names",
     {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes?"}]}, chat(USER, YES)),
    ("conversations with roles", {"conversations": [USER, YES]}, chat(USER, YES)),
    ("conversation", {"conversation": [USER, YES]}, chat(USER, YES)),
    ("ShareGPT's calls",
     {"conversations": [SPEAK[0], {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                        {"from": "observation", "value": "3"}], "tools": json.dumps([TOOL])},
     chat(USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"},
          tools=(TOOL,))),
    ("Alpaca", {"instruction": "Hi", "input": "", "output": "Yes?"}, chat(USER, YES)),
    ("Alpaca with input", {"instruction": "Sort", "input": "3 1", "output": "1 3"},
     chat({"role": "user", "content": "Sort\n\n3 1"}, {"role": "assistant", "content": "1 3"})),
    ("Alpaca without input", {"instruction": "Hi", "output": "Yes?"}, chat(USER, YES)),
    ("Alpaca with a history", {"instruction": "Hi", "output": "Yes?", "history": [["a", "b"]]},
     chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER, YES)),
    ("Dolly", {"instruction": "Sort", "context": "3 1", "response": "1 3", "category": "x"},
     chat({"role": "user", "content": "Sort\n\n3 1"}, {"role": "assistant", "content": "1 3"})),
    ("prompt and completion", {"prompt": "The sky is", "completion": " blue."}, Document("The sky is blue.")),
    ("prompt and completion of messages", {"prompt": [USER], "completion": [YES]}, chat(USER, YES)),
    ("prompt and completion with a system", {"prompt": "Hi", "completion": "Yes?", "system": "Be brief."},
     chat(SYSTEM, USER, YES)),
    ("prompt and completion with a context", {"prompt": "Sort", "completion": "1 3", "context": "3 1", "system": ""},
     chat({"role": "user", "content": "Sort\n\n3 1"}, {"role": "assistant", "content": "1 3"})),
    ("prompt and completion with a history", {"prompt": "Hi", "completion": "Yes?", "history": [["a", "b"]]},
     chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER, YES)),
    ("prompt and completion with tools", {"prompt": "Hi", "completion": "Yes?", "tools": [TOOL]},
     chat(USER, YES, tools=(TOOL,))),
    ("a system prompt twice", {"messages": [SYSTEM, USER], "system_prompt": "Be brief."}, chat(SYSTEM, USER)),
    ("prompt and response", {"prompt": "Hi", "response": "Yes?"}, chat(USER, YES)),
    ("question and answer", {"question": "Hi", "answer": "Yes?"}, chat(USER, YES)),
    ("SQuAD, flattened", {"question": "Sort", "context": "3 1", "answer": "1 3"},
     chat({"role": "user", "content": "Sort\n\n3 1"}, {"role": "assistant", "content": "1 3"})),
    ("messages as their JSON", {"messages": json.dumps([USER, YES])}, chat(USER, YES)),
    ("ShareGPT as its JSON", {"conversations": json.dumps(SPEAK), "text": "x"}, chat(USER, YES)),
    ("text in brackets", {"conversation": "[INST] Hi [/INST]", "text": "abc"}, Document("abc")),
    ("OpenOrca", {"system_prompt": "Be brief.", "question": "Hi", "response": "Yes?"}, chat(SYSTEM, USER, YES)),
    ("UltraFeedback", {"prompt": "Hi", "messages": [USER, YES], "chosen": [USER, YES], "rejected": [USER, USER]},
     chat(USER, YES)),
    ("content parts",
     {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
     chat({"role": "user", "content": "a\nb"})),
    ("no content beside calls", {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
     chat(USER, {"role": "assistant", "tool_calls": [CALL]})),
    ("arguments as text", {"messages": [{"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}]},
     chat({"role": "assistant", "tool_calls": [CALL]})),
    ("tools", {"messages": [USER], "tools": [TOOL]}, chat(USER, tools=(TOOL,))),
    ("functions", {"messages": [USER], "functions": [{"name": "add"}]}, chat(USER, tools=(TOOL,))),
    ("settings of a template", {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
     chat(USER, settings={"enable_thinking": False})),
    ("empty columns", {"messages": [USER], "images": [], "tools": None, "text": None}, chat(USER)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "document"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_rows_whose_meaning_is_plain(row: Any, document: Document) -> None:
    assert read_row(row, "x") == document


REFUSED: list[tuple[Any, str]] = [
    ({"body": "x"}, "neither `text` nor `messages` in it; it has body"),
    ({"role": "user", "content": "x"}, "neither `text` nor `messages`"),
    ({"question": "a", "answer": "b", "history": 3}, "history wants pairs of texts"),
    ({"messages": [SYSTEM, USER], "system": "Be kind."}, "two system prompts that differ, of which one is read"),
    ({"messages": [USER], "system": "Be brief.", "system_prompt": "Be kind."}, "two system prompts that differ"),
    ({"messages": [USER], "images": ["a.png"]}, "a conversation with images, which is not read"),
    ({"messages": [USER], "chosen": YES, "rejected": USER}, "a conversation with chosen, which is not read"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
     "content has a part of type 'image_url'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages want role and content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages want role and content"),
    ({"prompt": [USER], "chosen": [YES], "rejected": [YES]},
     "neither `text` nor `messages` in it; it has prompt, chosen"),
    ({"messages": [YES | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "arguments of f: not JSON"),
    ({"messages": [YES | {"tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
     "arguments of f are no JSON object"),
    ({"messages": [USER], "tools": "add"}, "tools: not JSON"),
    ({"messages": [USER], "tools": [3]}, "tools want a list of objects"),
    ({"messages": [USER], "tools": [TOOL], "functions": [{"name": "f"}]}, "both tools and functions"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "`from` is 'narrator'"),
    ({"conversations": [{"from": "human", "value": None}]}, "`value` a NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED, ids=[case[1][:40] for case in REFUSED])
def test_rows_that_are_refused_by_name(row: Any, message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        read_row(row, "x.jsonl, line 1")
    assert caught.value.message.startswith("x.jsonl, line 1: ") and message in caught.value.message


# ---------------------------------------------------------------------- what templates are shown

PLAIN = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
FULL = "{{ tools }}{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls }}{{ m.mood }}{% endfor %}"


@pytest.mark.parametrize(
    ("document", "template", "message"),
    [
        (chat(USER, tools=(TOOL,)), PLAIN, "tools are given, and the model's chat template does not render them"),
        (chat(USER, tools=(TOOL,)), None, "tools are given, and ChatML"),
        (chat(USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}), PLAIN, "has tool_calls"),
        (
            chat({**USER, "function_call": {"name": "f"}}),
            PLAIN,
            "a message has 'function_call', which is not understood",
        ),
        (chat({**USER, "images": ["a.png"]}), PLAIN, "a message has 'images'"),
        (chat({**USER, "mood": "calm"}), PLAIN, "a message has 'mood'"),
        (
            chat({"role": "critic", "content": "x"}),
            PLAIN,
            "role 'critic', which the model's chat template does not name",
        ),
        (chat(USER, settings={"messages": []}), PLAIN, "chat_template_kwargs cannot say messages"),
    ],
)
def test_what_a_template_would_leave_out_is_refused(document: Document, template: str | None, message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        fitted(document, template, "here")
    assert caught.value.message.startswith("here: ") and message in caught.value.message


def test_what_changes_nothing_is_let_through() -> None:
    noted = {**USER, "id": 7, "timestamp": "now", "refusal": None, "audio": [], "weight": 1, "reasoning_content": "so"}
    (message,) = fitted(chat(*read_messages([noted])), PLAIN, "x")
    assert message["content"] == "Hi" and "refusal" not in message
    for document in (chat({**USER, "mood": "calm"}), chat(USER, tools=(TOOL,))):
        assert fitted(document, FULL, "x") == document.messages  # this template names them
    developer = {"role": "developer", "content": "Be brief."}
    assert fitted(chat(developer, USER), PLAIN, "x")[0]["role"] == "system"
    assert fitted(chat(developer, USER), PLAIN + "{# developer #}", "x")[0]["role"] == "developer"


# ---------------------------------------------------------------------- files


ROWS = [{"text": f"Document number {k} has some words in it. Ünïcödé 你好 " * 3} for k in range(50)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("x.jsonl.gz", gzip.compress(LINES.encode())),
        ("parts.jsonl.gz", gzip.compress(LINES[:100].encode()) + gzip.compress(LINES[100:].encode())),
        ("x.JSONL", LINES.encode()),
        ("array.json", json.dumps(ROWS, indent=2).encode()),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode()),
        ("strings.json", json.dumps([row["text"] for row in ROWS]).encode()),
        ("lines.json", LINES.encode()),
        ("data.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("array.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    ],
)
def test_files_of_every_kind_hold_the_same(name: str, content: bytes, load: Any, tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_text(LINES)
    (tmp_path / name).write_bytes(content)
    for options in ({}, {"count": 5, "seed": 3}):
        wanted, found = load(tmp_path / "plain.jsonl", **options), load(tmp_path / name, **options)
        assert found.sha256 == wanted.sha256
        assert found.provenance["text_sha256"] == wanted.provenance["text_sha256"]


def test_plain_text_with_a_mark_and_other_line_ends(load: Any, tmp_path: Path) -> None:
    text = "Line one.\nLine two.\n\nÜnïcödé. " * 20
    (tmp_path / "x.txt").write_text(text)
    for name, content in (
        ("y.txt", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()),
        ("y.txt.gz", gzip.compress(text.encode())),
    ):
        (tmp_path / name).write_bytes(content)
        assert load(tmp_path / name).sha256 == load(tmp_path / "x.txt").sha256
    (tmp_path / "z.txt").write_text(text, encoding="utf-16")
    with pytest.raises(CalibrationError, match="not UTF-8 text") as caught:
        load(tmp_path / "z.txt")
    assert caught.value.hint == "it is UTF-16: save it as UTF-8"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES.encode())[:-20], "not a whole gzip file"),
        ("no.jsonl.gz", LINES.encode(), "not a whole gzip file"),
        ("cut.json", json.dumps(ROWS).encode()[:-1], "its array does not end"),
        ("mid.json", json.dumps(ROWS).encode()[:-20], "row 50: not JSON"),
        ("deep.json", b"[" * 100_000, "nested too deep"),
        ("x.jsonl", json.dumps(ROWS, indent=1).encode(), "line 1: not JSON"),
        ("x.parquet.gz", b"", "cannot read .gz"),
        ("x.gz", b"", "cannot read .gz"),
        ("empty.json", b"", "no text in it"),
        ("none.json", b"[]", "no text in it"),
    ],
)
def test_files_that_are_none(name: str, content: bytes, message: str, load: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load(tmp_path / name)
    assert message in caught.value.message and caught.value.message.isprintable()


def test_an_array_on_one_line_of_jsonl_is_called_one(load: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(ROWS))
    with pytest.raises(CalibrationError, match=r"line 1: neither `text` nor `messages` in it$") as caught:
        load(tmp_path / "x.jsonl")
    assert caught.value.hint == "an array goes into a .json file"


def test_one_bad_row_in_many_is_left_out_and_counted(load: Any, tmp_path: Path) -> None:
    lines = LINES.splitlines()
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    bad = [*lines[:7], '{"text": "cut', *lines[7:20], '{"body": 1}', *lines[20:]]
    (tmp_path / "x.jsonl").write_text("\n".join(bad))
    found = load(tmp_path / "x.jsonl")
    assert found.ids.tolist() == load(tmp_path / "good.jsonl").ids.tolist()
    assert found.provenance["skipped_rows"] == 2 and "line 8: not JSON" in found.provenance["first_skipped"]
    assert "skipped_rows" not in load(tmp_path / "good.jsonl").provenance
    with pytest.raises(CalibrationError, match="line 8: not JSON"):
        load(tmp_path / "x.jsonl", strict=True)
    (tmp_path / "y.jsonl").write_text("\n".join(['{"body": 1}'] * 6 + lines))
    with pytest.raises(CalibrationError, match="line 1: neither `text`") as caught:
        load(tmp_path / "y.jsonl")
    assert caught.value.hint.startswith("6 of 56 rows are like this one; wanted `text`")


def test_parquet_of_conversations(load: Any, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    talks = [[{**USER, "content": f"Hi {k} " * 9, "name": None}, YES] for k in range(30)]
    parquet.write_table(pyarrow.table({"conversations": talks, "score": [1.0] * 30}), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    assert load(tmp_path / "x.parquet").sha256 == load(tmp_path / "x.jsonl").sha256


# ---------------------------------------------------------------------- large files


def numbered(path: Path, rows: int, words: int = 12) -> Path:
    """Rows that tell where they were: `row K ` over and over."""
    with open(path, "w") as file:
        for k in range(rows):
            file.write(json.dumps({"text": f"row {k} " * words}) + "\n")
    return path


def places(documents: list[Document]) -> list[int]:
    return [int(document.text.split()[1]) for document in documents]


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files over 64 KiB are large, so that tests of them are quick."""
    from dataclasses import replace

    for ending, kind in corpus._KINDS.items():
        monkeypatch.setitem(corpus._KINDS, ending, replace(kind, small_bytes=1 << 16))
    monkeypatch.setattr(corpus, "SMALL_ROWS_BYTES", 1 << 16)


def packed(path: Path) -> Path:
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    return Path(f"{path}.gz")


def array(path: Path) -> Path:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    return path.with_suffix(".json")


def parquet_of(path: Path) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    parquet.write_table(
        pyarrow.table({"text": rows}), path.with_suffix(".parquet"), row_group_size=100, compression=None
    )
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("make", [lambda path: path, packed, array, parquet_of], ids=["jsonl", "gz", "json", "parquet"])
@pytest.mark.usefixtures("small_limits")
def test_large_files_are_sampled_over_the_whole_by_the_seed(make: Any, tmp_path: Path) -> None:
    path = make(numbered(tmp_path / "x.jsonl", 20_000))
    drawn = {seed: places(read_corpus(path, Sample(40_000, seed)).documents) for seed in (0, 1)}
    assert drawn[0] == places(read_corpus(path, Sample(40_000, 0)).documents) and drawn[0] != drawn[1]
    for found in drawn.values():
        assert len(set(found)) == len(found) > 200  # none twice
        quarters = np.bincount(np.array(found) // 5000, minlength=4)
        assert quarters.min() > 0.1 * quarters.sum(), quarters
    beginning = places(read_corpus(path, Sample(40_000, None)).documents)
    assert beginning[:200] == list(range(200)) and len(beginning) < 1000
    assert read_corpus(path, Sample(40_000, 0)).sampled


@pytest.mark.parametrize("make", [lambda path: path, packed], ids=["txt", "gz"])
@pytest.mark.usefixtures("small_limits")
def test_large_texts_are_sampled_in_whole_lines(make: Any, tmp_path: Path) -> None:
    lines = [f"line {k} ünïcödé 你好 🙂" for k in range(40_000)]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    path = make(tmp_path / "x.txt")
    found = read_corpus(path, Sample(100_000, 0)).documents
    known, got = set(lines), [line for document in found for line in document.text.split("\n") if line]
    assert set(got) <= known and len(set(got)) == len(got) > 2000
    quarters = np.bincount([int(line.split()[1]) // 10_000 for line in got], minlength=4)
    assert quarters.min() > 0.1 * quarters.sum(), quarters
    (beginning,) = read_corpus(path, Sample(1000, None)).documents
    assert (tmp_path / "x.txt").read_text().startswith(beginning.text) and len(beginning.text) >= 1000
    (tmp_path / "one.txt").write_text("你好🙂" * 50_000)  # no line in it
    pieces = read_corpus(tmp_path / "one.txt", Sample(100_000, 0)).documents
    assert set("".join(document.text for document in pieces)) == set("你好🙂")
    (tmp_path / "bad.txt").write_bytes(b"a" * (1 << 17) + b"\xff" * (1 << 17))
    with pytest.raises(CalibrationError, match=r"bad.txt: not UTF-8 text \(byte 1\d+\)"):
        read_corpus(tmp_path / "bad.txt", Sample(1_000_000, 0))


def test_small_files_are_read_whole(load: Any, tmp_path: Path) -> None:
    """The stated sizes: up to them every row and every line counts, as ever."""
    assert (SMALL_TEXT_BYTES, SMALL_ROWS_BYTES) == (4 << 20, 16 << 20)
    path = numbered(tmp_path / "x.jsonl", 1000)
    assert places(read_corpus(path, Sample(100, 0)).documents) == list(range(1000))
    text = "some words\n" * (SMALL_TEXT_BYTES // 11)
    (tmp_path / "x.txt").write_text(text)
    assert read_corpus(tmp_path / "x.txt", Sample(100, 0)).documents == [Document(text)]
    (tmp_path / "x.txt").write_text(text + "some words\n" * 2)
    assert read_corpus(tmp_path / "x.txt", Sample(100, 0)).sampled


def test_windows_of_a_large_text_in_bounded_time_and_memory(load: Any, tmp_path: Path) -> None:
    """20 MB of text for 8 windows: seconds and megabytes, where 46 s and 3.2 GB were taken."""
    with open(tmp_path / "x.txt", "w") as file:
        for k in range(400_000):
            file.write(f"This is line number {k} of a long text of lines.\n")
    assert (tmp_path / "x.txt").stat().st_size > 19_000_000
    load(tmp_path / "x.txt", length=64, count=1, seed=0)
    before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = load(tmp_path / "x.txt", length=512, count=8, seed=0)
    assert found.ids.shape == (8, 512) and found.provenance["file_bytes"] > 19_000_000
    assert overlap(str(tmp_path / "x.txt"), str(tmp_path / "x.txt")) == 1.0
    assert time.process_time() - clock < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    assert found.sha256 == load(tmp_path / "x.txt", length=512, count=8, seed=0).sha256
    assert found.sha256 != load(tmp_path / "x.txt", length=512, count=8, seed=1).sha256


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.npy", "x.parquet", "x.jsonl.gz"])
def test_sparse_files_of_20_gb(name: str, load: Any, tmp_path: Path) -> None:
    """Zero bytes without a line break: refused, or read as far as windows need, in seconds."""
    if name == "x.parquet":
        pytest.importorskip("pyarrow.parquet")
    with open(tmp_path / name, "wb") as file:
        file.truncate(20 << 30)
    clock = time.process_time()
    try:
        load(tmp_path / name, length=32, count=2, seed=0)
    except CalibrationError as error:
        assert error.message.isprintable()
    assert time.process_time() - clock < 10


def test_a_bomb_in_gzip_is_not_unpacked_to_its_end(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_STREAM_BYTES", 32 << 20)
    with gzip.open(tmp_path / "x.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b'{"text": "' + b"a" * (1 << 20) + b'"}\n')
    with pytest.raises(CalibrationError, match="more than 33554432 bytes, which must be read from the beginning"):
        load(tmp_path / "x.jsonl.gz", count=2, seed=0)


# ---------------------------------------------------------------------- regular files


@pytest.fixture(params=["fifo", "device", "directory", "missing"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "special"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "directory":
        path.mkdir()
    return path


def test_what_is_no_regular_file_is_refused_without_waiting(special: Path) -> None:
    for read in (open_regular, lambda path: read_limited(path, 10), lambda path: check_regular(path, 10), read_object):
        with pytest.raises(CheckpointError, match=r"special: (not a regular file|No such file)"):
            read(special)
    with pytest.raises(CalibrationError):
        open_regular(special, CalibrationError)


def test_files_have_a_limit_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_limited(tmp_path / "x", 5) == b"12345"
    with pytest.raises(CheckpointError, match=r"^x: 5 bytes, more than the 4 such a file can need$"):
        read_limited(tmp_path / "x", 4)
    with pytest.raises(CheckpointError, match=r"environ: 11 bytes, more than the 10"):  # of those whose size is 0
        read_limited(Path("/proc/self/environ"), 10)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.npy", "x.parquet", "x.txt.gz"])
def test_calibration_files_that_never_answer(name: str, load: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CalibrationError, match="not a regular file"):
        load(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CalibrationError, match="not a regular file"):
        load(tmp_path / name)


TOKENIZER_PARTS = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
                   "added_tokens.json", "merges.txt", "vocab.json", "config.json"]  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZER_PARTS)
@pytest.mark.parametrize("kind", ["fifo", "sparse", "directory"])
def test_tokenizer_files_that_never_end(name: str, kind: str, tiny: Path, tmp_path: Path) -> None:
    for part in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / part).write_bytes((tiny / part).read_bytes())
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(20 << 30)
    wanted = rf"{name}: \d+ bytes, more than the \d+ such a file can need" if kind == "sparse" else "not a regular file"
    clock = time.monotonic()
    with pytest.raises(CheckpointError, match=wanted):
        ModelTokenizer(tmp_path).render_chat([USER])
    assert time.monotonic() - clock < 10


def test_more_templates_in_a_folder_of_their_own(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (tmp_path / "chat_template.jinja").write_text("default")
    (more / "tool_use.jinja").write_text("{{ tools | length }}")
    assert ModelTokenizer(tmp_path).render_chat([USER]) == "default"
    assert ModelTokenizer(tmp_path).render_chat([USER], tools=[TOOL]) == "1"
    (more / "tool_use.jinja").unlink()
    (more / "tool_use.jinja").symlink_to(tiny / "config.json")
    with pytest.raises(CheckpointError, match=r"tool_use.jinja links to a file outside"):
        ModelTokenizer(tmp_path).render_chat([USER])


def test_a_long_row_is_encoded_in_pieces_and_a_long_conversation_is_left_out() -> None:
    most = corpus.MAX_DOCUMENT_CHARACTERS
    text, chat = "x" * (2 * most + 5), [{"role": "user", "content": "y" * (most + 1)}]
    found = list(corpus.read_rows([{"text": text}, {"messages": chat}], lambda number: f"row {number}"))
    pieces = [item.text for item in found if isinstance(item, Document)]
    assert [len(piece) for piece in pieces] == [most, most, 5] and "".join(pieces) == text
    assert str(found[3]) == "row 2: a conversation of 1,048,577 characters, wanted at most 1,048,576"
