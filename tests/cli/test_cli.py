"""`qwenq quantize` and `qwenq eval` from the outside: output, errors in one line, exit codes, frozen options."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

import qwenq.api
import qwenq.cli.options
from qwenq.cli.main import command as load_command
from qwenq.errors import QwenqError
from qwenq.solver.metrics import Reading, TokenDrift, summarise
from tests.conftest import run

# ---------------------------------------------------------------------- what users read


@pytest.mark.parametrize(("windows", "said"), [(1, {"", "one window"}), (2, {"", "SE 0.143", "0.00500 to 0.00500"})])
def test_one_window_has_no_interval(windows: int, said: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # the console keeps the width that it is made with
    from qwenq.cli.console import drift_table

    nll = torch.tensor([1.0, 1.1, 1.2, 1.3]) if windows == 1 else torch.tensor([1.0, 1.0, 1.1, 1.1])
    tokens = TokenDrift(nll, nll, torch.full((4,), 0.005), torch.ones(4), 0)
    table = drift_table(summarise(tokens, Reading("t", "", windows, 4 // windows + 1, "float32")))
    cells = [str(cell) for cell in table.columns[2].cells]
    assert said <= set(cells) and (windows > 1 or set(cells) == said)


# ---------------------------------------------------------------------- what users type


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("quantize", ["MODEL"]), ("eval", ["MODEL"]), ("run", ["MODEL"]), ("serve", ["MODEL"]), ("inspect", ["MODEL"]),
        ("convert", ["CHECKPOINT", "OUT"]), ("verify", ["CHECKPOINT"]), ("report", ["CHECKPOINT"]),
    ],
)  # fmt: skip
def test_arguments_are_called_alike(command: str, words: list[str]) -> None:
    parameters = load_command(command).params
    assert [p.metavar for p in parameters if p.param_type_name == "argument"] == words


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize"],
        ["quantize", "m", "-o", "x", "--bits", "four"],
        ["quantize", "m", "-o", "x", "--num-samples", "0"],
        ["quantize", "m", "-o", "x", "--damp-percent", "2"],
        ["quantize", "m", "--no-such-option"],
        ["quantize", "m", "-o", "x", "--bits", "4", "--target-size", "47GB"],
        ["quantize", "m", "-o", "x", "--group-size", "64", "--bpw", "5"],
        ["quantize", "m", "-o", "x", "--target-size", "47GB", "--recipe", "r.toml"],
        ["quantize", "m", "-o", "x", "--context", "16k"],
        ["quantize", "m", "-o", "x", "--sensitivity", "s.json"],
        ["quantize", "m", "-o", "x", "--target-size", "47GB", "--save-recipe", "r.toml"],
        ["eval", "m"],
        ["eval", "m", "--reference", "r", "--max-kl", "-1"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.startswith("error: "), result.stderr
    assert len(result.stderr.splitlines()) <= 2, result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "m", "--bits", "four"], "--bits: 'four', wanted a whole number"),
        (["quantize", "m", "-n", "0"], "--num-samples / -n: '0', wanted a whole number of at least 1"),
        (["quantize", "m", "--damp-percent", "1%"], "--damp-percent: '1%', wanted a number from 0 to 1"),
        (["vram", "serve", "--port", "99999"], "--port: '99999', wanted a whole number from 0 to 65535"),
        (["plan", "", "--gpu", "24GB"], "MODEL: '', wanted a name or a path"),
        (["verify", ""], "CHECKPOINT: '', wanted a name or a path"),
        (["vram", "m", "--contxt", "3"], "no such option: --contxt"),
        (["vrm"], "no such command 'vrm'. Did you mean 'vram'?"),
        (["--fast"], "no such option: --fast"),
        (["run"], "missing argument 'MODEL'"),
        (["inspect", "m", "n"], "got unexpected extra argument(s) (n)"),
        (["plan", "m", "--gpu"], "option '--gpu' requires an argument"),
    ],
    ids=" ".join,
)
def test_usage_errors_say_what_was_got_and_wanted(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    line, hint = result.stderr.splitlines()
    assert result.exit_code == 2 and line == f"error: {said}" and hint.startswith("hint: "), result.stderr


def test_a_misspelled_option_is_corrected() -> None:
    for path, words in (("vram estimate", ["vram", "m"]), ("plan", ["plan", "m"]), ("run", ["run", "m"])):
        hint = run(*words, "--contxt", "3").stderr.splitlines()[1]
        assert hint.startswith("hint: did you mean ") and "--context" in hint and f"{path} -h`" in hint


def test_no_output_is_wrong_usage(tiny: Path) -> None:
    refusal(run("quantize", tiny), "no output directory", "give one with -o DIR", code=2)
    refusal(run("quantize", tiny, "--bpw", "x", "--dry-run"), "--bpw x: not a number of bits", "for instance 5.0", 2)


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "-o", "x"], ["quantize", "--dry-run"], ["eval", "--reference", "TINY"], ["run", "-p", "x"],
        ["serve"], ["convert", "x", "--format", "awq"], ["inspect"], ["vram"], ["plan", "--gpu", "24GB"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_no_checkpoint_is_said_alike(words: list[str], tiny: Path, tmp_path: Path) -> None:
    command, *rest = (str(tiny) if word == "TINY" else word for word in words)
    wanted = f"{tiny / 'config.json'}: a file, wanted a checkpoint's directory or a *.gguf file"
    refusal(run(command, tiny / "config.json", *rest), wanted, f"give the directory that holds it: {tiny}")
    no_config = f"{tmp_path}: no config.json"
    refusal(run(command, tmp_path, *rest), no_config, "give the directory of a Hugging Face checkpoint")


def test_time_left_counts_layers_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Hashing the source takes an hour, and each of 3 layers 10 s."""
    from qwenq.cli import console
    from qwenq.results import BlockResult

    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    tell = console.LayerProgress(3)
    now[0] = 3600.0
    for layer in range(3):
        now[0] += 10
        tell(BlockResult(layer, (), None, 10.0, {}))
    left = [line.rpartition("left ")[2] for line in capsys.readouterr().err.splitlines()]
    assert left == ["20.0s", "10.0s", "0.0s"]


# ---------------------------------------------------------------------- dry run


def test_parts_of_a_dry_run_add_up(tmp_path: Path) -> None:
    found = run("quantize", "Qwen2.5-72B", "--dry-run").stdout
    sizes = re.findall(r"│ (.+?) +│ +([\d.]+) GB(?: \([\d,]+ bytes\))? │", found)
    names = [name for name, _ in sizes]
    parts = sizes[: names.index("all tensors")]
    assert [name.partition(":")[0] for name, _ in parts] == [
        "qkv", "o", "gate_up", "down", "embedding, head, norms and biases",
    ]  # fmt: skip
    assert sum(float(size) for _, size in parts) == pytest.approx(float(dict(sizes)["all tensors"]), abs=0.03)
    assert "│ tensor parallel 2, 4, 8 " in found and "│ tensor parallel 4 " not in found


@pytest.mark.parametrize(("bits", "wanted"), [(4, 41_489_965_056), (8, 76_870_557_696)])
def test_dry_run_of_a_family(bits: int, wanted: int) -> None:
    result = run("quantize", "Qwen2.5-72B", "--bits", bits, "--dry-run", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert found["tensor_bytes"] == wanted
    assert set(found) == {
        "model", "parameters", "scheme", "format", "bits_per_linear_weight", "tensor_bytes", "file_bytes",
        "source_tensor_bytes", "schemes", "stage_bytes",
        "peak_ram_bytes", "peak_vram_bytes", "state_vram_bytes", "state_bytes", "spill_bytes", "disk_needed_bytes",
        "disk_free_bytes", "tensor_parallel", "device", "assumed", "warnings", "source_download_bytes", "ranks",
        "wire_layer_bytes", "wire_head_bytes", "wire_state_bytes",
    }  # fmt: skip
    assert found["source_download_bytes"] == found["source_tensor_bytes"]
    assert found["tensor_parallel"]["1"] == "" and "group size 128" in found["tensor_parallel"]["2"]


def test_dry_run_in_words(tmp_path: Path, tiny: Path) -> None:
    result = run("quantize", tiny, "--bits", 4, "--group-size", 32, "--dry-run", "-o", tmp_path / "out")
    assert result.exit_code == 0 and not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []
    assert "dry run: tiny-qwen2 to 4-bit g32 (gptq)" in result.stdout
    assert re.search(r"qkv: 4-bit g32 .* MB", result.stdout) and re.search(r"peak memory, predicted", result.stdout)


@pytest.mark.parametrize(("device", "told"), [("cuda:0", True), ("cuda:0,cuda:1", False), ("cpu", False)])
def test_dry_run_tells_of_hidden_states_on_a_single_gpu(device: str, told: bool) -> None:
    result = run("quantize", "Qwen2.5-7B", "--dry-run", "--device", device)
    assert result.exit_code == 0
    assert ("additional, for hidden states" in result.stdout) == told


def test_dry_run_answers_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['qwenq', 'quantize', 'Qwen2.5-72B', '--dry-run']\n"
        "from qwenq.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_dry_run_of_a_disk_too_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qwenq.pipeline.preflight.free_disk", lambda out: 5_000_000_000)
    monkeypatch.setattr("qwenq.pipeline.dryrun.total_memory", lambda: 64_000_000_000)  # or it warns first
    result = run("quantize", "Qwen2.5-72B", "--dry-run", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"error: .*/out: needs \d+\.\d\d GB of disk, 5\.00 GB are free\n"
        r"hint: choose an --output on another disk, or free some space\n",
        result.stderr,
    )


# ---------------------------------------------------------------------- errors in one line


@pytest.fixture
def command(tiny: Path, calib: Path, heldout: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A quantize command on the tiny model that works, with options replaced or added."""

    def make(model: object = tiny, /, **options: object) -> list[str]:
        settings: dict[str, object] = {
            "output": tmp_path / "out", "bits": 4, "group_size": 32, "calibration": calib, "eval_text": heldout,
            "sequence_length": 128, "num_samples": 8, "eval_samples": 4,
        } | options  # fmt: skip
        words = ["quantize", str(model)]
        for name, value in settings.items():
            if value is not None:
                words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
        return words

    return make


def refusal(result: Result, message: str, hint: str | None = None, code: int = 1) -> None:
    """That exit code, nothing on stdout, `error: ...` and `hint: ...` as the only lines of stderr."""
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit) and result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0] == f"error: {message}"
    assert lines[1:] == ([f"hint: {hint}"] if hint else [])


def test_options_that_mean_nothing(command: Callable[..., list[str]]) -> None:
    cases: list[tuple[list[str], str, str | None]] = [
        (command(method="awq"), "--method awq: wanted gptq or rtn", None),
        (command(bits=5), "bits is 5, wanted 4 or 8", None),
        (
            command(format="exl2"),
            "--format exl2: wanted one of gptq, awq, compressed-tensors, gguf, bnb-nf4, bnb-int8",
            None,
        ),
        (command(format="gguf"), "--format gguf: --group-size does not apply: each type has its own", None),
        (command(format="bnb-nf4"), "--format bnb-nf4 is NF4 g64: --group-size does not apply", "leave it out"),
        (command(dtype="float64"), "--dtype float64: wanted auto, float16 or bfloat16", None),
        (
            command(compute_dtype="float16"),
            "--compute-dtype float16: wanted float32, bfloat16 or auto",
            "float16 overflows in Qwen2.5's activations and is very slow on CPUs",
        ),
        (command(device="tpu"), "--device tpu: wanted auto, cpu, cuda:N or cuda:N,cuda:M", None),
    ]
    for arguments, message, hint in cases:
        refusal(run(*arguments), message, hint, 2)


def test_errors_of_quantize(command: Callable[..., list[str]], tiny: Path, tmp_path: Path, heldout: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a few words")
    cases: list[tuple[list[str], str, str | None]] = [
        (
            command(format="awq", bits=8),
            "format awq cannot hold 8-bit g32 asym",
            "AWQ is 4-bit with zero points; gptq and compressed-tensors hold this",
        ),
        (
            command(num_samples=1, pull=1),
            "--error-correction 1: one window of calibration has no two halves",
            "more text",
        ),
        (
            command(group_size=256),
            "model.layers.0.self_attn.q_proj: group size 256 does not divide its 128 input features",
            "sizes that divide it: 128, 64, 32, -1 (-1: one group per row)",
        ),
        (
            command(output=tmp_path / "there"),
            f"{tmp_path}/there: already exists",
            "choose another --output, or delete it",
        ),
        (
            command(output=tiny),  # which no hint may say to delete
            f"{tiny}: the output may not be the model's own directory or inside it",
            "choose another directory",
        ),
        (
            command(output=tiny / "out"),
            f"{tiny}/out: the output may not be the model's own directory or inside it",
            "choose another directory",
        ),
        (
            command(resume=True),
            f"{tmp_path}/out.partial: no unfinished job there to resume",
            "leave --resume out",
        ),
        (
            command(calibration=tmp_path / "empty.txt"),
            f"{tmp_path}/empty.txt: no text in it",
            "is it the right file?",
        ),
        (
            command(sequence_length=1024),
            f"{tiny.parent}/calib.txt: windows of 1024 tokens, the model reads 512",
            "--sequence-length 512 or less",
        ),
    ]
    for arguments, message, hint in cases:
        refusal(run(*arguments), message, hint)
    short = run(*command(eval_text=tmp_path / "short.txt"))
    assert short.exit_code == 1
    assert re.fullmatch(
        r"error: .*/short\.txt: \d+ tokens, shorter than one window of 128\n"
        r"hint: --sequence-length \d+ or less, or more text\n",
        short.stderr,
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_errors_of_sources(
    command: Callable[..., list[str]], random_model: Callable[..., Path], edit_json: Callable[..., Any]
) -> None:
    path = random_model()
    config = json.loads((path / "config.json").read_text())
    edit_json(path / "config.json", quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32})
    refusal(
        run(*command(path)),
        f"{path}: config.json says quantized (awq), but every linear is stored in 16 bits",
        "the setting was left over when the weights were merged or dequantized: remove quantization_config from "
        "config.json, no loader reads the model with it",
    )
    edit_json(path / "config.json", quantization_config=None, model_type="qwen2_moe")
    refusal(
        run(*command(path)),
        f"{path}/config.json: model_type 'qwen2_moe' is not supported (wanted one of qwen2, qwen3, llama, mistral)",
        "mixture-of-experts and vision models are not supported",
    )
    (path / "config.json").write_text(json.dumps(config))
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.rename(path / "elsewhere")
    refusal(
        run(*command(path)),
        f"model.safetensors.index.json names {shard.name}, which is not there",
        "finish the download, then try again",
    )
    for file in path.glob("model*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    result = run(*command(path))
    assert result.exit_code == 1 and "only pickled weights (pytorch_model.bin), which can run code" in result.stderr


def test_errors_of_eval(tiny: Path, random_model: Callable[..., Path]) -> None:
    other = random_model()
    refusal(
        run("eval", tiny, "--reference", other),
        f"{tiny} and {other} differ in hidden_size: 128 and 64",
        "the reference is the 16-bit checkpoint that the other was made from",
    )
    for wrong in ("much", "nan"):
        result = run("eval", tiny, "--reference", tiny, "--max-ppl-increase", wrong)
        refusal(result, f"--max-ppl-increase {wrong}: not a percentage", "e.g. 2%", code=2)
    assert run("eval", tiny, "--reference", tiny, "--max-kl", "nan").exit_code == 2


# ---------------------------------------------------------------------- the work itself


def test_quantize_in_words(command: Callable[..., list[str]], tmp_path: Path) -> None:
    result = run(*command(compute_dtype="float32"))
    assert result.exit_code == 0, result.output
    assert "drift on heldout.txt (4 x 128 tokens, float32)" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(
        rf"{tmp_path}/out: 4-bit g32, 1\.0 MB \(4\.62 bits per linear weight\), [\d.]+s, peak [\d.]+ [MG]B of memory",
        last,
    )
    layers = [line for line in result.stderr.splitlines() if line.startswith("layer ")]
    pattern = r"layer %d/4  worst -[\d.]+ dB \(\w+_proj\), hidden states -[\d.]+ dB  [\d.]+s  left [\dhms.]+"
    assert len(layers) == 4
    assert all(re.fullmatch(pattern % (k + 1), line) for k, line in enumerate(layers))


def test_quantize_and_eval_in_json(
    command: Callable[..., list[str]], tiny: Path, heldout: Path, tmp_path: Path
) -> None:
    result = run(*command(json=True))
    assert result.exit_code == 0 and result.stderr == ""
    made = json.loads(result.stdout)
    assert set(made) == {
        "out", "drift", "layers", "tensor_bytes", "file_bytes", "bits_per_linear_weight", "seconds", "peak_rss_bytes",
        "warnings", "head",
    }  # fmt: skip
    assert made["out"] == str(tmp_path / "out") and len(made["layers"]) == 4 and made["head"] is None
    measure = ["eval", tmp_path / "out", "--reference", tiny, "--text", heldout, "--sequence-length", 128, "-n", 4]
    result = run(*measure, "--json", "--max-kl", "0.1", "--max-ppl-increase", "50%")
    assert result.exit_code == 0 and result.stderr == ""
    drift = json.loads(result.stdout)
    assert drift == made["drift"]
    assert set(drift) == {
        "reference_perplexity", "reference_perplexity_se", "perplexity", "perplexity_se",
        "perplexity_increase_percent", "kl", "kl_median", "kl_p99", "top1_agreement", "noise_floor_kl", "non_finite",
        "tokens", "windows", "window_tokens", "text", "text_sha256", "compute_dtype", "metrics_version",
    }  # fmt: skip
    # an honest no: the figures are printed all the same, the reason goes to stderr, the exit code is 3
    result = run(*measure, "--json", "--max-kl", "1e-6")
    assert result.exit_code == 3 and json.loads(result.stdout) == drift
    assert result.stderr == f"error: mean KL is {drift['kl']['mean']:.4f}, the limit 1e-06\n"
    result = run(*measure, "--max-ppl-increase", "-60")
    assert result.exit_code == 3 and "mean KL (nats/token)" in result.stdout
    assert "perplexity, 16-bit" in result.stdout
    backwards = run("eval", tiny, "--reference", tmp_path / "out", *measure[4:])
    assert "perplexity, reference in 4-bit g32" in backwards.stdout and "16-bit" not in backwards.stdout
    assert re.fullmatch(r"error: perplexity rose by -?[\d.]+ %, the limit is -60 %\n", result.stderr)
    refusal(
        run(*command(tmp_path / "out", output=tmp_path / "again")),
        f"{tmp_path}/out: already quantized (gptq)",
        "quantize from the original 16-bit checkpoint",
    )


def test_warnings_stay_one_line_and_keep_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenq.cli import console

    app = typer.Typer()
    line = "a [red]name[/red] and [128, 64] " + "long " * 60 + "end"

    @app.command()
    def say() -> None:
        console.warn(line)

    assert CliRunner(env={"COLUMNS": "120", "TERM": "dumb"}).invoke(app, []).stderr == f"warning: {line}\n"


def test_ctrl_c_prints_the_command_that_goes_on(command: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = command(sequence_length=32, output=tmp_path / "my out")
    start = [sys.executable, "-m", "qwenq"]
    job = subprocess.Popen(
        [*start, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a background shell
    )  # fmt: skip
    assert job.stderr is not None
    for line in job.stderr:
        if line.startswith("layer 1/4"):
            break
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130 and out == "" and "Traceback" not in err
    said = err.splitlines()
    assert f"stopped; {tmp_path / 'my out'}.partial keeps what is done. Continue with:" in said
    printed = shlex.split(said[-1])
    assert printed == ["qwenq", *arguments, "--resume"]
    assert not (tmp_path / "my out").exists()
    resumed = run(*printed[1:])
    assert resumed.exit_code == 0 and (tmp_path / "my out" / "config.json").exists()
    assert "layer 1/4  worst" not in resumed.stderr and "layer 4/4  worst" in resumed.stderr


def test_a_reader_that_has_enough_ends_a_command_quietly() -> None:
    """A table longer than the 64 KiB a pipe holds: the command cannot end before its reader has gone."""
    contexts = ",".join(map(str, range(1, 65)))
    words = [sys.executable, "-m", "qwenq", "vram", "Qwen2.5-72B", "--gpu", "4x RTX 3090", "-c", contexts, "--csv"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1  # click's, of a broken pipe


@pytest.mark.parametrize("lost", ["full", "closed", "hung up"])
def test_messages_that_go_nowhere_end_no_command(lost: str, tmp_path: Path) -> None:
    """A log on a full disk, no stderr at all, a terminal that is gone: the answer is on stdout all the same."""
    asked = ["vram", "Qwen2.5-7B", "--gpu", "M3 Max 128GB", "-c", "1k", "--json"]
    words, said = [sys.executable, "-m", "qwenq", *asked], run(*asked)
    assert said.exit_code == 0 and said.stderr.startswith("warning: qwenq does not run on Apple")
    terminal, end = pty.openpty()
    os.close(terminal)  # what is written to its other end fails with EIO
    before = {"closed": lambda: os.close(2), "hung up": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with open("/dev/full", "w") as full:
        stderr = end if lost == "hung up" else full
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=stderr, text=True, preexec_fn=before.get(lost))
    os.close(end)
    assert done.returncode == 0 and done.stdout == said.stdout


@pytest.mark.parametrize("call", ["the command", "Python"])
def test_what_can_be_seen_before_a_download_is(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object) -> Path:
        raise AssertionError("downloaded first")

    monkeypatch.setattr(qwenq.cli.options, "model_directory", download)
    monkeypatch.setattr(qwenq.api, "model_directory", download)
    there, stopped, new = tmp_path / "there", tmp_path / "stopped", tmp_path / "new"
    there.mkdir()
    (tmp_path / "stopped.partial").mkdir()
    for kind, options, said in (
        ("quantize", {"out": there}, f"{there}: already exists"),
        ("quantize", {"out": stopped}, f"{stopped}.partial: an unfinished job is there"),
        ("quantize", {"out": new, "resume": True}, f"{new}.partial: no unfinished job there to resume"),
        ("quantize", {"out": new, "calibration": "none.jsonl"}, "none.jsonl: no such file, nor a set of that name"),
        ("quantize", {"out": new, "eval_text": "none.npy"}, "none.npy: no such file, nor a set of that name"),
        ("sensitivity", {"output": there}, f"{there}: already exists"),
        ("sensitivity", {"output": new, "calibration": "none"}, "none: no such file, nor a set of that name"),
    ):
        if call == "Python":
            with pytest.raises(QwenqError) as caught:
                getattr(qwenq.api, kind)("org/model", **options)
            assert caught.value.message == said
            continue
        words = {"out": "-o", "output": "-o", "calibration": "--calibration", "eval_text": "--eval-text"}
        flags = [word for name, value in options.items() if name in words for word in (words[name], value)]
        result = run(kind, "org/model", *flags, *(["--resume"] if "resume" in options else []))
        assert result.exit_code == 1 and result.stderr.startswith(f"error: {said}\n"), result.stderr
