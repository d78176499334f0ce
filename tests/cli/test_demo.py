"""`qwenq demo` on a stand-in for the real model: what it makes, that it goes on where it stopped, and its report."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import qwenq.cli.demo_model
import qwenq.pipeline.prepare
from qwenq import api
from qwenq.checkpoint.reader import open_checkpoint
from qwenq.text.calibration import load_windows
from tests.conftest import run


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> list[Path]:
    """The tiny model in place of the real one, and few short windows; holds where models were made."""
    calls: list[Path] = []

    def make(out: Path) -> Path:
        calls.append(out)
        shutil.copytree(tiny, out)
        return out

    def few(*arguments: object, **options: object) -> object:
        short = {"length": 64, "count": 4 if options["count"] else None, "up_to": 3}
        return load_windows(*arguments, **{**options, **short})  # type: ignore[arg-type]

    monkeypatch.setattr(qwenq.cli.demo_model, "make_demo_model", make)
    monkeypatch.setattr(qwenq.pipeline.prepare, "load_windows", few)
    return calls


def demo(directory: Path, report: Path) -> Result:
    arguments = ["demo", "-o", str(directory), "--report", str(report)]
    return run(*arguments)


def test_the_demo_ends_with_a_report(made: list[Path], tmp_path: Path) -> None:
    out, report = tmp_path / "demo", tmp_path / "reports" / "demo.md"
    report.parent.mkdir()
    benchmark = {"tool": "Another tool", "text": "heldout", "kl": 0.5, "bytes": 1_000_000}
    (report.parent / "benchmarks.jsonl").write_text(json.dumps(benchmark))
    result = demo(out, report)
    assert result.exit_code == 0, result.output
    assert made == [out / "SmolLM2-135M"]
    assert {p.name for p in out.iterdir()} == {"SmolLM2-135M", "8-bit", "4-bit", "4-bit-rtn"}
    text, page = report.read_text(), report.with_suffix(".html").read_text()
    assert text.startswith("# Demo: SmolLM2-135M to 8 and 4 bits\n")
    drifts = {n: json.loads((out / n / "qwenq-manifest.json").read_text())["drift"]
              for n in ("8-bit", "4-bit", "4-bit-rtn")}  # fmt: skip
    assert {drift["window_tokens"] for drift in drifts.values()} == {64}  # the few short windows
    kl = {n: drift["kl"]["mean"] for n, drift in drifts.items()}
    assert kl["8-bit"] < kl["4-bit"] < kl["4-bit-rtn"]
    assert f"4-bit has {kl['4-bit'] / kl['4-bit-rtn']:.2f} of the KL of rounding to nearest, 4-bit-rtn." in text
    assert "| Another tool |" in text and ">Another tool</text>" in page
    assert "Command: `make demo (qwenq demo)`." in text and "Q4\\_1" not in text
    assert page.startswith("<!doctype html>") and "warnings" in page
    assert str(tmp_path) not in text + page


def test_a_second_call_makes_only_what_is_missing(made: list[Path], tmp_path: Path) -> None:
    out, report = tmp_path / "demo", tmp_path / "demo.md"
    assert demo(out, report).exit_code == 0
    before = {n: (out / n / "qwenq-manifest.json").stat().st_mtime_ns for n in ("8-bit", "4-bit-rtn")}
    first = report.read_text()
    shutil.rmtree(out / "4-bit")
    report.unlink()
    result = demo(out, report)
    assert result.exit_code == 0 and len(made) == 1
    assert before == {n: (out / n / "qwenq-manifest.json").stat().st_mtime_ns for n in before}

    def steady(text: str) -> str:
        return text.split("## Time and memory")[0]

    assert steady(report.read_text()) == steady(first)
    (out / "8-bit" / "qwenq-manifest.json").unlink()
    result = demo(out, report)
    assert result.exit_code == 1
    assert re.fullmatch(
        r"error: .*/8-bit: holds no qwenq-manifest.json\nhint: delete .*/8-bit and run the demo again\n", result.stderr
    )


def test_the_model_is_the_packages_under_another_architecture(
    random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' logits of both are the same, and no weight between norms is."""
    from transformers import AutoModelForCausalLM

    llama = random_model("llama", "llama", num_hidden_layers=2, tie_word_embeddings=True)
    api.quantize(llama, tmp_path / "gguf", format="gguf", gguf_type="Q8_0", method="rtn", eval_samples=1,
                 sequence_length=32, device="cpu")  # fmt: skip
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    monkeypatch.setattr(qwenq.cli.demo_model, "_fetch_gguf", lambda scratch: file)
    monkeypatch.setattr(qwenq.cli.demo_model, "_SHARD_BYTES", 100_000)
    qwenq.cli.demo_model.make_demo_model(tmp_path / "demo")
    before, after = open_checkpoint(file), open_checkpoint(tmp_path / "demo")
    assert after.spec.model_type == "qwen2" and len(after.files) > 2
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.load_state_dict({name: before.read(name).float() for name in before.tensors}, strict=False)
    ids = torch.arange(40)[None] * 7
    with torch.no_grad():
        wanted = model(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "demo", dtype=torch.float32)(ids).logits
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.std())
    for lin in after.spec.linears:
        name = lin.name + ".weight"
        assert not torch.allclose(before.read(name), after.read(name).float(), atol=0.01)
