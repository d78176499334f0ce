"""llama.cpp behind `run` and `serve`: its flags, and a stand-in for its server that notes what it was told."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import settled, text_windows

import qwenq.runtime.llamacpp
from qwenq.checkpoint.reader import open_source
from qwenq.errors import PlanError
from qwenq.formats.base import get_format
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.quantize import quantize
from qwenq.runtime.chat import Chat
from tests.conftest import answer, run

# Answers as llama-server does: 503 while it loads, then tokens; its arguments and the request go into files.
STAND_IN = """#!{python}
import http.server, json, os, sys
if os.environ.get("FAIL"):
    print("error: failed to load model", file=sys.stderr); sys.exit(1)
open({told!r} + ".argv", "w").write(json.dumps([sys.argv[1:], os.environ.get("LLAMA_API_KEY")]))
asked = []
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, code, body):
        self.send_response(code); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        asked.append(1)
        self.answer(503 if len(asked) < 3 else 200, {{}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        open({told!r} + ".body", "w").write(json.dumps(body))
        if os.environ.get("REFUSE"):
            return self.answer(400, {{"error": {{"message": "the request exceeds the context"}}}})
        self.answer(200, {{"tokens": json.loads(os.environ.get("TOKENS", "[5, 6, 7]")), "stop_type": "limit",
                           "timings": {{"prompt_ms": 500.0, "predicted_ms": 250.0}}}})
    def log_message(self, *args): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def gguf_file(tiny: Path, calib: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = open_source(tiny), tmp_path_factory.mktemp("gguf") / "out"
    windows = text_windows(calib, tiny, 64, 2)
    config = settled(format="gguf", gguf_type="Q8_0")
    recipe = get_format("gguf").mixture("Q8_0", source.spec)
    quantize(QuantizeJob(source, out, recipe, config, windows, text_windows(heldout, tiny, 64, 2)))
    (found,) = out.glob("*.gguf")
    return found


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """read(what): the `argv` or `body` that the server was told."""
    told, program = tmp_path / "told", tmp_path / "server"
    program.write_text(STAND_IN.format(python=sys.executable, told=str(told)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("QWENQ_LLAMA_SERVER", str(program))
    monkeypatch.setattr(qwenq.runtime.llamacpp, "detect_rig", no_rig)
    return lambda what: json.loads(told.with_suffix("." + what).read_text())


def no_rig() -> None:
    raise PlanError("no NVIDIA driver responds")


def test_one_answer(gguf_file: Path, stand_in: Callable[[str], Any]) -> None:
    found = run("run", gguf_file, "--engine", "llama.cpp", "-p", "once", "--raw", "-n", 3, "-c", 64,
                   "--kv-cache-dtype", "q8_0", "--temperature", 0, "--top-k", 7, "--repetition-penalty", 1.5,
                   "--json")  # fmt: skip
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["token_ids"] == [5, 6, 7] and told["engine"] == "llama.cpp"
    timing = told["timing"]
    assert (timing["prefill_seconds"], timing["decode_seconds"], timing["stopped"]) == (0.5, 0.25, "length")
    words, _ = stand_in("argv")
    assert words[:10] == ["-m", str(gguf_file), "-ngl", "0", "-c", "64", "-fa", "on", "--fit", "off"]
    assert words[10:14] == ["-ctk", "q8_0", "-ctv", "q8_0"] and words[-3] == "127.0.0.1"
    body = stand_in("body")
    assert body["n_predict"] == 3 and body["temperature"] == 0 and body["return_tokens"]
    assert (body["top_k"], body["repeat_penalty"], body["repeat_last_n"]) == (7, 1.5, -1)
    assert all(type(token) is int for token in body["prompt"])


def test_an_end_token_that_the_server_does_not_know(
    gguf_file: Path, stand_in: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on to the limit; the answer ends where the model ended it, at the speed that the server had."""
    end = min(Chat(gguf_file, 1024).stop_ids)
    monkeypatch.setenv("TOKENS", json.dumps([5, 6, end, 7, 8]))
    answered = answer("run", gguf_file, "--engine", "llama.cpp", "-p", "once", "--raw", "-n", 5, "-c", 64)
    assert answered["token_ids"] == [5, 6]
    timing = answered["timing"]
    assert (timing["new_tokens"], timing["decode_seconds"], timing["stopped"]) == (3, 0.15, "stop")


def test_servers_that_fail_end_in_one_line(
    gguf_file: Path, stand_in: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", gguf_file, "--engine", "llama.cpp", "-p", "once", "--raw", "-c", 64)
    with monkeypatch.context() as patched:
        patched.setenv("REFUSE", "1")
        found = run(*words)
        line = "error: llama-server refused the prompt (the request exceeds the context)"
        note = "warning: llama.cpp gets no GPU layers: no NVIDIA driver responds"
        assert found.exit_code == 1 and found.stderr.splitlines() == [note, line]
    with monkeypatch.context() as patched:
        patched.setenv("FAIL", "1")
        found = run(*words)
        line = "error: llama-server ended with 1 before it answered (error: failed to load model)"
        assert found.exit_code == 1 and found.stderr.splitlines()[0] == line
    for named, wanted in (
        ("", "error: --engine llama.cpp: no llama-server on PATH"),
        ("/no/server", "error: --engine llama.cpp: QWENQ_LLAMA_SERVER names /no/server, which is not a program"),
    ):
        monkeypatch.setenv("QWENQ_LLAMA_SERVER", named)
        monkeypatch.setenv("PATH", "/nowhere")
        for command in (words, ("serve", gguf_file, "--engine", "llama.cpp")):
            found = run(*command)
            assert found.exit_code == 1 and found.stderr.splitlines()[0] == wanted


def test_what_it_would_be_told(gguf_file: Path, stand_in: Callable[[str], Any], tiny: Path) -> None:
    def said(*options: object) -> list[str]:
        found = run("serve", gguf_file, "--dry-run", *options)
        assert found.exit_code == 0, found.output
        return list(found.stdout.splitlines())

    command, _, heading, *modelfile = said("--engine", "llama.cpp", "--gpu", "2x RTX 3060 12GB", "-c", 256, "--port", 9)
    layers = open_source(tiny).spec.num_hidden_layers
    assert command.startswith(f"llama-server -m {gguf_file} -ngl {layers + 1} -c 256 -fa on --fit off -sm layer -ts ")
    assert command.endswith(f" --alias {gguf_file.stem} --host 127.0.0.1 --port 9")
    assert heading.startswith("# Modelfile")
    told = json.loads("\n".join(said("-c", 256, "--json")))
    assert told["engine"] == "llama.cpp" and told["command"] == said("-c", 256)[0]
    assert told["modelfile"].splitlines() == said("-c", 256)[3:]
    assert modelfile == [f"FROM {gguf_file}", "PARAMETER num_ctx 256", f"PARAMETER num_gpu {layers + 1}"]
    assert " -ngl 0 -c " in said()[0], "without a GPU, and it is the engine for a GGUF file where it is installed"
    assert " -ub 4096 -b 4096 " in said("--prefill-chunk", 4096)[0] and " -ub " not in said()[0]
    quantized = said("--kv-cache-dtype", "q4_0")
    assert " -ctk q4_0 -ctv q4_0 " in quantized[0]
    assert quantized[3] == "# start ollama with OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE=q4_0"


def test_a_plan_is_of_the_file_and_names_it(gguf_file: Path, tiny: Path, tmp_path: Path) -> None:
    rig = ["--gpu", "RTX 3060 12GB", "-c", 128]
    served = [run("plan", gguf_file, *rig, "--engine", engine) for engine in ("qwenq", "llama.cpp")]
    assert [found.exit_code for found in served] == [0, 0], served[0].output
    qwenq, own = (found.stdout.splitlines()[-1] for found in served)
    assert own == qwenq and own.startswith(f"llama-server -m {gguf_file} -ngl ")
    planned = run("plan", tiny, *rig).stdout
    assert f"vllm serve {tiny} " in planned and "llama-server -m MODEL.gguf " in planned, "of it there is no GGUF yet"
    for engine in ("transformers", "vllm", "sglang"):
        for command in ("vram", "plan"):
            refused = run(command, gguf_file, *rig, "--engine", engine)
            assert refused.exit_code == 1 and refused.stderr.startswith(f"error: --engine {engine}: "), refused.output
            assert refused.stderr.endswith("hint: --engine qwenq or llama.cpp\n")
    config = json.loads((tiny / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    engine = ["--engine", "llama.cpp", "-c", 128]
    beside = answer("vram", tmp_path, "--checkpoint", gguf_file, *engine)
    assert beside["weights"]["bytes"] == answer("vram", gguf_file, *engine)["weights"]["bytes"], "its own head counts"


def test_a_file_is_cut_by_no_tensor_parallelism(gguf_file: Path, tiny: Path) -> None:
    told = run("inspect", gguf_file).stdout + run("quantize", tiny, "--format", "gguf", "--dry-run").stdout
    assert "FFN size" in told and "disk needed" in told and "tensor parallel" not in told
    assert "tensor parallel 1, 2, 4" in run("inspect", tiny).stdout


def test_what_it_is_started_with(
    gguf_file: Path, stand_in: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda *args: calls.append(args))
    found = run("serve", gguf_file, "--engine", "llama.cpp", "--api-key", "secret", "--served-model-name", "mine")
    assert found.exit_code == 0 and "secret" not in found.output
    ((program, words, environment),) = calls
    assert program == os.environ["QWENQ_LLAMA_SERVER"] and environment["LLAMA_API_KEY"] == "secret"
    assert words[words.index("--alias") + 1] == "mine"


@pytest.mark.parametrize(
    ("options", "line", "code"),
    [
        (("--kv-cache-dtype", "fp8"), "error: llama.cpp is not planned with KV cache dtype 'fp8'", 2),
        (("--hosts", "a,b"), "error: --hosts is for vLLM's commands", 2),
        *(
            (words, f"error: {words[0]} is for qwenq's own server, and this is llama.cpp's", 2)
            for words in (("--allowed-hosts", "x"), ("--gpu-memory", "8GB"), ("--max-queue", "4"))
        ),
    ],
)
def test_what_cannot_be_asked_for(
    options: tuple[str, ...], line: str, code: int, gguf_file: Path, stand_in: Callable[[str], Any]
) -> None:
    found = run("serve", gguf_file, "--engine", "llama.cpp", "--dry-run", *options)
    assert found.exit_code == code and found.stderr.splitlines()[0] == line


def test_it_reads_gguf_files_only(tiny: Path, stand_in: Callable[[str], Any]) -> None:
    for command in (("serve", tiny, "--dry-run"), ("run", tiny, "-p", "x", "--raw")):
        found = run(*command, "--engine", "llama.cpp")
        assert found.exit_code == 1
        assert found.stderr.splitlines()[0] == f"error: {tiny}: not a GGUF file, which is what llama.cpp reads"
