"""`qwenq inspect` from the outside: what it rests on, and expectations that hold, fail or mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import answer, run


@pytest.mark.parametrize(
    ("name", "scheme", "width", "total"),
    [
        ("Qwen2.5-72B", "16-bit", 29568, 145_412_407_296),
        ("Qwen/Qwen2.5-72B-Instruct", "16-bit", 29568, 145_412_407_296),
        ("Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4", "4-bit g128, gptq", 29696, 41_620_000_000),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", "4-bit g128 asym, awq", 29696, 41_595_518_976),
    ],
)
def test_shipped_shapes_are_those_of_the_name_and_say_what_they_are(
    name: str, scheme: str, width: int, total: int
) -> None:
    result = run("inspect", name, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["scheme"], found["spec"]["intermediate_size"]) == (scheme, width)
    assert sum(part["stored_bytes"] for part in found["parts"]) == pytest.approx(total, rel=1e-4)
    assert found["source"] == "shapes shipped with qwenq, no header was read" and not found["tensors_read"]
    warned = f"warning: {name}: using the shapes shipped with qwenq; no header was read\n"
    assert result.stderr == (warned if "/" in name else "")
    assert "shapes shipped with qwenq, no header was read" in run("inspect", name).stdout


def test_a_directorys_headers_are_read(tiny: Path) -> None:
    found = answer("inspect", tiny)
    assert found["source"] == "the checkpoint's own headers" and found["tensors_read"]
    assert found["parameters"] == 1_050_752 and found["expected_parameters"] is None


def test_expected_parameters_are_confirmed_or_contradicted(tiny: Path) -> None:
    right = run("inspect", tiny, "--expect-params", "1.05M")
    assert right.exit_code == 0 and right.stdout.endswith("parameters: 1,050,752, as expected (1.05M)\n")
    wrong = run("inspect", tiny, "--expect-params", "1.1M")
    assert wrong.exit_code == 3 and "as expected" not in wrong.stdout
    assert "parameters: 1,100,000 expected, the shapes make 1,050,752" in wrong.stderr
    assert wrong.stderr.endswith("hint: is it another model's card?\n")


@pytest.mark.parametrize("count", ["1e400", "nanB", "nan", "inf", "0", "many", "", "B", "1e15"])
def test_what_is_no_count_is_refused(count: str, tiny: Path) -> None:
    result = run("inspect", tiny, f"--expect-params={count}")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines() == [
        f"error: not a number of parameters: {count!r}", "hint: write for instance 72.7B",
    ]  # fmt: skip
