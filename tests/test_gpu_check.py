"""benchmarks/gpu_check.py: its parts on a CPU and over fake tensors, and what becomes of parts that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpus import FakeGpus

from qwenq.planning.models import load_spec

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402
from gpu_page import page  # noqa: E402
from gpu_parts import Notes  # noqa: E402

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("part", ["environment", "kernels", "vram-4", "vram-8", "layer-72b", "solver"])
def test_a_part_on_a_cpu(part: str, tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.json", tiny=True, work=tmp_path)
    gpu_parts.PARTS[part](notes)
    assert not notes.errors, notes.errors
    assert [check for check in notes.checks if not check["ok"]] == []
    written = json.loads((tmp_path / "notes.json").read_text())
    assert written["facts"] and len(written["checks"]) == len(notes.checks)
    if part == "layer-72b":
        assert {"forward", "solve down"} <= set(notes.facts["work"])


def test_the_kernels_of_torch_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, and so with the rows from which weights are written out."""
    monkeypatch.setattr("qwenq.runtime.linear.lacks_for_cpu_kernels", lambda: "no compiler")
    notes = Notes(tmp_path / "notes.json", tiny=True, work=tmp_path)
    gpu_parts.PARTS["kernels"](notes)
    assert not notes.errors and all(check["ok"] for check in notes.checks)
    assert len(notes.checks) > 30


def test_the_kernels_over_fake_tensors() -> None:
    """Shapes, dtypes and devices of every case, and that CUDA takes the kernel that the case is about."""
    with FakeGpus(["H100 SXM5 80GB"], (9, 0)):
        notes = Notes(device=CUDA, real=False)
        gpu_parts.kernels(notes)
    assert not notes.errors, notes.errors
    chosen = [check for check in notes.checks if check["name"].endswith("its kernel")]
    assert len(chosen) == len(gpu_parts.LINEARS) and all(check["ok"] for check in chosen)
    assert {case.kind for case in gpu_parts.LINEARS} == {"int4", "int4 halves", "int8", "tiled"}


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_memory_over_fake_tensors(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's longest context, too, takes what it said; of its prompt the ends alone are computed."""
    specs = {"large": load_spec("Qwen2.5-72B"), "small": replace(load_spec("Qwen2.5-0.5B"), num_hidden_layers=2)}
    monkeypatch.setattr(gpu_parts, "FAMILY", tuple(specs))
    monkeypatch.setattr(gpu_parts, "load_spec", specs.__getitem__)
    with FakeGpus(["RTX 3060 12GB"], (8, 6)):
        notes = Notes(device=CUDA, real=False)
        gpu_parts.vram(notes, bits)
    assert not notes.errors, notes.errors
    assert notes.facts["model"].startswith("Qwen2.5-0.5B, 2 layers"), "the 72B does not fit"
    assert notes.facts["longest_context_planned"] == 32768
    computed = {(row["setting"], row["context"]): row["prompt_tokens"] for row in notes.facts["times"]}
    assert computed == {
        ("", 1024): 1020, ("", 8192): 8188, ("", 32768): 2048 + 2044, ("fp8 cache", 4096): 4092,
        ("chunks of 512", 4096): 4092,
    }  # fmt: skip
    memory = [check for check in notes.checks if "error in percent" in check["name"]]
    assert len(memory) == 2 * len(computed) and all(check["ok"] for check in memory), memory


def run(out: Path, *words: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return done, json.loads((out / "gpu-check.json").read_text()), (out / "gpu-check.md").read_text()


def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    parts = "--only", "environment,solver,ranks", "--skip", "solver"
    done, found, text = run(tmp_path, "--device", "cpu", "--tiny", "--minutes", "3", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: part["status"] for name, part in found["parts"].items()} == {"environment": "done", "ranks": "done"}
    assert found["command"] == (
        "python benchmarks/gpu_check.py --minutes 3 --only environment,ranks --device cpu --tiny --out DIR"
    )
    assert "bytes of two ranks are one's" in text and "## Wrong" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-check.json", "gpu-check.md"}


def test_without_a_gpu_every_part_says_so(tmp_path: Path) -> None:
    done, found, text = run(tmp_path, "--tiny", "--parts", "environment,ranks", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert [part["status"] for part in found["parts"].values()] == ["failed", "failed"]
    assert text.count("torch sees no CUDA GPU") == 2 and "error in device: torch sees no CUDA GPU" in done.stdout


def asked() -> Namespace:
    return Namespace(tiny=False, device="cpu")


def test_a_part_that_hangs_is_ended(tmp_path: Path) -> None:
    result = gpu_check.run_part(gpu_check.Part("solver", 0.1, 0.3), 100, tmp_path, {}, asked())
    assert result["status"] == "timed out" and result["seconds"] < 10
    assert result["checks"] == [] and result["facts"] == {}


def test_what_does_not_fit_is_skipped(tmp_path: Path) -> None:
    result = gpu_check.run_part(gpu_check.Part("solver", 30, 60), 20, tmp_path, {}, asked())
    assert result["status"] == "skipped" and result["why"] == "20 s were left, it needs about 30"
    assert not list(tmp_path.iterdir())


def test_an_error_ends_its_step_alone(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.json")
    with notes.step("first"):
        notes.check("figure", 0.5, 0.1)
        raise ValueError("no such kernel")
    with notes.step("second"):
        notes.fact("kept", 1)
        notes.check("nan", float("nan"), 1.0)
    written = json.loads((tmp_path / "notes.json").read_text())
    assert "ValueError: no such kernel" in written["errors"]["first"] and written["facts"]["kept"] == 1
    assert [check["ok"] for check in written["checks"]] == [False, False]
    part = written | {"status": "failed", "seconds": 1.0, "output": "the end\n"}
    text = page({"command": "c", "commit": "abc", "began": "now", "device": "cuda", "parts": {"kernels": part}})
    assert "## Wrong" in text and "no such kernel" in text and "| kernels | figure | 0.5 | at most 0.1 |" in text


@pytest.mark.slow
def test_all_of_it_on_a_cpu(tmp_path: Path) -> None:
    done, found, _ = run(tmp_path, "--device", "cpu", "--tiny", "--minutes", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(found["parts"]) == [part.name for part in gpu_check.PARTS]
    assert {part["status"] for part in found["parts"].values()} == {"done"}
