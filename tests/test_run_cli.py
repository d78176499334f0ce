"""`qwenq run` from the outside: what it prints, its errors in one line, and its options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from qwenq.cli.main import app
from qwenq.tokens import ModelTokenizer

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "dumb"}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner(env=ENVIRONMENT).invoke(app, ["run", *map(str, arguments)], input=stdin)


def refusal(result: Result, message: str, hint: str | None = None) -> None:
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout == ""
    wanted = [f"error: {message}", f"hint: {hint}"] if hint else [f"error: {message}"]
    assert result.stderr.splitlines()[-len(wanted) :] == wanted


def test_the_options_are_frozen() -> None:
    parameters = typer.main.get_command(app).commands["run"].params
    assert {o for p in parameters if p.param_type_name == "option" for o in p.opts} == {
        "--prompt", "-p", "--system", "--raw", "--max-new-tokens", "-n", "--temperature", "--top-p", "--seed",
        "--max-model-len", "-c", "--prefill-chunk", "--gpu-memory", "--cpu-memory", "--offload-dir",
        "--kv-cache-dtype", "--compute-dtype", "--engine", "--json",
    }  # fmt: skip


def test_one_question(tiny: Path) -> None:
    import transformers

    result = run(tiny, "--raw", "-p", "The sea", "-n", 8, "--temperature", 0, "--compute-dtype", "float32", "--json")
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


def test_text_and_figures_go_to_different_places(tiny: Path) -> None:
    result = run(tiny, "-p", "The sea", "-n", 4, "--temperature", 0)
    assert result.exit_code == 0 and result.stdout.endswith("\n") and "tokens/s" not in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0].startswith("loaded in ") and "16-bit linears; bfloat16 activations; context 512" in lines[0]
    assert "tokens/s; answer 4 tokens" in lines[-2] and lines[-1].startswith("CPU: peak ")


def test_without_a_template_the_text_is_continued(
    random_model: Callable[..., Path], edit_json: Callable[..., Any]
) -> None:
    model = random_model(max_position_embeddings=512)
    edit_json(model / "tokenizer_config.json", chat_template=None)
    plain = run(model, "-p", "The sea", "-n", 5, "--temperature", 0, "--json")
    assert plain.exit_code == 0 and "the checkpoint has no chat template" in plain.stderr
    assert json.loads(plain.stdout)["timing"]["prompt_tokens"] == len(ModelTokenizer(model).encode(["The sea"])[0])


def test_a_chat_remembers(tiny: Path, random_model: Callable[..., Path], edit_json: Callable[..., Any]) -> None:
    model = random_model(max_position_embeddings=512)
    edit_json(model / "tokenizer_config.json", chat_template=TEMPLATE)
    result = run(model, "-n", 5, "--temperature", 0, "--system", "Be brief", stdin="Hello\n\nAnd now?\n/exit\nnever\n")
    assert result.exit_code == 0, result.stderr
    figures = [line for line in result.stderr.splitlines() if line.startswith("prompt ")]
    first, second = (int(line.split()[1]) for line in figures)
    ids = ModelTokenizer(model).encode(["[system] Be brief\n[user] Hello\n[a]"])[0]
    assert first == len(ids) and second > first  # the answer and the second question came on top


def test_a_full_context_does_not_end_a_chat(random_model: Callable[..., Path], edit_json: Callable[..., Any]) -> None:
    model = random_model(max_position_embeddings=512)
    edit_json(model / "tokenizer_config.json", chat_template=TEMPLATE)
    words = "sea " * 100
    result = run(model, "-c", 64, "-n", 5, "--temperature", 0, stdin=f"Hello\n{words}\nAgain\n/clear\nHello\n")
    assert result.exit_code == 0, result.stderr
    assert "in a context of 64" in result.stderr and "/clear forgets the dialogue" in result.stderr
    prompts = [int(line.split()[1]) for line in result.stderr.splitlines() if line.startswith("prompt ")]
    assert len(prompts) == 3, "the long turn got no answer, those around it did"
    assert prompts[1] > prompts[0] == prompts[2], "a dialogue grows, and is forgotten when asked"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--engine", "exllama"], "unknown engine 'exllama'", "one of qwenq, gptqmodel, vllm"),
        (["--engine", "vllm"], "--engine vllm: it is not installed", "pip install 'qwenq[vllm]', or leave it out"),
        (["--kv-cache-dtype", "q8_0"], "--kv-cache-dtype q8_0: wanted auto, bf16, fp16, fp8", None),
        (
            ["--compute-dtype", "float16"],
            "--compute-dtype float16: wanted bfloat16, float32 or auto",
            "float16 overflows in Qwen2.5's activations",
        ),
        (["--gpu-memory", "8GiB"], "--gpu-memory is given, but torch sees no GPU", "leave it out to run on the CPU"),
        (["--offload-dir", "nowhere"], "--offload-dir nowhere: no such directory", None),
        (["-c", "1k"], "context is 1024 tokens, tiny-qwen2 allows 512", "ask for at most 512"),
        (["--temperature", "-1"], "temperature is -1.0, wanted 0 or more", None),
        (
            ["-n", "600"],
            "prompt of 4 tokens and 600 new ones: 604 in a context of 512, 92 too many",
            "--max-new-tokens 508",
        ),
        (["-p", ""], "the prompt is empty", "give it at least one token"),
        (["--cpu-memory", "1MB"], None, "a shorter --max-model-len, or a smaller --prefill-chunk"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(options: list[str], message: str | None, hint: str | None, tiny: Path) -> None:
    if torch.cuda.is_available() and "--gpu-memory" in options:
        pytest.skip("this machine has a GPU")
    result = run(tiny, "--raw", "-p", "The sea", *options)
    if message is not None:
        refusal(result, message, hint)
        return
    assert result.exit_code == 1 and result.stdout == "" and f"hint: {hint}" in result.stderr
    assert "error: CPU: needs " in result.stderr and " short\n" in result.stderr


def test_broken_checkpoints_are_named(tiny: Path, random_model: Callable[..., Path]) -> None:
    refusal(run(tiny, "--json"), "--json answers one question", "give it with --prompt")
    path = random_model()
    shard = sorted(path.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.unlink()
    missing = run(path, "-p", "x")
    assert missing.exit_code == 1 and f"names {shard.name}, which is not there" in missing.stderr
    shard.write_bytes(b"\xff" * 16 + data[16:])
    corrupt = run(path, "-p", "x")
    assert corrupt.exit_code == 1 and shard.name in corrupt.stderr and "Traceback" not in corrupt.stderr
