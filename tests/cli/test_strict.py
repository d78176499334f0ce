"""A bad row among many: left out, counted and said once; fatal with --strict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A hundred rows, one of them no document."""
    path = tmp_path / "rows.jsonl"
    text = "a row of a text that is long enough to be cut into windows. " * 3
    lines = [json.dumps({"text": f"{k}: {text}"}) for k in range(99)]
    path.write_text("\n".join([*lines[:40], '{"image": "cat.png"}', *lines[40:]]))
    return path


def commands(model: Path, rows: Path, out: Path) -> dict[str, list[str]]:
    windows = ["--sequence-length", "16", "--num-samples", "4", "--device", "cpu"]
    return {
        "quantize": ["quantize", str(model), "-o", str(out), "--group-size", "32", "--calibration", str(rows), *windows,
                     "--eval-samples", "2"],
        "eval": ["eval", str(model), "--reference", str(model), "--text", str(rows), *windows],
        "sensitivity": ["sensitivity", str(model), "-o", str(out), "--calibration", str(rows), *windows[:-2]],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["quantize", "eval", "sensitivity"])
def test_a_bad_row_is_said_once_and_fatal_when_strict(
    name: str, rows: Path, random_model: Callable[..., Path], tmp_path: Path
) -> None:
    asked = commands(random_model(), rows, tmp_path / "out")[name]
    strict = run(*asked, "--strict")
    assert strict.exit_code == 1 and "line 41" in strict.stderr and not (tmp_path / "out").exists()
    done = run(*asked)
    assert done.exit_code == 0, done.output
    said = [line for line in done.stderr.splitlines() if "row left out" in line]
    assert len(said) == 1 and "warning" in said[0] and "line 41" in said[0] and "--strict" in said[0]
    if name == "sensitivity":
        (tmp_path / "out").unlink()
        told = run(*asked, "--json")
        assert json.loads(told.stdout) and "warning: " in told.stderr and "row left out" in told.stderr
    if name == "quantize":
        manifest = json.loads((tmp_path / "out" / "qwenq-manifest.json").read_text())
        assert manifest["job"]["calibration"]["skipped_rows"] == 1
        assert any("row left out" in line for line in manifest["warnings"])
