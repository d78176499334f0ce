"""Safetensors files as this project writes them: literal bytes, another reader, exact predictions, no half files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from qwenq.checkpoint.shards import Beside, encode_index, shard_file_bytes, stored_files
from qwenq.formats.base import get_format
from qwenq.io.durable import file_sha256, write_bytes, write_json, write_synced
from qwenq.io.gguf import GGUFFile
from qwenq.io.safetensors import TensorSpec
from qwenq.io.tensors import TORCH_DTYPES, all_finite, raw_bytes, spec_of, write_shard
from qwenq.model.spec import spec_from_config


def test_literal_bytes(tmp_path: Path) -> None:
    """Wider elements first, then by name; header padded with spaces to a multiple of 8."""
    tensors = {
        "c": torch.tensor([7, 8, 9], dtype=torch.uint8),
        "b": torch.tensor([[1.0, -2.0]], dtype=torch.float16),
        "a": torch.tensor([1, -1], dtype=torch.int32),
        "bf": torch.tensor(1.0, dtype=torch.bfloat16),
    }
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F16","shape":[1,2],"data_offsets":[8,12]},'
        b'"bf":{"dtype":"BF16","shape":[],"data_offsets":[12,14]},'
        b'"c":{"dtype":"U8","shape":[3],"data_offsets":[14,17]}}'
    )
    padding = b"     "
    data = bytes.fromhex("01000000ffffffff003c00c0803f070809")
    wanted = bytes([0x00, 0x01, 0, 0, 0, 0, 0, 0]) + header + padding + data
    digest = write_shard(tmp_path / "x.safetensors", tensors)
    assert (tmp_path / "x.safetensors").read_bytes() == wanted
    assert digest == hashlib.sha256(wanted).hexdigest() == file_sha256(tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_reference_library_reads_it_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "w": torch.randn(5, 7, generator=generator).half(),
        "not contiguous": torch.randn(4, 6, generator=generator).T,
        "words": torch.randint(-(2**31), 2**31 - 1, (3, 5), dtype=torch.int32, generator=generator),
        "bf": torch.randn(3, generator=generator).bfloat16(),
        "empty": torch.empty(0, 4),
        "é": torch.ones(2, dtype=torch.uint8),
    }
    write_shard(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_predicted_size_is_the_written_size(tmp_path_factory: pytest.TempPathFactory, shapes: dict) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    tensors = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in shapes.items()}
    write_shard(path, tensors)
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in shapes.items()]
    assert path.stat().st_size == shard_file_bytes(specs)
    assert [spec_of(s.name, tensors[s.name]) for s in specs] == specs


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def produce(put) -> None:
        put(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_synced(tmp_path / "x.safetensors", produce)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"old")

    def produce(put) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synced(tmp_path / "x", produce)
    assert (tmp_path / "x").read_bytes() == b"old"
    write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_raw_bytes_does_not_copy() -> None:
    tensor = torch.arange(4, dtype=torch.int16)
    view = raw_bytes(tensor)
    tensor[0] = 0x0102
    assert bytes(view[:2]) == b"\x02\x01"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_is_what_isfinite_says(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for values in ([], [0.0, -1.0], [most, -most], [most, float("nan")], [float("nan")] * 3, [1.0, float("inf")],
                   [-float("inf"), 2.0]):  # fmt: skip
        tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
        assert all_finite(tensor) == bool(torch.isfinite(tensor).all()), values
    large = torch.ones(700, 1100, dtype=dtype)
    assert all_finite(large) and all_finite(large.T)
    for value in (float("nan"), float("inf"), -float("inf")):
        large[613, 517] = value
        assert not all_finite(large) and not all_finite(large[:, 100:])
    assert all_finite(torch.zeros(3, dtype=torch.int32)) and not all_finite(torch.full((600, 700), torch.nan)[:, 1:])


def test_index(tmp_path: Path) -> None:
    files = {
        "model-00001-of-00002.safetensors": [TensorSpec("z", "F16", (2, 3))],
        "model-00002-of-00002.safetensors": [TensorSpec("a", "I32", (4,)), TensorSpec("m", "BF16", (1,))],
    }
    write_json(tmp_path / "index.json", encode_index(files))
    assert (tmp_path / "index.json").read_text() == (
        "{\n"
        '  "metadata": {\n'
        '    "total_size": 30\n'
        "  },\n"
        '  "weight_map": {\n'
        '    "a": "model-00002-of-00002.safetensors",\n'
        '    "m": "model-00002-of-00002.safetensors",\n'
        '    "z": "model-00001-of-00002.safetensors"\n'
        "  }\n"
        "}\n"
    )
    assert json.loads((tmp_path / "index.json").read_text())["metadata"]["total_size"] == 12 + 16 + 2


def test_a_gguf_file_begun_by_a_killed_run_gets_its_own_tensors(tmp_path: Path) -> None:
    """Factors of Llama 3.1's rotary embeddings: the run ended between the header and them."""
    shapes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    shapes |= {"vocab_size": 64, "max_position_embeddings": 128}
    spec, form = spec_from_config({"model_type": "llama"} | shapes), get_format("gguf")
    recipe = form.mixture("F16", spec)
    factors = {"rope_freqs.weight": [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0]}
    beside = Beside("m", {"general.architecture": "llama"}, None, factors)
    files = stored_files(spec, recipe, lambda name: form.stored_dtype(name, "F16"), beside)
    files.begin(tmp_path)
    path = tmp_path / files.names[0]
    whole, place = path.read_bytes(), GGUFFile.open(path).tensors["rope_freqs.weight"]
    path.write_bytes(whole[: place.start] + bytes(len(whole) - place.start))
    files.begin(tmp_path)
    assert GGUFFile.open(path).numbers("rope_freqs.weight") == factors["rope_freqs.weight"]
    assert path.read_bytes() == whole
