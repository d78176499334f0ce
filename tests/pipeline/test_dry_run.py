"""What a dry run assumes of a job, against the job, and what it says this machine lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run, text_windows
from families import model

from qwenq.machine import total_memory
from qwenq.pipeline.config import DEFAULT_WINDOWS, SET_TOKENS, original_windows
from qwenq.pipeline.preflight import sensitivity_bytes

GB = 10**9


def dry(*words: object) -> dict[str, Any]:
    result = run("quantize", *words, "--dry-run", "--json")
    assert result.exit_code == 0 and result.stderr == "", result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def texts(calib: Path, heldout: Path) -> list[object]:
    return ["--calibration", calib, "--eval-text", heldout, "--sequence-length", 64, "--group-size", 32]


@pytest.mark.parametrize("asked", [[], ["-n", 7, "--eval-samples", 3]])
def test_windows_are_those_that_the_job_reads(
    asked: list[object], tiny: Path, texts: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assumed = dry(tiny, *texts, *asked)["assumed"]
    done = run("quantize", tiny, "-o", out, *texts, *asked)
    assert done.exit_code == 0
    job = json.loads((out / "qwenq-manifest.json").read_text())["job"]
    assert assumed["counted"] and assumed["window_tokens"] == 64
    assert assumed["calibration_windows"] == job["calibration"]["windows"]
    assert assumed["builtin_windows"] == job["calibration"]["builtin"]["windows"] > 0
    name = job["calibration"]["text"]
    told = f"calibrating on {assumed['calibration_windows']} windows of 64 tokens of {name}, "
    replaced = f"{assumed['builtin_windows']} of them replaced by the built-in set's (--builtin-share)"
    assert told + replaced in done.stderr.splitlines()
    assert replaced in run("quantize", tiny, *texts, *asked, "--dry-run").stdout
    own = run("quantize", tiny, *texts, *asked, "--dry-run", "--builtin-share", 0).stdout
    assert "assumed: " in own and "built-in" not in own
    assert assumed["evaluation_windows"] == job["evaluation"]["windows"]
    assert (assumed["calibration_dtype"], assumed["compute_dtype"]) == (job["calibration_dtype"], job["compute_dtype"])
    assert (assumed["original_windows"] > 0) == (job["options"]["error_correction"] > 0)


def test_more_windows_than_there_are(tiny: Path, texts: list[object], calib: Path) -> None:
    there = len(text_windows(calib, tiny, 512).ids)
    many = dry(tiny, *texts, "--sequence-length", 512, "-n", 500)
    assert many["assumed"]["calibration_windows"] == there < 128
    assert many["warnings"] == [f"--num-samples 500: {calib} has {there} windows of 512 tokens"]
    all_there_are = dry(tiny, *texts, "--sequence-length", 512)
    assert all_there_are["peak_ram_bytes"] == many["peak_ram_bytes"] and all_there_are["warnings"] == []
    none = dry(tiny, *texts[2:], "--method", "rtn")
    assert none["assumed"]["calibration_windows"] == 0 and none["warnings"] == []


def test_windows_of_token_ids_have_their_own_length(tiny: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.ones((5, 48), dtype=np.int64))
    assumed = dry(tiny, "--calibration", tmp_path / "ids.npy", "--group-size", 32, "--pull", 1)["assumed"]
    assert (assumed["calibration_windows"], assumed["window_tokens"], assumed["original_windows"]) == (5, 48, 4)


def test_without_a_tokenizer_the_builtin_set_is_as_long_as_it_is() -> None:
    found = dry("Qwen2.5-72B")
    assert found["assumed"]["calibration_windows"] == DEFAULT_WINDOWS
    assert found["assumed"]["original_windows"] == 128, "2 tokens and more for each of 29,568 columns"
    fewer = dry("Qwen2.5-72B", "-n", 100)
    assert fewer["assumed"]["original_windows"] == 0, "51,200 tokens are too few to pull 29,568 columns by"
    longer = dry("Qwen2.5-72B", "--sequence-length", 2048)
    assert longer["assumed"]["calibration_windows"] == SET_TOKENS["builtin"] // 2048 == 76
    assert dry("Qwen2.5-72B", "--calibration", "c4")["assumed"]["calibration_windows"] == 128
    about = dry("Qwen2.5-72B", "-n", 100, "--sequence-length", 2048)
    of_windows = [warning for warning in about["warnings"] if "windows" in warning]  # small disks and memories are, too
    assert of_windows == ["--num-samples 100: builtin has about 76 windows of 2048 tokens"]
    assert about["assumed"]["evaluation_windows"] == 6


def test_what_it_assumes_in_words() -> None:
    result = run("quantize", "Qwen2.5-7B", "--dry-run", "--device", "cuda:0", "-n", 64, "--pull", 1)
    assert result.exit_code == 0, result.output
    assert (
        "assumed: about 64 calibration windows of 512 tokens of builtin in bfloat16; error correction "
        "of o and down from 64 of them; 20 evaluation windows in bfloat16; massive activations, so rotated hidden "
        "states; on cuda:0\n" in result.stdout
    )
    asked = run("quantize", "Qwen2.5-7B", "--dry-run", "--device", "cuda:0", "--bits", 8, "--rotate")
    assert "windows in bfloat16; rotated hidden states; on cuda:0\n" in asked.stdout
    assert re.search(r"peak memory, predicted +│ +\d", result.stdout) and "(on GPU)" not in result.stdout
    assert re.search(r"peak memory of a GPU, predicted +│ +\d", result.stdout)
    assert re.search(r"additional download of the source +│ +15\.23 GB", result.stdout)
    on_cpu = run("quantize", "Qwen2.5-0.5B", "--group-size", 64, "--dry-run", "--device", "cpu", "--bits", 8)
    assert "; 20 evaluation windows in float32; on cpu, up to 4 workers\n" in on_cpu.stdout
    assert "GPU" not in on_cpu.stdout


def test_what_ranks_send_is_shown_with_the_head_where_it_is_solved(tiny: Path, texts: list[object]) -> None:
    between = ["--ranks", 2, "--network", "1gbps", "--dry-run"]
    for form, solved in (("gguf", True), ("gptq", False)):
        ask = ["quantize", tiny, *texts[:-2], *(["--group-size", 32] if form == "gptq" else []), "--format", form]
        shown = run(*ask, *between).stdout
        assert ("received by a rank, the head" in shown) == solved and "received by a rank, a layer" in shown
        assert shown.count("the same at 1gbps") == 1 + solved
        found = json.loads(run(*ask, *between, "--json").stdout)
        assert (found["wire_head_bytes"] > 0) == solved
        assert found["wire_head_s"] == pytest.approx(found["wire_head_bytes"] * 8e-9)


def test_a_machine_too_small_is_warned_of(monkeypatch: pytest.MonkeyPatch, tiny: Path, texts: list[object]) -> None:
    memory = total_memory()
    assert memory is not None
    meminfo = Path("/proc/meminfo").read_text().split()
    assert memory == int(meminfo[meminfo.index("MemTotal:") + 1]) * 1024
    monkeypatch.setattr("qwenq.pipeline.dryrun.total_memory", lambda: 8 * GB)
    monkeypatch.setattr("qwenq.pipeline.preflight.free_disk", lambda out: 5 * GB)
    found = dry("Qwen2.5-72B", "--device", "cpu")
    assert [re.sub(r"\d+\.\d\d", "N", line) for line in found["warnings"]] == [
        "the predicted peak of memory is N GB, this machine has N GB",
        "N GB of disk are needed, N GB are free here: choose another with -o",
    ]
    result = run("quantize", "Qwen2.5-72B", "--dry-run", "--device", "cpu")
    assert result.exit_code == 0 and result.stderr.count("warning: ") == 2
    assert dry(tiny, *texts)["warnings"] == [] and dry(tiny, *texts)["source_download_bytes"] == 0


def test_a_disk_too_small_for_a_given_output_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, texts: list[object]
) -> None:
    """With --json too, once the figures are out."""
    monkeypatch.setattr("qwenq.pipeline.preflight.free_disk", lambda out: 1000)
    words = ("quantize", tiny, *texts, "-o", tmp_path / "out", "--dry-run")
    shown, told = run(*words), run(*words, "--json")
    assert (told.exit_code, told.stderr) == (shown.exit_code, shown.stderr) == (1, told.stderr)
    assert re.match(r"error: .*/out: needs \S+ MB of disk, ", told.stderr)
    assert json.loads(told.stdout)["disk_free_bytes"] == 1000


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("out", "/out: already exists"),
        ("out.partial", "/out.partial: an unfinished job is there"),
        (None, "the output may not be the model's own directory or inside it"),
    ],
)
def test_a_place_that_the_job_would_refuse(
    there: str | None, words: str, tiny: Path, texts: list[object], tmp_path: Path
) -> None:
    """In the words of the job, once the figures are out."""
    if there:
        (tmp_path / there).mkdir()
    words_of = ("quantize", tiny, *texts, "-n", 2, "-o", tmp_path / "out" if there else tiny / "out")
    dry_run, real = run(*words_of, "--dry-run", "--json"), run(*words_of)
    assert real.exit_code == dry_run.exit_code == 1 and words in dry_run.stderr
    assert dry_run.stderr.startswith("error: ") and real.stderr.endswith(dry_run.stderr)
    assert json.loads(dry_run.stdout)["disk_needed_bytes"] > 0


def test_a_share_of_windows_for_no_error_correction_is_told(tiny: Path, texts: list[object], tmp_path: Path) -> None:
    """By the job too: at 8 bits errors are not corrected by default."""
    words = ("quantize", tiny, *texts, "--bits", 8, "--error-correction-share")
    for more in (["--dry-run"], ["-o", tmp_path / "out", "-n", 2, "--eval-samples", 1]):
        told = run(*words, 0.7, *more)
        assert told.exit_code == 0 and "warning: --error-correction-share 0.7 does nothing: " in told.stderr
    for share, more in ((0.5, []), (0, []), (0.7, ["--error-correction", 1])):
        assert "does nothing" not in run(*words, share, *more, "--dry-run").stderr


def test_a_dry_run_goes_on_with_no_job(tiny: Path) -> None:
    refused = run("quantize", tiny, "--dry-run", "--resume")
    assert refused.exit_code == 2 and "--resume and --dry-run exclude each other" in refused.stderr


def test_a_budget_counts_the_measuring(
    random_model: Callable[..., Path], texts: list[object], tmp_path: Path
) -> None:
    options = ["--device", "cuda:0"]
    found = dry("Qwen2.5-72B", "--bpw", "5", *options)
    wanted = sensitivity_bytes(model("Qwen2.5-72B"), 512, 2, on_gpu=True)
    assert (found["sensitivity_ram_bytes"], found["sensitivity_vram_bytes"]) == wanted
    assert 7 * GB < wanted[1] < 7.3 * GB, "as traced"
    words = run("quantize", "Qwen2.5-72B", "--bpw", "5", *options, "--dry-run")
    shown = " ".join(words.stdout.replace("│", " ").split())  # a narrow console breaks the label
    assert re.search(r"peak memory of a GPU, predicted,( measuring sensitivities)? 7\.14 GB", shown)
    assert "sensitivity_ram_bytes" not in dry("Qwen2.5-72B", *options)
    small, table, budget = random_model(num_hidden_layers=1), tmp_path / "s.json", [*texts[:6], "--bpw", "5"]
    assert run("sensitivity", small, *texts[:2], *texts[4:6], "-n", 4, "-o", table).exit_code == 0
    assert "sensitivity_ram_bytes" in dry(small, *budget)
    assert "sensitivity_ram_bytes" not in dry(small, *budget, "--sensitivity", table)


def test_all_windows_of_a_wide_model_are_pulled_by_but_an_odd_one() -> None:
    assert original_windows(model("Qwen2.5-7B"), 85, 512) == 84


def test_what_a_job_would_refuse_a_dry_run_refuses(tiny: Path, texts: list[object]) -> None:
    rtn = run("quantize", tiny, *texts[2:-2], "--method", "rtn", "--bpw", "5.5", "--dry-run")
    assert rtn.exit_code == 1 and "--method rtn measures no sensitivities" in rtn.stderr
    for rounds in (["--method", "rtn"], ["--format", "bnb-nf4"]):
        for given, value, why in (
            ("--error-correction", 0, "--error-correction is read from calibration"),
            ("--pull", 0, "--error-correction is read from calibration"),
            ("--error-correction-share", 0.5, "--error-correction-share is of calibration"),
            ("--damp-percent", 0.1, "--damp-percent damps what calibration measures"),
            ("--sink-weight", 64, "--sink-weight weighs tokens of calibration"),
            ("--builtin-share", 0, "--builtin-share is of calibration"),
            ("--calibration", "builtin", "--calibration names a calibration text"),
            ("-n", 128, "--num-samples counts windows of calibration"),
            ("--seed", 0, "--seed draws windows of calibration"),
            ("--calibration-dtype", "auto", "--calibration-dtype is of calibration"),
            ("--fold", "", "--fold takes channel scales from calibration"),
        ):
            words = [*rounds, given] if value == "" else [*rounds, given, value]
            idle = run("quantize", "owner/never-fetched", "-o", "out", *words)
            assert idle.exit_code == 2 and f"{why}: rounding to nearest reads none" in " ".join(idle.stderr.split())
            assert run("quantize", "Qwen2.5-7B", "--dry-run", *words).stderr == idle.stderr
        for none in ([], ["--no-fold"]):
            assert run("quantize", "Qwen2.5-7B", "--dry-run", *rounds, *none).exit_code == 0, "nobody gave it"
    off = run("quantize", "Qwen2.5-7B", "--dry-run", "--error-correction", 0, "--error-correction-share", 0.7)
    assert off.exit_code == 2 and "--error-correction-share is of what --error-correction 0 turns off" in off.stderr
    one = run("quantize", tiny, "--bits", 4, *texts, "-n", 1, "--pull", "1", "--dry-run")
    assert one.exit_code == 1 and "one window of calibration has no two halves" in one.stderr
    rounded = [*texts[2:], "--method", "rtn", "--eval-samples", 3]
    for few, kind in (([*texts, "-n", 3], "calibration"), (rounded, "evaluation")):
        said = run("quantize", tiny, "--bits", 4, *few, "--dry-run", "--ranks", 4)
        assert said.exit_code == 1 and f"error: 3 {kind} windows for 4 ranks" in said.stderr, said.output
    assumed = dry(tiny, "--bits", 4, *texts, "-n", 1)["assumed"]
    assert assumed["calibration_windows"] == 1 and assumed["original_windows"] == 0


def test_a_quantized_hub_model_is_refused_by_its_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("qwenq.io.hub.fetch_config", lambda name: tmp_path)
    result = run("quantize", "someone/else-AWQ", "--bits", 4, "--dry-run")
    assert result.exit_code == 1 and result.stderr.startswith("error: someone/else-AWQ: already quantized")
