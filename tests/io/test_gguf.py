"""GGUF containers against gguf-py, bytes worked out by hand, and files that lie."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import gguf_bytes as raw
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf_bytes import File, entry, tensor_data

from qwenq.errors import CheckpointError
from qwenq.io.gguf import TYPES, BlockTensor, GGUFFile, Number, layout, split_layouts, split_name
from qwenq.io.safetensors import TensorSpec

ARCHITECTURE = entry("general.architecture", "qwen2")
ONE_ENTRY = b"GGUF" + raw.number("I", 3) + raw.number("Q", 0) + raw.number("Q", 1) + raw.text("x")  # up to its kind


def test_types_are_those_of_gguf_py() -> None:
    ours = {found.number: (found.name, found.values, found.n_bytes) for found in TYPES.values()}
    assert ours == {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def test_a_header_by_hand(tmp_path: Path) -> None:
    """The smallest file with a text, a number and a tensor [2, 32] of Q8_0, every byte of it."""
    header = (
        b"GGUF" + b"\x03\0\0\0" + b"\x01" + bytes(7) + b"\x02" + bytes(7)
        + b"\x01" + bytes(7) + b"a" + b"\x08\0\0\0" + b"\x02" + bytes(7) + b"hi"
        + b"\x01" + bytes(7) + b"b" + b"\x04\0\0\0" + b"\x07\0\0\0"
        + b"\x01" + bytes(7) + b"t" + b"\x02\0\0\0" + b"\x20" + bytes(7) + b"\x02" + bytes(7) + b"\x08\0\0\0" + bytes(8)
    )  # fmt: skip
    data = header + bytes(-len(header) % 32) + bytes(range(68)) + bytes(28)
    (tmp_path / "x.gguf").write_bytes(data)
    found = GGUFFile.open(tmp_path / "x.gguf")
    assert found.metadata == {"a": "hi", "b": 7}
    location = found.tensors["t"]
    assert location.spec == BlockTensor("t", "Q8_0", (2, 32)) and location.spec.nbytes == 68
    assert data[location.start : location.end] == bytes(range(68))
    made = layout({"a": "hi", "b": 7}, [TensorSpec("t", "Q8_0", (2, 32))])
    assert made.header == data[:-96] and made.offsets == {"t": location.start} and made.size == len(data)


def test_every_kind_of_metadata_as_gguf_py_writes_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    values: dict[str, Any] = {
        "u8": 200, "i8": -3, "u16": 60000, "i16": -300, "u32": 1 << 31, "i32": -7, "u64": 1 << 63, "i64": -(1 << 40),
        "f32": 0.5, "f64": 0.1, "bool": True, "texts": ["", "é", "x" * 300], "whole": [1, -2], "real": [0.5, 0.25],
        "truths": [True, False],
    }  # fmt: skip
    adders = {"u8": "uint8", "i8": "int8", "u16": "uint16", "i16": "int16", "u32": "uint32", "i32": "int32",
              "u64": "uint64", "i64": "int64", "f32": "float32", "f64": "float64", "bool": "bool"}  # fmt: skip
    for key, value in values.items():
        getattr(writer, f"add_{adders.get(key, 'array')}")(key, value)
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((4, 64), np.float16)}
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile.open(tmp_path / "x.gguf")
    assert found.metadata == {"general.architecture": "qwen2", **values}
    data = (tmp_path / "x.gguf").read_bytes()
    for name, value in tensors.items():
        location = found.tensors[name]
        assert location.spec.shape == value.shape and data[location.start : location.end] == value.tobytes()


def test_a_layout_as_gguf_py_reads_it(tmp_path: Path) -> None:
    """Header and offsets of ours, tensors in order, read back by gguf-py."""
    metadata = {"general.architecture": "qwen2", "n": 5, "f": 1e-6, "s": "é", "l": ["a", ""], "i": [3, -1],
                "t": True, "u": Number("u16", 9)}  # fmt: skip
    specs = [TensorSpec("a", "F32", (5,)), TensorSpec("b", "Q4_K", (3, 512)), TensorSpec("c", "Q8_0", (2, 32))]
    made = layout(metadata, specs)
    sizes = {spec.name: BlockTensor(spec.name, spec.dtype, spec.shape).nbytes for spec in specs}
    data = bytearray(made.header + bytes(made.size - len(made.header)))
    rng = np.random.default_rng(0)
    content = {name: rng.integers(0, 256, size, np.uint8).tobytes() for name, size in sizes.items()}
    for name, start in made.offsets.items():
        data[start : start + sizes[name]] = content[name]
    (tmp_path / "x.gguf").write_bytes(data)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")} == {
        **metadata, "f": float(np.float32(1e-6)), "u": 9,
    }  # fmt: skip
    assert reader.fields["u"].types == [gguf.GGUFValueType.UINT16]
    assert [(t.name, t.tensor_type.name, t.shape.tolist()[::-1]) for t in reader.tensors] == [
        (spec.name, spec.dtype, list(spec.shape)) for spec in specs
    ]
    for tensor in reader.tensors:
        assert tensor.data.tobytes() == content[tensor.name]


def split_files(folder: Path, split_bytes: int = 300) -> list[Path]:
    specs = [TensorSpec(f"t{k}", "I8", (100,)) for k in range(7)]
    layouts = split_layouts("m", {"general.architecture": "qwen2"}, specs, split_bytes)
    for name, made in layouts.items():
        (folder / name).write_bytes(made.header + bytes([len(name)]) * (made.size - len(made.header)))
    return [folder / name for name in layouts]


def test_splits(tmp_path: Path) -> None:
    """At most 300 bytes of tensors a file, padding counted; all read as one, and gguf-py reads the keys."""
    files = split_files(tmp_path)
    assert [path.name for path in files] == [split_name("m", k, 4) for k in range(4)]
    found = GGUFFile.open(files[0])
    assert list(found.tensors) == [f"t{k}" for k in range(7)]
    assert [found.tensors[f"t{k}"].file for k in (0, 2, 4, 6)] == files
    fields = gguf.GGUFReader(files[2]).fields
    assert [fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")] == [2, 4, 7]
    assert "general.architecture" not in fields
    assert [t.name for t in layouts_of_one_file()] == ["a"]


def layouts_of_one_file() -> list[TensorSpec]:
    (name,) = split_layouts("m", {}, specs := [TensorSpec("a", "F32", (4,))], 1)
    assert name == "m.gguf"
    return specs


def changed_entry(path: Path, key: str, value: int) -> None:
    """Overwrite the last byte-wise value of a number's entry."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)


def test_splits_that_disagree(tmp_path: Path) -> None:
    def refused(words: str, first: int = 0) -> None:
        with pytest.raises(CheckpointError, match=words):
            GGUFFile.open(split_files_of[first])

    split_files_of = split_files(tmp_path)
    refused(r"file 2 of 4.*", 1)
    changed_entry(split_files_of[2], "split.no", 1)
    refused("m-00003-of-00004.gguf: split.no is 1, wanted 2")
    split_files_of = split_files(tmp_path)
    changed_entry(split_files_of[3], "split.count", 5)
    refused("split.count is 5, wanted 4")
    split_files_of = split_files(tmp_path)
    changed_entry(split_files_of[0], "split.count", 5)
    refused("split.count says 5 files, its name does not")
    split_files_of = split_files(tmp_path)
    split_files_of[1].unlink()
    refused("m-00002-of-00004.gguf is not there")
    split_files_of = split_files(tmp_path)
    split_files_of[3].write_bytes(split_files_of[3].read_bytes().replace(b"t6", b"t0"))
    refused("tensor t0 is in an earlier file too")
    split_files_of = split_files(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    moved = split_files_of[2].rename(tmp_path / "elsewhere" / "x.gguf")
    split_files_of[2].symlink_to(moved)
    refused("links to a file outside")


F32_TENSORS = [("a", [4], 0, bytes(16)), ("b", [32, 2], 8, bytes(68))]
U64 = 1 << 64


def lying(**changes: Any) -> File:
    found = tensor_data(F32_TENSORS)
    found.entries = [ARCHITECTURE]
    for key, value in changes.items():
        setattr(found, key, value)
    return found


HOSTILE = {
    "a count of tensors": (lying(tensor_count=U64 - 1), "18446744073709551615 tensors, more than any model has"),
    "one tensor too many": (lying(tensor_count=3), "name of tensor 2 has 0 characters"),
    "a count of entries": (lying(entry_count=1 << 40), "1099511627776 metadata entries, more"),
    "one entry too many": (lying(entry_count=2), "name of tensor 0 has 0 characters"),
    "a version of old": (lying(version=1), "GGUF version 1, wanted"),
    "big-endian": (lying(version=3 << 24), "of big-endian machines"),
    "another magic": (lying(magic=b"GGML"), "not a GGUF file"),
    "a key twice": (lying(entries=[ARCHITECTURE, ARCHITECTURE]), "metadata general.architecture appears twice"),
    "an unknown kind": (lying(entries=[["x", 13, 0]]), "metadata x is of kind 13"),
    "a truth of 7": (lying(entries=[["x", raw.BOOL, 7]]), "truth value of 7"),
    "an empty key": (lying(entries=[["", raw.U32, 7]]), "has 0 characters"),
    "a key of 100 KB": (lying(entries=[["k" * 100_000, raw.U32, 7]]), "has 100000 characters"),
    "nesting": (lying(entries=[["x", raw.ARRAY, [raw.ARRAY, [[raw.ARRAY, []]]]]]), "array of arrays"),
    "alignment of zero": (lying(entries=[["general.alignment", raw.U32, 0]]), "general.alignment is 0"),
    "alignment of three": (lying(entries=[["general.alignment", raw.U32, 3]]), "power of two"),
    "alignment of a text": (lying(entries=[["general.alignment", raw.TEXT, "32"]]), "general.alignment is '32'"),
    "alignment of 4 GB": (lying(entries=[["general.alignment", raw.U32, 1 << 31]]), "power of two"),
    "a tensor twice": (lying(tensors=[["a", [4], 0, 0], ["a", [4], 0, 32]]), "tensor a appears twice"),
    "an unknown type": (lying(tensors=[["a", [4], 99, 0]]), "tensor a is of type 99"),
    "a removed type": (lying(tensors=[["a", [4], 4, 0]]), "of type 4, which is unknown"),
    "five dimensions": (lying(tensors=[["a", [1] * 5, 0, 0]]), "tensor a has 5 dimensions, wanted at most 4"),
    "a shape of 2^64": (lying(tensors=[["a", [1 << 32, 1 << 32], 0, 0]]), "more values than any file"),
    "an overflow to little": (lying(tensors=[["a", [1 << 62, 4, 1 << 62, 4], 0, 0]]), "more values than any file"),
    "half a block": (lying(tensors=[["a", [33, 2], 8, 0]]), "rows of 33 values, Q8_0 has blocks of 32"),
    "K rows of 128": (lying(tensors=[["a", [128, 2], 12, 0]]), "rows of 128 values, Q4_K has blocks of 256"),
    "overlap": (lying(tensors=[["a", [4], 0, 0], ["b", [4], 0, 0]]), "tensor b starts at data byte 0, wanted 32"),
    "a hole": (lying(tensors=[["a", [4], 0, 0], ["b", [4], 0, 64]]), "tensor b starts at data byte 64, wanted 32"),
    "an offset of 2^64": (lying(tensors=[["a", [4], 0, U64 - 16]]), "starts at data byte 18446744073709551600"),
    "cut off": (lying(data=bytes(60)), "tensor b ends at byte [0-9]+, the file at"),
    "too long": (lying(data=bytes(1000)), "bytes after the last tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case: str, tmp_path: Path) -> None:
    file, words = HOSTILE[case]
    with pytest.raises(CheckpointError, match=words) as error:
        GGUFFile.open(file.write(tmp_path / "x.gguf"))
    assert error.value.message.startswith("x.gguf: ") and error.value.message.isprintable()


def test_a_text_that_is_not_utf_8(tmp_path: Path) -> None:
    data = lying(entries=[["x", raw.TEXT, "ab"]]).encode()
    assert data.count(b"ab") == 1
    (tmp_path / "x.gguf").write_bytes(data.replace(b"ab", b"\xff\xfe"))
    with pytest.raises(CheckpointError, match=r"^x\.gguf: metadata x is not UTF-8"):
        GGUFFile.open(tmp_path / "x.gguf")


def test_four_thousand_million_dimensions(tmp_path: Path) -> None:
    """Refused by their number: nothing reads that many sizes."""
    head = b"GGUF" + raw.number("I", 3) + raw.number("Q", 1) + raw.number("Q", 0)
    (tmp_path / "x.gguf").write_bytes(head + raw.text("a") + raw.number("I", 4_000_000_000) + bytes(200))
    with pytest.raises(CheckpointError, match=r"^x\.gguf: tensor a has 4000000000 dimensions, wanted at most 4$"):
        GGUFFile.open(tmp_path / "x.gguf")


def announced(kind: int, of: int, count: int) -> bytes:
    """A file whose one entry is an array that says it has `count` elements, and little after that."""
    return ONE_ENTRY + raw.number("I", kind) + raw.number("I", of) + raw.number("Q", count) + bytes(64)


@pytest.mark.parametrize("of", [raw.TEXT, raw.U8, raw.F64])
@pytest.mark.parametrize("count", [100, 1_000_000, 1 << 40, U64 - 1])
def test_arrays_that_are_not_there_cost_nothing(of: int, count: int, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(announced(raw.ARRAY, of, count))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"metadata x (takes|has|ends)"):
            GGUFFile.open(tmp_path / "x.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_text_longer_than_the_file(tmp_path: Path) -> None:
    for length in (100, 1 << 40, U64 - 1):
        (tmp_path / "x.gguf").write_bytes(ONE_ENTRY + raw.number("I", raw.TEXT) + raw.number("Q", length) + b"short")
        with pytest.raises(CheckpointError, match=f"metadata x takes {length} bytes"):
            GGUFFile.open(tmp_path / "x.gguf")


def test_a_million_strings_are_read_and_three_refused(tmp_path: Path) -> None:
    """What is there is within 32 MB of header and 2,000,000 elements, or refused; a string takes 300 bytes at most."""
    path = tmp_path / "x.gguf"

    def write(count: int) -> None:
        array = raw.number("I", raw.ARRAY) + raw.number("I", raw.TEXT) + raw.number("Q", count)
        path.write_bytes(ONE_ENTRY + array + (raw.number("Q", 1) + b"s") * count)

    write(1_000_000)
    assert GGUFFile.open(path).metadata == {"x": ["s"] * 1_000_000}
    for count in (50_000, 3_000_000):  # traced, which takes 20 times as long
        write(count)
        tracemalloc.start()
        try:
            if count > 2_000_000:
                with pytest.raises(CheckpointError, match="3000000 elements, more than the 2,000,000"):
                    GGUFFile.open(path)
            else:
                GGUFFile.open(path)
            assert tracemalloc.get_traced_memory()[1] < 300 * min(count, 1_000_000)
        finally:
            tracemalloc.stop()


def test_a_header_of_more_than_its_limit(tmp_path: Path) -> None:
    with open(tmp_path / "x.gguf", "wb") as file:
        file.write(ONE_ENTRY + raw.number("I", raw.TEXT) + raw.number("Q", 40_000_000))
        file.truncate(50_000_000)
    with pytest.raises(CheckpointError, match="a header of more than 32,000,000 bytes"):
        GGUFFile.open(tmp_path / "x.gguf")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="not a GGUF file") as error:
        GGUFFile.open(tmp_path / "x.gguf")
    assert "git lfs pull" in error.value.hint
    (tmp_path / "y.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFFile.open(tmp_path / "y.gguf")
    (tmp_path / "z.gguf").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        GGUFFile.open(tmp_path / "z.gguf")


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is no text that a GGUF file can hold"):
        layout({"tokenizer.chat_template": "a\ud800"}, [])
