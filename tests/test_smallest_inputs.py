"""The smallest inputs that once hung, filled memory or ended in a traceback: each is one line now, within seconds."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from qwenq.errors import CheckpointError
from qwenq.io.json import parse_object
from qwenq.io.safetensors import (
    MAX_HEADER_BYTES,
    TensorSpec,
    checkpoint_tensors,
    encode_header,
    fingerprint,
    read_header,
)
from qwenq.model.spec import family_spec
from qwenq.planning.models import load_model
from qwenq.planning.sensitivity import prior
from tests.conftest import run


def said(*words: object) -> tuple[int, str]:
    """Exit code and everything printed by a command that ends by itself within seconds of processor time."""
    start = time.process_time()
    result = run(*words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert time.process_time() - start < 10
    output = result.stdout + result.stderr
    assert output.replace("\n", "").replace("\t", "").isprintable()
    return result.exit_code, output


# ---------------------------------------------------------------------- memory and time of readers


def test_a_header_of_tiny_entries_takes_little(tmp_path: Path) -> None:
    """A million values and more are counted, not made."""
    text = b"{" + b",".join(b'"%d":0' % k for k in range(MAX_HEADER_BYTES // 12)) + b"}"
    assert len(text) < MAX_HEADER_BYTES
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"JSON of \d+ values or more, more than the 1000000"):
            read_header(tmp_path / "model.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_HEADER_BYTES
    finally:
        tracemalloc.stop()
    with pytest.raises(CheckpointError, match="JSON of 1000001 values"):
        parse_object(b'{"a":[' + b"0," * 999_999 + b"0]}", "x")


# ---------------------------------------------------------------------- names and numbers of checkpoints


@pytest.mark.parametrize(
    ("name", "shown"),
    [("[/x]", "[/x]"), ("\x1b[31mred", r"\x1b[31mred"), ("\x9b2J\n", r"\x9b2J\x0a"), ("", "a name of 0 characters"),
     ("x" * 5_000_000, "a name of 5000000 characters")],
    ids=["markup", "colour", "control", "empty", "long"],
)  # fmt: skip
def test_names_of_tensors_are_shown_as_they_are(name: str, shown: str, tiny: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny / "config.json", tmp_path / "config.json")
    tensors = {n: found.spec for n, found in checkpoint_tensors(tiny).items()} | {name: TensorSpec(name, "F16", (2,))}
    header, _ = encode_header(tensors)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in tensors.values()))
    for command in (["inspect"], ["quantize", "-o", tmp_path / "out", "--group-size", "32"], ["run", "-p", "x"]):
        code, output = said(*command, tmp_path)
        assert code in (1, 3) and shown in output.replace("\n", "") and len(output) < 5000


@pytest.mark.parametrize("words", [
    ["inspect"], ["plan", "--gpu", "A100"], ["vram"], ["run", "-p", "x"], ["quantize", "-o", "OUT"],
    ["quantize", "-o", "OUT", "--dry-run"], ["sensitivity", "-o", "OUT"], ["convert", "OUT", "--format", "awq"],
    ["vram", "measure"], ["eval", "--reference", "SAME"],
], ids=" ".join)  # fmt: skip
def test_a_number_of_400_digits(words: list[str], model: Path, tmp_path: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("{", '{"initializer_range_": ' + "9" * 401 + ",", 1))
    places = {"OUT": str(tmp_path / "out"), "SAME": str(model)}
    given = [places.get(word, word) for word in words]
    if words[0] == "convert":
        given = ["convert", str(model), *given[1:]]
    else:
        given.append(str(model))
    code, output = said(*given)
    assert code == 1 and "config.json: JSON holds a number of 401 digits, more than 100" in output.replace("\n", "")


# ---------------------------------------------------------------------- files given as options


@pytest.mark.parametrize("value", [5e-324, 1e-320, 1e-300, 1e299])
@pytest.mark.parametrize("key", ["kl", "kl_low", "kl_high", "bytes", "bits_per_linear_weight"])
def test_figures_of_benchmarks(key: str, value: float, finished: Path, tmp_path: Path) -> None:
    row: dict[str, Any] = {"tool": "x", "text": "t", "kl": 0.01, "kl_low": 0.009, "kl_high": 0.011, "bytes": 10**6,
                           "bits_per_linear_weight": 4.1}  # fmt: skip
    (tmp_path / "b.jsonl").write_text(json.dumps(row | {key: value}))
    code, _ = said("report", finished, "-o", tmp_path / "page", "--benchmarks", tmp_path / "b.jsonl")
    assert code in (0, 1)


HEAD, ROW = "model,quant,input_len,mem_gib,env,gpu_num\n", "Qwen2.5-7B,GPTQ-Int4,6144,7.2,A100 torch2.4.0,1\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HEAD + "x" * 131_073 + ",a,1,2,3,1\n", "a line of 131083 characters, more than 4000"),
        (HEAD + '"' + ROW, "unexpected end of data"),
        (HEAD + ROW * 100_000, "bytes, more than the 4000000"),
        (HEAD + ROW * 6000, "more than 5000"),
        (HEAD + ROW.replace("6144", "9" * 5000), "a line of"),
        (HEAD + ROW.replace("7.2", "5e-324"), "wanted a positive number of GiB"),
    ],
    ids=["long field", "open quote", "100,000 rows", "6,000 rows", "5,000 digits", "least number"],
)
def test_tables_of_measurements(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    code, output = said("vram", "validate", tmp_path / "x.csv")
    assert code == 1 and why in output.replace("\n", "")


@pytest.mark.parametrize("digits", [20, 5000])
def test_labels_of_sensitivities(digits: int, tiny: Path, tmp_path: Path) -> None:
    spec = family_spec("Qwen2.5-0.5B")
    assert spec is not None
    table = json.dumps(prior(spec).to_json() | {"fingerprint": fingerprint(tiny)})
    assert '"4-bit g128"' in table
    (tmp_path / "s.json").write_text(table.replace('"4-bit g128"', f'"4-bit g{"9" * digits}"'))
    code, output = said("quantize", tiny, "-o", tmp_path / "out", "--dry-run", "--target-size", "1.2MB",
                        "--sensitivity", tmp_path / "s.json")  # fmt: skip
    assert code == 1 and "is not a scheme" in output.replace("\n", "") and len(output) < 2000


def test_a_model_name_longer_than_a_path_may_be(tmp_path: Path) -> None:
    name = "Qwen2.5-7B-I" + "n" * 5000
    for words in (["vram", name], ["quantize", name, "-o", tmp_path / "out", "--dry-run"]):
        code, output = said(*words)
        assert code and "Qwen2.5-7B-Innn" in output and len(output) < 4000
    (tmp_path / "x.csv").write_text(HEAD + ROW.replace("Qwen2.5-7B", name[:3000]))
    code, output = said("vram", "validate", tmp_path / "x.csv")
    assert code == 1 and "x.csv" in output
    with pytest.raises(CheckpointError, match="neither a directory nor a shipped model"):
        load_model(name)
