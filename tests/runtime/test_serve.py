"""The server as its clients see it: the openai library, limits, several at once, clients that leave, shutdown."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from gguf_bytes import tiny_file
from serving import direct, make_service, served, until

from qwenq.errors import RunError
from qwenq.io.http import listen
from qwenq.runtime.generate import Session
from qwenq.runtime.server import Service, make_app
from tests.conftest import run

ASK = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def test_the_openai_client(client: openai.OpenAI, service: Service) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    ids = service.chat.prompt_ids(ASK)
    answer = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_tokens=12)  # type: ignore[arg-type]
    wanted = direct(service, ids, 12)
    assert answer.choices[0].message.content == wanted and answer.choices[0].message.role == "assistant"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].finish_reason in ("length", "stop")
    text = client.completions.create(model="tiny", prompt="The sea", temperature=0, max_tokens=8)
    assert text.choices[0].text == direct(service, service.chat.text_ids("The sea"), 8)


def test_streaming(client: openai.OpenAI, service: Service) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0, max_tokens=12, stream=True,  # type: ignore[arg-type]
        stream_options={"include_usage": True},
    )  # fmt: skip
    parts = list(stream)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == direct(service, service.chat.prompt_ids(ASK), 12)
    assert len([part for part in parts if part.choices]) > 4  # it really came in pieces
    assert parts[-2].choices[0].finish_reason in ("length", "stop")
    assert parts[-1].usage is not None and parts[-1].usage.completion_tokens <= 12


def test_draws_repeat_with_a_seed(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> str:
        return (
            client.completions.create(model="tiny", prompt="A", temperature=1.5, max_tokens=12, seed=seed)
            .choices[0]
            .text
        )

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(4)}) > 1


def test_stop_texts_never_show(client: openai.OpenAI, service: Service) -> None:
    whole = direct(service, service.chat.text_ids("The sea"), 30)
    stop = whole[9:14]
    asked = {"model": "tiny", "prompt": "The sea", "temperature": 0, "max_tokens": 30, "stop": ["@@@@", stop]}
    assert client.completions.create(**asked).choices[0].text == whole[: whole.index(stop)]
    pieces = [part.choices[0].text for part in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": ASK, "max_tokens": 0}, 400, "max_tokens is 0, wanted at least 1"),
        ({"messages": ASK, "max_tokens": 1000}, 400, "in a context of 400"),
        ({"messages": ASK, "model": "gpt-4"}, 404, "the model here is 'tiny'"),
        ({"messages": ASK, "n": 129}, 400, "n: Input should be less than or equal to 128"),
        ({"messages": ASK, "tools": [{}]}, 400, "chat template does not render them"),
        ({"messages": ASK, "stop": [""]}, 400, "stop: wanted up to 256 texts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text alone is read"),
        ({"messages": [{"role": "user", "content": "x" * (5 << 20)}]}, 413, "larger than 4194304 bytes"),
        ("{", 400, "Invalid JSON"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:30],
)
def test_refusals(body: Any, status: int, message: str, address: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    found = httpx.post(address + "/v1/chat/completions", content=content, timeout=60)
    assert found.status_code == status and message in found.json()["error"]["message"]
    too_long = httpx.post(address + "/v1/completions", json={"prompt": [1] * 500}, timeout=60).json()["error"]
    assert too_long["code"] == "context_length_exceeded"


def test_other_host_names_and_keys(address: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert httpx.get(address + "/v1/models", headers={"Host": "evil.example"}).status_code == 403
    monkeypatch.setattr(service, "api_key", "secret")
    assert httpx.get(address + "/v1/models").status_code == 401
    assert httpx.get(address + "/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert httpx.post(address + "/v1/completions", json={"prompt": "x"}).status_code == 401
    for key in ("Bearer  secret", "bearer secret", "secret"):
        assert httpx.get(address + "/v1/models/tiny", headers={"Authorization": key}).status_code == 200
    for key in ("Bearer secre", "Bearer secret1", "Bearer", "Basic secret", "Bearer Bearer secret"):
        assert httpx.get(address + "/v1/models/tiny", headers={"Authorization": key}).status_code == 401
    monkeypatch.setattr(service, "api_key", "schlüssel")
    given = [(b"Authorization", "Bearer schlüssel".encode())]
    assert httpx.get(address + "/v1/models", headers=given).status_code == 200
    assert httpx.get(address + "/v1/models", headers=given * 2).status_code == 401


def test_one_at_a_time_the_rest_in_line(address: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model answers one request, one waits, a third is told to come later; then all is free again."""
    inside, overlap = [], []
    hold = threading.Event()
    forward = Session.forward

    def slow(session: Session, ids: Any) -> Any:
        inside.append(1)
        overlap.append(len(inside))
        hold.wait(20)
        inside.pop()
        return forward(session, ids)

    monkeypatch.setattr(Session, "forward", slow)
    asked = {"prompt": "The sea", "max_tokens": 2, "temperature": 0}
    found: list[int] = []

    def ask() -> None:
        found.append(httpx.post(address + "/v1/completions", json=asked, timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    until(lambda: len(inside) == 1)
    threads[1].start()
    until(lambda: service.line.waiting == 1)
    busy = httpx.post(address + "/v1/completions", json=asked, timeout=60)
    assert busy.status_code == 429 and busy.json()["error"]["code"] == "queue_full"
    hold.set()
    for thread in threads:
        thread.join(30)
    assert found == [200, 200] and max(overlap) == 1
    until(lambda: httpx.get(address + "/health").json() == {"status": "ok", "waiting": 0})


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model(
    stream: bool, address: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Session.forward

    def slow(session: Session, ids: Any) -> Any:
        time.sleep(0.02)
        return forward(session, ids)

    monkeypatch.setattr(Session, "forward", slow)
    monkeypatch.setattr(service.session, "stop_ids", frozenset())
    asked = {"prompt": "The sea", "max_tokens": 390, "temperature": 0, "stream": stream}
    clock = time.monotonic()
    if stream:
        with httpx.stream("POST", address + "/v1/completions", json=asked, timeout=60) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + "/v1/completions", json=asked, timeout=0.3)
    after = httpx.post(address + "/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60)
    assert after.status_code == 200 and time.monotonic() - clock < 6  # not the 390 x 20 ms of the first answer


def test_clients_that_leave_the_line_are_never_computed(
    address: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming or not: their places are free at once, and the model never sees their prompts."""
    hold, prompts = threading.Event(), []
    generate, forward = Session.generate, Session.forward

    def noted(session: Session, ids: Any, *rest: Any, **more: Any) -> Any:
        prompts.append(list(ids))
        return generate(session, ids, *rest, **more)

    def slow(session: Session, ids: Any) -> Any:
        hold.wait(20)
        return forward(session, ids)

    monkeypatch.setattr(Session, "generate", noted)
    monkeypatch.setattr(Session, "forward", slow)
    monkeypatch.setattr(service.line, "limit", 4)
    asked = {"max_tokens": 2, "temperature": 0}
    first = threading.Thread(target=httpx.post, args=(address + "/v1/completions",), kwargs={
        "json": asked | {"prompt": [1]}, "timeout": 60})  # fmt: skip
    first.start()
    until(lambda: prompts == [[1]])

    leaving = [http.client.HTTPConnection(address.removeprefix("http://"), timeout=60) for _ in range(4)]
    for client, stream in zip(leaving, (False, True, False, True), strict=True):
        body = json.dumps(asked | {"prompt": [2], "stream": stream})
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    until(lambda: service.line.waiting == 4)
    for client in leaving:
        client.close()
    until(lambda: service.line.waiting == 0)
    hold.set()
    first.join(30)
    assert httpx.post(address + "/v1/completions", json=asked | {"prompt": [3]}, timeout=60).status_code == 200
    assert prompts == [[1], [3]]


@pytest.mark.parametrize("stream", [True, False])
def test_six_at_once_are_answered_or_told_to_come_later(
    stream: bool, address: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, forward = threading.Event(), Session.forward

    def slow(session: Session, ids: Any) -> Any:
        hold.wait(20)
        return forward(session, ids)

    monkeypatch.setattr(Session, "forward", slow)
    asked = {"messages": ASK, "max_tokens": 2, "stream": stream}
    found: list[tuple[int, str]] = []

    def ask() -> None:
        answer = httpx.post(address + "/v1/chat/completions", json=asked, timeout=60)
        found.append((answer.status_code, answer.text))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(found) == 4)  # one is answered, one waits
    hold.set()
    for thread in threads:
        thread.join(30)
    assert sorted(status for status, _ in found) == [200, 200, 429, 429, 429, 429]
    assert not any("error" in text for status, text in found if status == 200)


def test_an_empty_line_takes_one_after_the_other(service: Service, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """With nobody allowed to wait, the place is free again before the answer is out."""
    monkeypatch.setattr(service.line, "limit", 0)
    with served(make_app(service)) as address, httpx.Client(base_url=address, timeout=60) as client:
        found = [client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code for _ in range(50)]
    assert set(found) == {200}


@pytest.mark.parametrize("cached", [0, 30, 59])
def test_the_same_seed_gives_the_same_text_whatever_is_cached(cached: int, tiny: Path) -> None:
    """In bfloat16, where one row alone is summed in another order than many at once."""
    service = make_service(tiny, dtype=torch.bfloat16)
    ids = [(k * 37) % 1000 for k in range(60)]
    asked = {"prompt": ids, "max_tokens": 60, "temperature": 1.0}
    with served(make_app(service)) as address, httpx.Client(base_url=address, timeout=60) as client:

        def text(seed: int) -> str:
            return client.post("/v1/completions", json=asked | {"seed": seed}).json()["choices"][0]["text"]

        for seed in range(3):
            service.session.release()
            cold = text(seed)
            if cached:
                other = {"prompt": [*ids[:cached], 5, 5], "max_tokens": 3}
                assert client.post("/v1/completions", json=other).status_code == 200
            assert text(seed) == cold
        again = client.post("/v1/completions", json=asked).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 59  # without a seed all of it is used


def test_whole_chunks_stay_in_the_cache_of_a_seeded_request(tiny: Path) -> None:
    service = make_service(tiny, dtype=torch.bfloat16)
    service.session.prefill_chunk = 16
    ids = [(k * 37) % 1000 for k in range(60)]
    asked = {"prompt": ids, "max_tokens": 8, "temperature": 1.0, "seed": 3}
    with served(make_app(service)) as address, httpx.Client(base_url=address, timeout=60) as client:
        cold, warm = (client.post("/v1/completions", json=asked).json() for _ in range(2))
    assert cold["choices"] == warm["choices"]
    assert [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (cold, warm)] == [0, 48]


def test_a_failure_in_the_middle_is_said(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*unused: object, **more: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(service.session.model.network.model), "forward", fail)
        with pytest.raises(openai.InternalServerError, match="out of memory while computing"):
            client.completions.create(model="tiny", prompt="The sea", max_tokens=2)
        with pytest.raises(openai.APIError, match="out of memory while computing"):
            list(client.completions.create(model="tiny", prompt="The sea", max_tokens=2, stream=True))
    assert client.completions.create(model="tiny", prompt="The sea", max_tokens=2).choices[0].text


def test_the_command_ends_cleanly(tiny: Path) -> None:
    """Ctrl-C while an answer is being made: the answer ends, the process too, without a traceback."""
    words = [sys.executable, "-m", "qwenq", "serve", str(tiny), "--port", "0", "--engine", "qwenq"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)
        with httpx.stream("POST", url + "/completions", json={"prompt": "The", "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert "data: [DONE]" in list(lines)
        assert process.wait(30) in (0, -signal.SIGINT, 130)
        assert "Traceback" not in process.stderr.read()


def test_who_waits_when_the_server_ends_is_told_so(tiny: Path) -> None:
    service = make_service(tiny)
    with served(make_app(service)) as address:
        service.closing.set()
        answer = httpx.post(address + "/v1/completions", json={"prompt": "x"}, timeout=60)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
        stream = httpx.post(address + "/v1/completions", json={"prompt": "x", "stream": True}, timeout=60).text
    assert '"code": "shutting_down"' in stream and stream.endswith("data: [DONE]\n\n")


def test_open_addresses_without_a_key_are_warned_of(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenq.io.http.Server.run", lambda self, sockets: None)

    def said(*options: str) -> str:
        words = ["serve", str(tiny), "--engine", "qwenq", "--port", "0", *options]
        result = run(*words)
        assert result.exit_code == 0, result.output
        return result.stderr

    assert "warning: 0.0.0.0 is reachable from other machines" in said("--host", "0.0.0.0")
    for options in (["--host", "0.0.0.0", "--api-key", "x"], ["--host", "127.0.0.2"], []):
        assert "warning" not in said(*options)


def test_a_gguf_file_is_served_under_its_name(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under the path to it, which is nobody's business."""
    served_as: list[str] = []
    monkeypatch.setattr("qwenq.runtime.server.make_app", lambda service, hosts: served_as.append(service.name))
    monkeypatch.setattr("qwenq.io.http.Server.run", lambda self, sockets: None)
    file = tmp_path / "tiny-00001-of-00001.gguf"
    file.write_bytes(tiny_file(tiny).encode())
    for path in (file, tiny):
        result = run("serve", path, "--engine", "qwenq", "--port", "0")
        assert result.exit_code == 0, result.output
    assert served_as == ["tiny", tiny.name]


def test_what_vllm_would_be_told(tiny: Path) -> None:
    def lines(*options: str) -> list[str]:
        words = ["serve", str(tiny), "--dry-run", "--engine", "vllm", "--gpu", "2x RTX 3090", *options]
        result = run(*words)
        assert result.exit_code == 0, result.stderr
        assert ("set VLLM_API_KEY where you run them" in result.stderr) == ("--api-key" in options)
        return result.stdout.splitlines()

    (single,) = lines("-c", "256", "--kv-cache-dtype", "fp8", "--port", "9")
    assert single.startswith(f"vllm serve {tiny} --tensor-parallel-size ")
    for part in ("--max-model-len 256", "--kv-cache-dtype fp8", "--gpu-memory-utilization 0.9", "--port 9"):
        assert part in single
    assert lines("--engine", "auto")[0].startswith("vllm serve "), "a dry run never starts a server"
    assert json.loads("\n".join(lines("--json"))) == {"engine": "vllm", "command": "\n".join(lines())}
    assert "--max-num-batched-tokens 512" in lines("--prefill-chunk", "512")[0]
    assert "--max-num-batched-tokens" not in single  # vLLM's own, not this project's
    several = lines("--hosts", "alpha, beta", "--api-key", "secret")
    assert "secret" not in "".join(several)
    assert several[:4] == ["# on alpha", "ray start --head --port=6379", "# on beta", "ray start --address=alpha:6379"]
    assert "--distributed-executor-backend ray" in several[-1]
    tensor = int(re.search(r"--tensor-parallel-size (\d+)", several[-1])[1])  # type: ignore[index]
    pipeline = int(re.search(r"--pipeline-parallel-size (\d+)", several[-1])[1])  # type: ignore[index]
    assert tensor * pipeline == 4 and tensor in (1, 2)  # tensor parallelism stays inside a host


def test_errors_of_the_command(tiny: Path) -> None:
    def refused(*options: str) -> str:
        result = run("serve", tiny, *options)
        assert result.exit_code in (1, 2, 3) and result.stdout == "", result.output
        return result.stderr

    assert "error: unknown engine 'tgi'" in refused("--engine", "tgi")
    assert "error: --json is for --dry-run" in refused("--json")
    assert "are for other servers' commands" in refused("--engine", "qwenq", "--gpu", "RTX 3090")
    for words in (["--allowed-hosts", "x"], ["--max-queue", "4"], ["--compute-dtype", "float32"]):
        said = refused("--engine", "vllm", "--dry-run", "--gpu", "RTX 3090", *words)
        assert f"error: {words[0]} is for qwenq's own server, and this is vLLM's" in said
    assert "error: vLLM cannot serve" in refused(
        "--engine", "vllm", "--gpu", "RTX 3090", "-c", "512", "--hosts", "a,b,c,d,e"
    )
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"error: cannot listen on 127.0.0.1 port {port}" in refused("--port", port, "--engine", "qwenq")
    # The first is nobody's (RFC 5737), and the second no name (RFC 6761).
    for address, way in (("192.0.2.1", "--host"), ("name.invalid", "--host"), ("127.0.0.1", "--port")):
        with listen("127.0.0.1", 0) as taken, pytest.raises(RunError) as told:
            listen(address, taken.getsockname()[1])
        assert told.value.hint == f"choose another with {way}"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is None and not torch.cuda.is_available():
        said = refused("--engine", "vllm", "--dry-run")
        assert (
            "error: vLLM's flags depend on the rig, and none was found" in said
            and 'hint: name the rig with --gpu "2x RTX 3090"' in said
        )


def test_what_is_not_installed_is_said_before_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenq.io.hub.fetch_model", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "qwenq.runtime.server", None)
    for words, message in (
        (("--engine", "vllm", "--gpu", "RTX 3090"), "--engine vllm: not installed"),
        (("--engine", "qwenq"), "the server needs qwenq.runtime.server"),
    ):
        said = run("serve", "owner/never-fetched", *words)
        assert said.exit_code == 1 and said.stderr.startswith(f"error: {message}\nhint: pip install"), said.output


def test_dry_runs_download_and_start_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dry(*words: str) -> Any:
        return run("serve", *words, "--dry-run")

    monkeypatch.setattr("qwenq.cli.serve._has_gpu", lambda: False)
    monkeypatch.setattr("qwenq.io.hub.fetch_model", None)
    ours = dry(str(tiny))
    assert ours.exit_code == 0 and "nothing is loaded" in ours.stdout and "CPU: 4 layers" in ours.stdout
    assert json.loads(dry(str(tiny), "--json").stdout).keys() >= {"devices", "plan", "speed"}
    name = "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4"
    theirs = dry(name, "--gpu", "2x RTX 3090")
    assert theirs.exit_code == 0 and theirs.stdout.startswith(f"vllm serve {name} --tensor-parallel-size 1")
    assert "no header was read" in theirs.stderr and f"--served-model-name {name} " in theirs.stdout
    whole = dry("Qwen/Qwen2.5-72B-Instruct", "--gpu", "2x RTX 3090")
    assert whole.exit_code == 3 and "vLLM cannot serve 16-bit" in whole.stderr
    family = dry("Qwen2.5-72B", "--gpu", "2x RTX 3090")
    assert family.exit_code == 1 and "a checkpoint is Qwen/Qwen2.5-72B or a directory" in family.stderr
