"""`qwenq run` from the outside: what it prints, its errors in one line, and its options."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from qwenq.text.tokens import ModelTokenizer
from tests.conftest import answer, run

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def refusal(result: Result, message: str, hint: str | None = None, code: int = 1) -> None:
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    wanted = [f"error: {message}", f"hint: {hint}"] if hint else [f"error: {message}"]
    assert result.stderr.splitlines()[-len(wanted) :] == wanted


def test_one_question(tiny: Path) -> None:
    import transformers

    exact = ("--temperature", 0, "--compute-dtype", "float32")
    result = run("run", tiny, "--raw", "-p", "The sea", "-n", 8, *exact, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    ids = torch.tensor(ModelTokenizer(tiny).encode(["The sea"]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    wanted = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert found["token_ids"] == wanted[: len(found["token_ids"])] and len(found["token_ids"]) > 0
    assert found["timing"]["prompt_tokens"] == ids.shape[1]
    assert found["plan"]["device_map"]["lm_head"] == "cpu" and found["compute_dtype"] == "float32"
    (peak,) = found["peaks"]
    assert peak["device"] == "CPU" and peak["allocated_bytes"] >= 0 and peak["predicted_bytes"] > 0


def test_how_tokens_are_drawn(tiny: Path) -> None:
    """A penalty as transformers has it; the likeliest token alone, however hot."""
    import transformers

    def ids(*words: object) -> list[int]:
        asked = ("--raw", "-p", "The sea", "-n", 32, "--compute-dtype", "float32")
        return list(answer("run", tiny, *asked, *words)["token_ids"])

    prompt = torch.tensor(ModelTokenizer(tiny).encode(["The sea"]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    options = {"max_new_tokens": 32, "do_sample": False, "repetition_penalty": 3.0, "pad_token_id": 0}
    wanted = theirs.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    penalized, likeliest = ids("--temperature", 0, "--repetition-penalty", 3), ids("--temperature", 0)
    assert penalized == wanted[: len(penalized)] != likeliest
    hot = ("--temperature", 100)
    assert ids(*hot, "--top-k", 1) == likeliest != ids(*hot, "--top-k", -1) == ids(*hot, "--top-k", 0)
    refusal(run("run", tiny, "-p", "x", "--repetition-penalty", 0), "repetition_penalty is 0.0, wanted 0.01 to 100",
            code=2)  # fmt: skip


def test_text_and_figures_go_to_different_places(tiny: Path) -> None:
    result = run("run", tiny, "-p", "The sea", "-n", 4, "--temperature", 0)
    assert result.exit_code == 0 and result.stdout.endswith("\n") and "tokens/s" not in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0].startswith("loaded in ") and "16-bit linears; bfloat16 activations; context 512" in lines[0]
    assert "tokens/s; answer 4 tokens" in lines[-2] and lines[-1].startswith("CPU: peak ")


def test_without_a_template_the_text_is_continued(
    random_model: Callable[..., Path], edit_json: Callable[..., Any]
) -> None:
    model = random_model(max_position_embeddings=512)
    edit_json(model / "tokenizer_config.json", chat_template=None)
    plain = run("run", model, "-p", "The sea", "-n", 5, "--temperature", 0, "--json")
    assert plain.exit_code == 0 and "the checkpoint has no chat template" in plain.stderr
    templated = run("run", model, "-p", "The sea", "--system", "Be brief")
    refusal(templated, "--system needs a chat template, and the checkpoint has none", "leave it out", 2)
    assert json.loads(plain.stdout)["timing"]["prompt_tokens"] == len(ModelTokenizer(model).encode(["The sea"])[0])


def test_a_chat_remembers(tiny: Path, random_model: Callable[..., Path], edit_json: Callable[..., Any]) -> None:
    model = random_model(max_position_embeddings=512)
    edit_json(model / "tokenizer_config.json", chat_template=TEMPLATE)
    turns = "Hello\n\nAnd now?\n/exit\nnever\n"
    result = run("run", model, "-n", 5, "--temperature", 0, "--system", "Be brief", stdin=turns)
    assert result.exit_code == 0, result.stderr
    figures = [line for line in result.stderr.splitlines() if line.startswith("prompt ")]
    first, second = (int(line.split()[1]) for line in figures)
    ids = ModelTokenizer(model).encode(["[system] Be brief\n[user] Hello\n[a]"])[0]
    assert first == len(ids) and second > first  # the answer and the second question came on top


def test_a_full_context_does_not_end_a_chat(random_model: Callable[..., Path], edit_json: Callable[..., Any]) -> None:
    model = random_model(max_position_embeddings=512)
    edit_json(model / "tokenizer_config.json", chat_template=TEMPLATE)
    words = "sea " * 100
    result = run("run", model, "-c", 64, "-n", 5, "--temperature", 0, stdin=f"Hello\n{words}\nAgain\n/clear\nHello\n")
    assert result.exit_code == 0, result.stderr
    assert "in a context of 64" in result.stderr and "/clear forgets the chat" in result.stderr
    prompts = [int(line.split()[1]) for line in result.stderr.splitlines() if line.startswith("prompt ")]
    assert len(prompts) == 3, "the long turn got no answer, those around it did"
    assert prompts[1] > prompts[0] == prompts[2], "a dialogue grows, and is forgotten when asked"


def test_a_line_that_is_no_text_does_not_end_a_chat(
    random_model: Callable[..., Path], edit_json: Callable[..., Any]
) -> None:
    model = random_model(max_position_embeddings=512)
    edit_json(model / "tokenizer_config.json", chat_template=TEMPLATE)
    result = run("run", model, "-n", 2, "--temperature", 0, stdin=b"Hello\nna\xefve\nna\xc3\xafve\n")
    assert result.exit_code == 0, result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("prompt ")]) == 2
    assert result.stderr.count("error: the line is not UTF-8 text\n") == 1


def test_a_chat_without_stdin_is_refused_before_loading() -> None:
    words = [sys.executable, "-m", "qwenq", "run", "no-such-model"]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=lambda: os.close(0))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: a chat reads stdin, which is closed\nhint: ask one question with --prompt\n"


WRONG = [
    (["--engine", "exllama"], "unknown engine 'exllama'", "one of qwenq, gptqmodel, vllm, llama.cpp"),
    (["--kv-cache-dtype", "q8_0"], "--kv-cache-dtype q8_0: wanted auto, bf16, fp16, fp8", None),
    (
        ["--compute-dtype", "float16"],
        "--compute-dtype float16: wanted bfloat16, float32 or auto",
        "float16 overflows in Qwen2.5's activations",
    ),
    (["--temperature", "-1"], "temperature is -1.0, wanted 0 or more", None),
    (["--temperature", "nan"], "temperature is nan, wanted 0 or more", None),
    (["--seed", str(1 << 80)], f"seed is {1 << 80}, wanted a whole number of 64 bits", None),
    (["-c", "0"], "not a context length: '0'", "write tokens, for instance 8192 or 32k"),
    (["--gpu-memory", "much"], "not a size: 'much'", "write for instance 47GB, 44GiB or 500MB"),
    (["--system", "Be brief"], "--system needs a chat template, and --raw does not use one", "leave one of them out"),
    (["-p", ""], "--prompt: the prompt is empty", "write one, or leave --prompt out for a chat"),
    (["-c", "64", "-n", "64"], "--max-new-tokens 64 leaves no room for a prompt in --context 64", "at most 63"),
]


@pytest.mark.parametrize(
    ("options", "message", "hint"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_wrong_options_exit_with_2_and_read_nothing(options: list[str], message: str, hint: str | None) -> None:
    refusal(run("run", "owner/never-fetched", "--raw", "-p", "The sea", *options), message, hint, 2)


def test_what_another_engine_is_not_asked_for_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwenq.runtime.foreign.GptqModelEngine.check_installed", lambda: None)
    words = "run", "owner/never-fetched", "--engine", "gptqmodel"
    hint = "give it with --prompt, or use `qwenq serve`"
    refusal(run(*words), "--engine gptqmodel needs a prompt", hint, 2)
    told = run(*words, "-p", "x", "--kv-cache-dtype", "fp8")
    refusal(told, "`run` does not pass --kv-cache-dtype to gptqmodel", "`qwenq serve` passes it to vLLM", 2)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--engine", "vllm"], "--engine vllm: not installed", "pip install 'qwenq[vllm]', or leave it out"),
        (["--gpu-memory", "8GiB"], "--gpu-memory is given, but torch sees no GPU", "leave it out to run on the CPU"),
        (["--offload-dir", "nowhere"], "--offload-dir nowhere: no such directory", None),
        (["-c", "1k"], "context is 1024 tokens, tiny-qwen2 allows 512", "ask for at most 512"),
        (
            ["-n", "600"],
            "prompt of 4 tokens and 600 new ones: 604 in a context of 512, 92 too many",
            "--max-new-tokens 508",
        ),
        (["--cpu-memory", "1MB"], None, "a shorter --context, or a smaller --prefill-chunk"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(
    options: list[str], message: str | None, hint: str | None, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if message is not None and "--gpu-memory" not in options:
        monkeypatch.setattr("qwenq.runtime.load.build_model", None)  # said before a weight is read
    if torch.cuda.is_available() and "--gpu-memory" in options:
        pytest.skip("this machine has a GPU")
    result = run("run", tiny, "--raw", "-p", "The sea", *options)
    if message is not None:
        refusal(result, message, hint)
        return
    assert result.exit_code == 1 and result.stdout == "" and f"hint: {hint}" in result.stderr
    assert "error: CPU: needs " in result.stderr and " short\n" in result.stderr


def test_broken_checkpoints_are_named(tiny: Path, random_model: Callable[..., Path]) -> None:
    refusal(run("run", tiny, "--json"), "--json needs a prompt", "give it with --prompt", 2)
    path = random_model()
    shard = sorted(path.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.unlink()
    missing = run("run", path, "-p", "x")
    assert missing.exit_code == 1 and f"names {shard.name}, which is not there" in missing.stderr
    shard.write_bytes(b"\xff" * 16 + data[16:])
    corrupt = run("run", path, "-p", "x")
    assert corrupt.exit_code == 1 and shard.name in corrupt.stderr and "Traceback" not in corrupt.stderr


def test_a_bad_generation_config_is_the_files_fault(
    random_model: Callable[..., Path], edit_json: Callable[..., Any]
) -> None:
    model = random_model(max_position_embeddings=512)
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": -2.0}')
    result = run("run", model, "--raw", "-p", "The sea")
    refusal(result, f"{model}/generation_config.json: temperature is -2.0, wanted 0 or more", "fix it")


def test_what_is_no_checkpoint_gets_a_hint_of_its_own() -> None:
    said = "neither a directory nor a hub name (owner/name)"
    hint = "give the directory that holds config.json, or for instance Qwen/Qwen2.5-7B-Instruct"
    refusal(run("run", "nope", "-p", "x"), f"nope: {said}", hint)
    family = "Qwen2.5-72B is a family, for sizes and plans; a checkpoint is Qwen/Qwen2.5-72B or a directory"
    refusal(run("run", "Qwen2.5-72B", "--dry-run"), f"Qwen2.5-72B: {said}", family)


@pytest.mark.parametrize(("peak", "percent"), [(1 << 26, False), (1 << 30, True)])
def test_small_differences_have_no_percentage(
    peak: int, percent: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenq.runtime import peaks as memory

    monkeypatch.setattr(memory, "read_peaks", lambda devices, base: [memory.Peak("CPU", peak)])
    last = run("run", tiny, "--raw", "-p", "The sea", "-n", 1).stderr.splitlines()[-1]
    assert last.startswith(f"CPU: peak {'67.1 MB' if peak == 1 << 26 else '1.07 GB'}, predicted 4.4 MB")
    assert last.endswith("(-99.6 %)") == percent


# ---------------------------------------------------------------------- dry runs


def test_a_dry_run_is_what_a_load_would_do(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = answer("run", tiny, "--raw", "-p", "The sea", "-n", 1)
    monkeypatch.setattr("qwenq.runtime.load.build_model", None)
    found = answer("run", tiny, "--dry-run")
    assert found["plan"] == loaded["plan"] and found["context"] == 512 and found["weights"]["bytes"] == 2_101_504
    (cpu,) = found["devices"]
    assert cpu["device"] == "CPU" and cpu["layers"] == 4 and cpu["limit_bytes"] > cpu["predicted_bytes"]
    assert cpu["predicted_bytes"] == loaded["plan"]["predicted_bytes"]["CPU"]
    assert found["speed"]["decode_tokens_per_s"] is None and "not predicted for CPUs" in found["speed"]["basis"]
    lines = run("run", tiny, "--dry-run", "-c", 128).stdout.splitlines()
    assert "context 128" in lines[0] and "nothing is loaded" in lines[0] and lines[1].startswith("CPU: 4 layers, ")
    assert lines[2].startswith("placement: ") and lines[3].startswith("speed: not predicted for CPUs")


def test_a_dry_run_by_hub_name_says_what_it_rests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenq.planning.rig import parse_rig
    from qwenq.runtime import forecast, load

    monkeypatch.setattr(load, "visible_rig", lambda limits: parse_rig("2x RTX 3090"))
    monkeypatch.setattr(load, "available_ram", lambda: 64 << 30)
    name = "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4"
    result = run("run", name, "--dry-run", "--json")
    assert result.exit_code == 0
    assert result.stderr == f"warning: {name}: using the shapes shipped with qwenq; no header was read\n"
    found = json.loads(result.stdout)
    assert [held["device"] for held in found["devices"]] == ["GPU 0 RTX 3090", "GPU 1 RTX 3090"]
    assert sum(held["layers"] for held in found["devices"]) == 80
    slow, fast = found["speed"]["decode_tokens_per_s"]
    assert 1 < slow < fast < 60
    said = run("run", name, "--dry-run").stdout.splitlines()[-1]
    assert re.match(r"speed: decode .* tokens/s.*, prefill .* tokens/s.* \(this engine's 72B", said)
    assert not re.search(r"\de[+-]\d", said)  # 1,010, not 1.01e+03
    whole = run("run", "Qwen/Qwen2.5-32B-Instruct", "--dry-run", "--json")  # a hub name of 16 bits: 4 would fit
    places = json.loads(whole.stdout)["devices"]
    assert [held["device"] for held in places][2:] == ["CPU"] and places[2]["layers"] > 10
    assert places[2]["predicted_bytes"] == pytest.approx(places[2]["layers"] * 975e6, rel=0.01)
    monkeypatch.setattr(forecast, "check_disk", lambda directory, need: None)
    monkeypatch.setattr(load, "available_ram", lambda: 8 << 30)
    spilled = run("run", "Qwen/Qwen2.5-32B-Instruct", "--dry-run")
    assert "disk: " in spilled.stdout and "speed: not predicted: layers are read from disk" in spilled.stdout


def test_a_dry_run_where_the_system_does_not_tell_its_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenq import machine

    monkeypatch.setattr(machine, "_kibibytes", lambda path, name: 0)
    assert re.fullmatch(r"CPU: 4 layers, [\d.]+ MB", run("run", tiny, "--dry-run", "-c", 128).stdout.splitlines()[1])


def test_a_dry_run_of_what_does_not_fit_exits_with_3(tiny: Path) -> None:
    result = run("run", tiny, "--dry-run", "--cpu-memory", "1MB")
    assert result.exit_code == 3 and result.stdout == "" and "error: CPU: needs " in result.stderr
    for engine in ("gptqmodel", "vllm", "llama.cpp"):
        for option in ("--prefill-chunk=64", "--compute-dtype=float32", "--gpu-memory=8GiB", "--cpu-memory=8GiB"):
            ignored = run("run", "owner/never-fetched", "-p", "x", "--engine", engine, option)
            name = option.partition("=")[0]
            refusal(ignored, f"{name} is for qwenq's own engine, not {engine}", "--engine qwenq, or leave it out", 2)
    foreign = run("run", tiny, "--dry-run", "--engine", "gptqmodel")
    assert foreign.exit_code == 2 and "--dry-run is for qwenq's own engine, not gptqmodel" in foreign.stderr
