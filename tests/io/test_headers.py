"""Safetensors headers: literal bytes, and every way a hostile file can lie."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.errors import CheckpointError
from qwenq.io.json import parse_object, read_object
from qwenq.io.safetensors import INDEX_NAME, TensorSpec, checkpoint_tensors, read_header

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen2"


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_literal_bytes(tmp_path: Path) -> None:
    first, second = (
        b'"dtype":"F16","shape":[2,3],"data_offsets":[0,12]',
        b'"dtype":"I8","shape":[],"data_offsets":[12,13]',
    )
    header = b'{"a":{' + first + b'},"b":{' + second + b"}}  "
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(13)))
    found = read_header(path)
    base = 8 + len(header)
    assert list(found) == ["a", "b"]
    assert found["a"].spec == TensorSpec("a", "F16", (2, 3))
    assert (found["a"].start, found["a"].end) == (base, base + 12)
    assert path.read_bytes()[found["b"].start : found["b"].end] == b"\x0c"
    assert checkpoint_tensors(tmp_path) == found


def test_sharded_checkpoint_against_the_reference_reader() -> None:
    safetensors = pytest.importorskip("safetensors")
    found = checkpoint_tensors(TINY)
    seen = {}
    for file in sorted(TINY.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as reader:
            for name in reader.keys():  # noqa: SIM118 (a reader, not a dict)
                part = reader.get_slice(name)
                seen[name] = (part.get_dtype(), tuple(part.get_shape()), file.name)
    assert {n: (t.spec.dtype, t.spec.shape, t.file.name) for n, t in found.items()} == seen
    assert all(t.end - t.start == t.spec.nbytes for t in found.values())


BAD_HEADERS = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, r"tensor b starts at data byte 2, wanted 4"),
    "hole": ({"a": entry(0, 4), "b": entry(5, 6)}, 6, r"tensor b starts at data byte 5, wanted 4"),
    "past the end": ({"a": entry(0, 9)}, 6, r"tensor a ends at byte"),
    "unindexed tail": ({"a": entry(0, 4)}, 6, r"2 bytes after the last tensor"),
    "size against shape": ({"a": entry(0, 4, "F16", [4])}, 4, r"tensor a: 4 bytes of data, but F16 \[4\] takes 8"),
    "backwards": ({"a": entry(4, 0, shape=[4])}, 4, r"tensor a: -4 bytes"),
    "unknown dtype": ({"a": entry(0, 4, "Q4_K")}, 4, r"tensor a: dtype Q4_K is unknown"),
    "dtype not text": ({"a": {"dtype": ["F16"], "shape": [2], "data_offsets": [0, 4]}}, 4, r"dtype .* unknown"),
    "negative dimension": ({"a": entry(0, 4, shape=[-4])}, 4, r"tensor a: shape \[-4\]"),
    "boolean dimension": ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, 1, r"shape \[True\]"),
    "fractional offset": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1.0]}}, 1, r"data_offsets"),
    "huge offset": ({"a": entry(0, 1 << 63)}, 4, r"shape \[9223372036854775808\]"),
    "many dimensions": ({"a": entry(0, 1, shape=[1] * 17)}, 1, r"up to 16 sizes"),
    "extra key": ({"a": {**entry(0, 1), "x": 1}}, 1, r"tensor a: wanted exactly"),
    "entry not an object": ({"a": 3}, 0, r"tensor a: wanted exactly"),
    "metadata": ({"__metadata__": {"format": 1}}, 0, r"__metadata__"),
    "duplicate": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', 1, r"a appears twice"),
    "array": (b"[1,2]", 0, r"wanted an object"),
    "not json": (b"{nope}", 0, r"not JSON"),
    "nan": (b'{"a":NaN}', 0, r"NaN"),
    "not utf-8": (b'{"\xff":1}', 0, r"not JSON"),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0, r"nested too deep|not JSON"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", 0, r"a number of 5000 digits"),
    "escape in a name": ({"a\x1b[31m\n": 3}, 0, r"tensor a\\x1b\[31m\\x0a: wanted"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_named(name: str, tmp_path: Path) -> None:
    header, n_data, message = BAD_HEADERS[name]
    path = write(tmp_path / "model.safetensors", header, bytes(n_data))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "\n" not in caught.value.message and caught.value.message.startswith("model.safetensors: ")


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**64 - 1, 1000])
def test_impossible_header_lengths(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"header length {length} is not possible"):
        read_header(write(tmp_path / "x.safetensors", b"{}", length=length))


def test_short_file_pointer_and_odd_files(tmp_path: Path) -> None:
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="too short"):
        read_header(tmp_path / "short.safetensors")
    (tmp_path / "lfs.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "lfs.safetensors")
    assert "git lfs pull" in caught.value.hint
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "none.safetensors")


def index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.safetensors"}, "leads out"),
        ({"a": "/tmp/x.safetensors"}, "leads out"),
        ({"a": "sub\\x.safetensors"}, "leads out"),
        ({"a": "x\0.safetensors"}, "leads out"),
        ({"a": "pytorch_model.bin"}, "wanted a .safetensors file"),
        ({"a": 3}, "wanted a .safetensors file"),
        ({"a": "gone.safetensors"}, "names gone.safetensors, which is not there"),
        ({"a": "one.safetensors", "z": "one.safetensors"}, "^one.safetensors: tensor z is missing, .* puts it there"),
        ({"z": "one.safetensors"}, "holds tensor a, but .* does not name it"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "two.safetensors: holds tensor b, but .* puts it in one"),
        ({}, "missing or empty"),
        ([], "missing or empty"),
    ],
)
def test_bad_indexes_are_named(weight_map: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", {"a": entry(0, 1)}, b"x")
    write(tmp_path / "two.safetensors", {"b": entry(0, 1)}, b"x")
    index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_tensors(tmp_path)


def test_links_may_not_leave_the_directory(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside.safetensors", {"a": entry(0, 1)}, b"x")
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="links to a file outside"):
        checkpoint_tensors(model)


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write(blobs / "0123", {"a": entry(0, 1)}, b"x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert list(checkpoint_tensors(snapshot)) == ["a"]


def test_what_a_directory_may_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        checkpoint_tensors(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        checkpoint_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"only pickled .*\(pytorch_model.bin\), which can run code: refused$"):
        checkpoint_tensors(tmp_path)
    write(tmp_path / "gptq_model-4bit-128g.safetensors", {"a": entry(0, 1)}, b"x")
    assert list(checkpoint_tensors(tmp_path)) == ["a"]
    write(tmp_path / "other.safetensors", {"b": entry(0, 1)}, b"x")
    with pytest.raises(CheckpointError, match="2 safetensors files but no"):
        checkpoint_tensors(tmp_path)


def test_json_objects_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}" + " " * 100)
    assert read_object(tmp_path / "config.json") == {}
    with pytest.raises(CheckpointError, match="102 bytes, more than"):
        read_object(tmp_path / "config.json", limit=50)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data, "x"), dict)
    except CheckpointError as error:
        assert "\n" not in error.message
