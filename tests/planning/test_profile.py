"""`qwenq vram measure` and `--profile`: real rows on a CPU, the fit, and what it corrects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwenq.errors import PlanError
from qwenq.planning.memory import Term
from qwenq.planning.profile import MeasuredRow, fit_rows, profile_json, read_profile
from qwenq.units import MIB
from tests.conftest import answer, run


def row(working: int, allocated: int, **changes: Any) -> MeasuredRow:
    values = {
        "context": 1024, "phase": "prefill", "device": "GPU 0 RTX 3090", "kind": "RTX 3090",
        "allocated_bytes": allocated, "reserved_bytes": 0, "driver_bytes": 0,
        "exact_bytes": 1000 * MIB, "working_bytes": working,
    }  # fmt: skip
    return MeasuredRow(**(values | changes))


def test_a_line_is_found_again() -> None:
    """Measured = exact + 1.5 x working + 64 MiB; the driver holds 300 MiB more than torch, torch 5 % more than used."""
    rows = []
    for working in (100, 200, 400):
        used = (1000 + 64) * MIB + working * MIB * 3 // 2
        reserved = round(used * 1.05)
        rows.append(row(working * MIB, used, reserved_bytes=reserved, driver_bytes=reserved + 300 * MIB))
    (fit,) = fit_rows(rows)
    assert fit.kind == "RTX 3090" and fit.rows == 3
    assert fit.scale == pytest.approx(1.5) and fit.constant_bytes == pytest.approx(64 * MIB, abs=16)
    assert fit.context_bytes == 300 * MIB and fit.slack_ratio == pytest.approx(0.05, rel=1e-3)
    assert fit.worst_error_percent < 1e-3


def test_one_row_gives_a_scale_and_nothing_negative() -> None:
    (fit,) = fit_rows([row(100 * MIB, 1050 * MIB)])
    assert fit.scale == pytest.approx(0.5) and fit.constant_bytes == 0 and fit.context_bytes is None
    (fit,) = fit_rows([row(100 * MIB, 900 * MIB), row(200 * MIB, 950 * MIB)])
    assert fit.scale == 0 and fit.constant_bytes == 0 and fit.worst_error_percent > 4
    assert fit_rows([row(1, 0)]) == ()


def test_what_a_profile_corrects(tmp_path: Path) -> None:
    file = tmp_path / "rig.json"
    rows = [
        row(working, 1010 * MIB + 2 * working, reserved_bytes=1100 * MIB, driver_bytes=1600 * MIB)
        for working in (100 * MIB, 200 * MIB)
    ]
    file.write_text(json.dumps(profile_json(rows, {"model": "x"})))
    profile = read_profile(file)
    terms = [
        Term("weights", 7, "exact", "w"), Term("kv_cache", 100, "exact", "k"), Term("activations", 50, "fitted", "a"),
        Term("non_torch", 9, "reported", "n"), Term("context", 9, "reported", "c"), Term("slack", 9, "reported", "s"),
    ]  # fmt: skip
    found = {t.name: t for t in profile.corrected("RTX 3090", terms)}
    assert found["weights"] == terms[0] and found["kv_cache"] == terms[1]
    assert found["activations"].n_bytes == 100 and found["non_torch"].n_bytes == pytest.approx(10 * MIB, abs=16)
    assert found["context"].n_bytes == 500 * MIB and "measured: rig.json, 2 rows" in found["context"].source
    with pytest.raises(PlanError, match=r"^rig\.json was measured on RTX 3090, not on RTX 4090$"):
        profile.corrected("RTX 4090", terms)
    plain = answer("vram", "Qwen2.5-7B", "--gpu", "RTX 3090", "-c", "4k")
    fitted = answer("vram", "Qwen2.5-7B", "--gpu", "RTX 3090", "-c", "4k", "--profile", file)
    before, after = ({t["name"]: t for t in e["estimates"][0]["gpus"][0]["terms"]} for e in (plain, fitted))
    assert after["context"]["bytes"] == 500 * MIB != before["context"]["bytes"]
    assert after["activations"]["bytes"] == pytest.approx(2 * before["activations"]["bytes"], rel=1e-6)
    assert after["weights"] == before["weights"]
    other = run("vram", "Qwen2.5-7B", "--gpu", "RTX 4090", "-c", "4k", "--profile", file)
    assert other.exit_code == 1 and "error: rig.json was measured on RTX 3090, not on RTX 4090" in other.stderr
    vllm = run("vram", "Qwen2.5-7B", "--engine", "vllm", "--profile", file)
    assert vllm.exit_code == 2 and "--profile corrects this project's own engine, not vllm" in vllm.stderr


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"kind": "qwenq-vram-profile", "version": 1, "rows": []}',
     '{"kind": "qwenq-vram-profile", "version": 1, "rows": [{"context": -1}]}',
     '{"kind": "qwenq-vram-profile", "version": 1, "rows": [7]}', "[" * 100_000],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_files_that_are_no_profile(content: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(content)
    with pytest.raises(PlanError, match=r"p\.json"):
        read_profile(file)


def test_a_profile_that_measured_nothing_is_refused(tmp_path: Path) -> None:
    """As of a CPU whose system does not report a process's memory."""
    file = tmp_path / "p.json"
    file.write_text(json.dumps(profile_json([row(MIB, 0)], {})))
    with pytest.raises(PlanError, match=r"p\.json: no row has a measured peak"):
        read_profile(file)


def test_a_real_measurement(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    found = answer("vram", "measure", tiny, "-c", "64,256", "--prefill-chunk", 50, "-o", file)
    assert found == json.loads(file.read_text()) and found["ended"] == ""
    assert [(r["context"], r["phase"]) for r in found["rows"]] == [
        (c, p) for c in (64, 256) for p in ("prefill", "decode")
    ]
    assert all(r["device"] == "CPU" and r["exact_bytes"] > found["weight_bytes"] for r in found["rows"])
    again = run("vram", "measure", tiny, "-o", file)
    assert again.exit_code == 1 and f"error: {file}: exists" in again.stderr


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_random_weights_of_a_models_shapes(
    bits: int, tiny: Path, random_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's directory lends its shapes alone: its tensors are never opened."""
    monkeypatch.setattr("qwenq.checkpoint.reader.Checkpoint.read", None)
    monkeypatch.setattr("qwenq.runtime.linear.lacks_for_cpu_kernels", lambda: "no compiler")
    found = answer("vram", "measure", "--synthetic", tiny, "--bits", bits, "--group-size", 32, "-c", "64")
    assert found["kernels"] == {4: {"int4": 28}, 8: {"int4 halves": 28}, 16: {}}[bits]  # torch's
    assert len(found["rows"]) == 2


def test_running_out_of_memory_keeps_the_rows_before(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenq.runtime.generate import Session

    forward = Session.forward

    def short(session: Session, ids: Any) -> Any:
        if session.max_model_len > 100:
            from qwenq.errors import RunError

            raise RunError("CPU: out of memory while computing 50 tokens: needs 2 GiB, 1 GiB are free")
        return forward(session, ids)

    monkeypatch.setattr(Session, "forward", short)
    result = run("vram", "measure", tiny, "-c", "64,128,256", "--prefill-chunk", 50)
    assert result.exit_code == 3 and "error: memory ran out, context 128: CPU: out of memory" in result.stderr
    assert result.stdout.count("prefill") == 1
    nowhere = run("vram", "measure", tiny, "-o", "no/such/rows.json")  # said before anything is measured
    assert nowhere.exit_code == 1 and nowhere.stderr.splitlines()[0] == "error: no/such: no such directory"
    short_one = run("vram", "measure", "owner/never-fetched", "-c", "4,64")
    assert short_one.exit_code == 2 and "error: context is 4 tokens, wanted more than 4" in short_one.stderr
    both = run("vram", "measure", tiny, "--synthetic", "Qwen2.5-0.5B")
    assert both.exit_code == 2 and "give either a checkpoint or --synthetic MODEL" in both.stderr
    for words in (["--bits", 8], ["--group-size", 64]):
        ignored = run("vram", "measure", tiny, *words)
        assert ignored.exit_code == 2 and f"error: {words[0]} is for random weights" in ignored.stderr
