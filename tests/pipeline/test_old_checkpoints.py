"""What version 0.1.0 wrote is verified, reported, converted and evaluated as before: tests/data/v0.1.

Everything goes through the command line, so that nothing here names a module of the package but the entry point.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from safetensors import safe_open

DATA = Path(__file__).parents[1] / "data"
OLD = DATA / "v0.1"
MANIFEST, JOURNAL, STATE = "qwenq-manifest.json", "qwenq-journal.jsonl", ".qwenq-state-1.safetensors"

# tests/data/v0.1/README.md: any x86 CPU computes the same bits
SAME_BITS = {
    "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41",
}  # fmt: skip
TEXT = ["--calibration", "calib.txt", "--eval-text", "heldout.txt", "-n", "4", "--sequence-length", "32",
        "--eval-samples", "1", "--device", "cpu", "--calibration-dtype", "float32"]  # fmt: skip
IN_FLOAT32 = ["--compute-dtype", "float32"]
DEFAULTS_OF_THEN = ["--builtin-share", "0", "--sink-weight", "1", "--damp-percent", "0.02", *IN_FLOAT32]
JOB = ["quantize", "tiny-qwen2", "--bits", "4", *TEXT, "--pull", "1", "--pull-share", "0.5", *DEFAULTS_OF_THEN]

RUN_ALL = """
import contextlib, io, json, sys
from qwenq.__main__ import main
for line in sys.stdin:
    results = []
    for words in json.loads(line):
        sys.argv, out, err = ["qwenq", *words], io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
        results.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(results), flush=True)
"""
PROCESSES: dict[frozenset[tuple[str, str]], subprocess.Popen[str]] = {}  # by environment: each imports torch once

Answer = tuple[int, str, str]  # exit code, stdout, stderr


def run_all(*commands: list[str], **environment: str) -> list[Answer]:
    """Command lines, one after the other in tests/data: here, or with an environment in a process that has it."""
    if not environment:
        with contextlib.chdir(DATA):
            results = [run(*words) for words in commands]
        return [(result.exit_code, result.stdout, result.stderr) for result in results]
    key = frozenset(environment.items())
    if key not in PROCESSES:
        PROCESSES[key] = subprocess.Popen(
            [sys.executable, "-c", RUN_ALL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=DATA,
            env=os.environ | {"COLUMNS": "120", "TERM": "dumb", "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip
    process = PROCESSES[key]
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(commands) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, f"ended with {process.wait()}"
    return [(code, out, err) for code, out, err in json.loads(line)]


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    while PROCESSES:
        PROCESSES.popitem()[1].communicate()


def answers(*commands: list[object]) -> list[Any]:
    """The JSON that each command prints."""
    found = run_all(*([*map(str, words), "--json"] for words in commands))
    for words, (code, _, err) in zip(commands, found, strict=True):
        assert code == 0, f"{words}\n{err}"
    return [json.loads(out) for _, out, _ in found]


def manifest_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return found


def put_back(directory: Path) -> None:
    """What a checkpoint has of tiny-qwen2: files as they are, and the tensors of its first and last shard."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(DATA / "tiny-qwen2" / name, directory / name)
    stored = {}
    for file in (DATA / "tiny-qwen2").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= dict.fromkeys(tensors.keys(), file)
    for path in (OLD / "outer").iterdir():
        header = path.read_bytes()
        entries = json.loads(header[8:])
        parts = {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            with safe_open(stored[name], "pt") as tensors:
                parts[entry["data_offsets"][0]] = tensors.get_tensor(name).view(torch.uint8).numpy().tobytes()
        shard = directory / path.with_suffix(".safetensors").name
        shard.write_bytes(header + b"".join(parts[start] for start in sorted(parts)))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """old(name): the whole checkpoint `gptq` or `mixed`, as 0.1.0 wrote it."""
    place = tmp_path_factory.mktemp("old")
    for name in ("gptq", "mixed"):
        shutil.copytree(OLD / name, place / name)
        put_back(place / name)
    return lambda name: place / name


@pytest.fixture(scope="module")
def same_bits() -> None:
    """A skip, with its reason, where another torch or transformers may round otherwise."""
    then = json.loads((OLD / "unfinished.partial" / JOURNAL).read_text().splitlines()[0])["job"]["numerics"]
    here = {"torch": torch.__version__, "transformers": version("transformers")}
    other = [f"{name} was {then[name]}, is {value}" for name, value in here.items() if value != then[name]]
    if other:
        pytest.skip(f"bytes are compared with what other versions computed: {'; '.join(other)}")


# ---------------------------------------------------------------------- finished checkpoints


def test_they_are_as_their_manifests_say(old: Callable[[str], Path]) -> None:
    found_of = answers(["verify", old("gptq")], ["verify", old("mixed")])
    for name, files, found in zip(("gptq", "mixed"), (14, 16), found_of, strict=True):
        assert found["ok"] and found["findings"] == [] and found["files"] == files
        assert found["digest"] == manifest_of(old(name))["digest"]


def test_a_changed_byte_is_seen(old: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(old("mixed"), copy)
    shard = copy / "model-00003-of-00006.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    ((code, out, _),) = run_all(["verify", str(copy)])
    assert code == 1 and out.startswith(f"{shard.name}: changed: SHA-256 {sha256(data).hexdigest()}")


def test_inspect_finds_no_disagreement(old: Callable[[str], Path]) -> None:
    found, mixed = answers(["inspect", old("gptq")], ["inspect", old("mixed")])
    assert found["parameters"] == 1_050_752 and found["disagreements"] == []
    assert found["scheme"] == "4-bit g128, gptq"
    stored = sum(part["stored_bytes"] for part in mixed["parts"])
    assert mixed["disagreements"] == [] and stored == manifest_of(old("mixed"))["tensor_bytes"]


def test_report_has_the_figures_of_the_manifests(old: Callable[[str], Path], tmp_path: Path) -> None:
    answers(["report", old("gptq"), old("mixed"), "-o", tmp_path, "--measured", OLD / "profile.json"])
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    for name in ("gptq", "mixed"):
        manifest = manifest_of(old(name))
        drift, layers = manifest["drift"], manifest["layers"]
        figures = [
            f"{drift['kl']['mean']:.4g}", f"{drift['kl_p99']:.4g}", f"{drift['perplexity']:.3f}",
            f"{100 * drift['top1_agreement']['mean']:.2f} %", f"{manifest['bits_per_linear_weight']:.3f}",
            *(f"−{-layer['stream_error_db']:.1f}" for layer in layers),
        ]  # fmt: skip
        missing = [figure for figure in figures if figure not in text or figure not in page]
        assert not missing, name
        linears = [linear for layer in layers for linear in layer["linears"]]
        worst = max(linear["error_db"] for linear in linears if linear["name"].endswith("q_proj"))
        assert f"(worst −{-worst:.1f}, layer" in text
    assert "None. All 56 linears were quantized as asked" in text
    assert "| 256 | CPU | prefill | 0.022 |" in text  # of the profile


def test_codes_survive_another_format(old: Callable[[str], Path], tmp_path: Path) -> None:
    pairs = (("gptq", "awq"), ("gptq", "compressed-tensors"), ("mixed", "compressed-tensors"))
    commands: list[list[object]] = []
    for name, target in pairs:
        there, back = tmp_path / f"{name}-{target}", tmp_path / f"{name}-{target}-back"
        commands += [
            ["convert", old(name), there, "--format", target],
            ["convert", there, back, "--format", "gptq"],
            ["verify", there],
        ]
    answers(*commands)
    for name, target in pairs:
        there, back = tmp_path / f"{name}-{target}", tmp_path / f"{name}-{target}-back"
        came_from = manifest_of(there)["made_from"]
        assert came_from["digest"] == manifest_of(old(name))["digest"]
        assert came_from["drift"] == manifest_of(old(name))["drift"]
        assert "Quantized in the gptq format, then converted bit for bit." in (there / "README.md").read_text()
        for number in range(2, 6):
            shard = f"model-{number:05d}-of-00006.safetensors"
            if target == "compressed-tensors":  # awq comes back with zero points of its own
                assert (back / shard).read_bytes() == (old(name) / shard).read_bytes(), shard
            with safe_open(back / shard, "pt") as ours, safe_open(old(name) / shard, "pt") as theirs:
                for tensor in theirs.keys():  # noqa: SIM118
                    if tensor.endswith((".qweight", ".scales")):
                        assert torch.equal(ours.get_tensor(tensor), theirs.get_tensor(tensor)), tensor


def test_eval_gives_the_figures_of_then(old: Callable[[str], Path]) -> None:
    then = json.loads((OLD / "eval.json").read_text())
    measured = ["--reference", "tiny-qwen2", "--text", "heldout.txt", "-n", "2", "--sequence-length", "64"]
    (now,) = answers(["eval", old("gptq"), *measured, *IN_FLOAT32, "--device", "cpu"])
    assert now.keys() == then.keys()
    assert now["kl"] == pytest.approx(then["kl"], rel=1e-3)
    for key in ("perplexity", "reference_perplexity"):
        assert now[key] == pytest.approx(then[key], rel=1e-5)
    for key in ("tokens", "windows", "text", "text_sha256", "compute_dtype", "metrics_version", "top1_agreement"):
        assert now[key] == then[key], key


# ---------------------------------------------------------------------- files beside them


def test_sensitivities_and_recipes_choose_what_they_chose(tmp_path: Path) -> None:
    dry = ["quantize", "tiny-qwen2", "--dry-run"]
    sensitivity = ["--sensitivity", str(OLD / "sensitivity.json")]
    again = tmp_path / "again.toml"
    made = answers(
        [*dry, "--bpw", "4.5", *sensitivity, "--save-recipe", again],
        [*dry, "--recipe", OLD / "recipe.toml", *sensitivity],
    )
    schemes = [line.split("#")[0] for line in again.read_text().splitlines()]
    wanted = [line.split("#")[0] for line in (OLD / "recipe.toml").read_text().splitlines()]
    assert [line for line in schemes if line] == [line for line in wanted if line]
    for found in made:
        assert found["file_bytes"] == found["recipe"]["file_bytes"] == manifest_of(OLD / "mixed")["file_bytes"]
        assert found["recipe"]["predicted_kl"] == pytest.approx(0.00409494, rel=1e-5)


def test_a_profile_corrects_the_estimate(old: Callable[[str], Path]) -> None:
    asked = ["vram", old("gptq"), "-c", "128"]
    plain, corrected = answers(asked, [*asked, "--profile", OLD / "profile.json"])

    def term(found: Any, name: str) -> Any:
        return next(t for t in found["estimates"][0]["gpus"][0]["terms"] if t["name"] == name)

    (fit,) = json.loads((OLD / "profile.json").read_text())["fits"]
    before, after = term(plain, "activations"), term(corrected, "activations")
    assert after["bytes"] == round(before["bytes"] * fit["scale"])
    assert after["source"] == "measured: profile.json, 6 rows"


def test_old_flags_are_taken() -> None:
    """--pull and --pull-share by their old names, values and meaning."""
    dry = ["quantize", "tiny-qwen2", "--dry-run", "--calibration", "calib.txt", *DEFAULTS_OF_THEN]
    long, short = ["-n", "16", "--sequence-length", "256"], ["-n", "64", "--sequence-length", "128"]
    windows = {  # that run through the 16-bit layers too
        (*long,): 16,
        (*long, "--pull", "1"): 16,
        (*long, "--pull", "0.3"): 16,
        (*long, "--pull", "0"): 0,
        (*long, "--pull-share", "0"): 0,
        (*short, "--pull", "1", "--pull-share", "0.1"): 32,  # 8 tokens a column of down, in whole batches
        (*short, "--pull", "1", "--pull-share", "1"): 64,
    }
    found = answers(*([*dry, *options] for options in windows))
    assert [one["assumed"]["original_windows"] for one in found] == list(windows.values())
    too_far, one_window = run_all([*dry, "--pull", "1.5"], [*dry, "--pull", "1", "-n", "1"])
    assert too_far[0] == 2 and "--error-correction: '1.5', wanted a number from 0 to 1" in too_far[2]
    assert one_window[0] == 1 and "one window of calibration has no two halves" in one_window[2]


# ---------------------------------------------------------------------- bytes


@pytest.fixture(scope="module")
def resumed(
    same_bits: None, old: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Answer]]:
    """The job of `gptq` by this code: whole, gone on with from the saved state, and from the shards alone.

    Then layers of the old checkpoints made again. One process, which computes as 0.1.0 did.
    """
    place = tmp_path_factory.mktemp("resumed")
    for name in ("stated", "replayed"):
        work = place / f"{name}.partial"
        shutil.copytree(OLD / "unfinished.partial", work)
        for number in (2, 3):
            shard = f"model-{number:05d}-of-00006.safetensors"
            shutil.copyfile(OLD / "gptq" / shard, work / shard)
    (place / "replayed.partial" / STATE).unlink()
    again = ["--source", "tiny-qwen2", "--calibration", "calib.txt", "--layers", "1,3"]
    commands = {
        "whole": [*JOB, "-o", str(place / "whole")],
        "stated": [*JOB, "-o", str(place / "stated"), "--resume"],
        "replayed": [*JOB, "-o", str(place / "replayed"), "--resume"],
        **{f"verify {name}": ["verify", str(old(name)), *again] for name in ("gptq", "mixed")},
    }
    return place, dict(zip(commands, run_all(*commands.values(), **SAME_BITS), strict=True))


@pytest.mark.parametrize("name", ["stated", "replayed"])
def test_an_unfinished_job_whose_sums_ended_in_other_bits_is_refused(
    name: str, resumed: tuple[Path, dict[str, Answer]]
) -> None:
    """0.1.0 took sums over all windows in a row, this version takes them by parts: half a job of each is neither's."""
    place, answers = resumed
    code, _, said = answers[name]
    assert code == 1 and "cannot resume, numerics.sums was None, now \"8 parts, products in the states' dtype\"" in said
    assert "hint: another version began it, which takes sums over windows in another way" in said
    assert (place / f"{name}.partial" / JOURNAL).is_file() and not (place / name).exists()


def test_the_same_job_writes_files_like_those_of_then(old: Callable[[str], Path], resumed: tuple[Path, Any]) -> None:
    whole = resumed[0] / "whole"
    for path in old("gptq").iterdir():
        if path.name.endswith("config.json"):
            assert (whole / path.name).read_bytes() == path.read_bytes(), path.name
        elif path.suffix == ".safetensors":
            then, now = path.read_bytes(), (whole / path.name).read_bytes()
            assert len(then) == len(now) and then[:8] == now[:8], path.name
            header = int.from_bytes(then[:8], "little")
            assert then[8 : 8 + header] == now[8 : 8 + header], path.name
    then, now = manifest_of(old("gptq")), manifest_of(whole)
    for key in ("parameters", "tensor_bytes", "file_bytes", "bits_per_linear_weight", "warnings"):
        assert now[key] == then[key], key
    # 128 tokens of calibration leave most of a Hessian to damping: other last bits go far, and 32 tokens show it
    assert now["drift"]["kl"]["mean"] == pytest.approx(then["drift"]["kl"]["mean"], rel=0.3)


@pytest.mark.parametrize("name", ["gptq", "mixed"])
def test_old_layers_are_not_made_again_in_another_order(name: str, resumed: tuple[Path, dict[str, Answer]]) -> None:
    code, _, said = resumed[1][f"verify {name}"]
    assert code == 1 and "sums over windows were taken in another way (all in a row, here 8 parts" in said
    assert "--layers none compares files alone" in said
