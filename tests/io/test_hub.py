"""Models by hub name, against a stand-in for the hub on this machine: requests, arrivals, and what goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download

from qwenq.errors import HubError
from qwenq.io import hub
from qwenq.io.hub import fetch_config, fetch_headers, fetch_model, is_hub_name, same_start
from qwenq.io.safetensors import INDEX_NAME, TensorSpec, checkpoint_tensors, encode_header

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
EXTRAS = ["tf_model.h5", "modeling_tiny.py", "pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors"]


def shard(tensors: dict[str, TensorSpec]) -> bytes:
    head, order = encode_header(tensors)
    return head + b"".join(bytes(k % 251 for k in range(tensors[name].nbytes)) for name in order)


def tiny_checkpoint() -> dict[str, bytes]:
    """A sharded checkpoint of four small tensors, with files around it that nobody should fetch."""
    specs = {f"t{k}": TensorSpec(f"t{k}", "BF16", (k + 1, 700)) for k in range(4)}
    halves = [{n: specs[n] for n in ("t0", "t1")}, {n: specs[n] for n in ("t2", "t3")}]
    weight_map = {n: file for file, half in zip(SHARDS, halves, strict=True) for n in half}
    files = dict(zip(SHARDS, map(shard, halves), strict=True))
    files[INDEX_NAME] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["config.json"] = b'{"model_type": "qwen2"}'
    files["tokenizer.json"] = b'{"version": "1.0"}'
    return files | dict.fromkeys(EXTRAS, b"not wanted")


@dataclasses.dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0  # bytes of body


class StandIn:
    """The few endpoints of the hub that huggingface_hub uses, and ways to misbehave."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {"org/tiny": tiny_checkpoint()}
        self.requests: list[Request] = []
        self.refuse: Callable[[str], tuple[int, dict[str, str]] | None] = lambda path: None  # path: status, headers
        self.cut: dict[str, list[int]] = {}  # file: bytes after which each of the next downloads is cut
        self.served: dict[str, bytes] = {}  # file: what is served in place of what is listed
        self.ranges = True
        self.cdn = ""  # where the bodies of safetensors are redirected to
        self.stall = threading.Event()
        self.stall.set()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler) -> None:
                self.answer(handler)

            def do_HEAD(handler) -> None:
                self.answer(handler)

            def log_message(handler, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.stall.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def paths(self, method: str = "") -> list[str]:
        return [r.path for r in self.requests if not method or r.method == method]

    def files(self) -> set[str]:
        """Files whose content was asked for."""
        return {path.partition(f"/resolve/{COMMIT}/")[2] or path.rpartition("/")[2] for path in self.paths("GET")}

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        request = Request(handler.command, path, {k.lower(): v for k, v in handler.headers.items()})
        self.requests.append(request)
        self.stall.wait(10)
        if refused := self.refuse(path):
            return self.reply(handler, request, refused[0], refused[1], b"{}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        content = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or content
        if found is None or found[1] not in self.repos:
            return self.reply(handler, request, 404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        files = self.repos[found[1]]
        if ((api[3] if api else found[2]) or "main") not in ("main", COMMIT):
            return self.reply(handler, request, 404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        if api and api[2] == "tree":
            listed = [{"type": "file", "path": f, "size": len(b), "oid": oid(b)} for f, b in files.items()]
            return self.reply(handler, request, 200, {"Content-Type": "application/json"}, json.dumps(listed).encode())
        if api:
            siblings = [{"rfilename": f, "size": len(b), "blobId": oid(b)} for f, b in files.items()]
            info = {"id": found[1], "sha": COMMIT, "siblings": siblings}
            return self.reply(handler, request, 200, {"Content-Type": "application/json"}, json.dumps(info).encode())
        if found[3] not in files:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return self.reply(handler, request, 404, missing, b"{}")
        self.send_file(handler, request, found[3], self.served.get(found[3], files[found[3]]))

    def send_file(self, handler: BaseHTTPRequestHandler, request: Request, file: str, body: bytes) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(body)}"', "Accept-Ranges": "bytes"}
        if self.cdn and file.endswith(".safetensors"):
            headers |= {"X-Linked-Size": str(len(body)), "X-Linked-Etag": headers["ETag"]}
            return self.reply(handler, request, 302, headers | {"Location": self.cdn + handler.path}, b"")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        status = 200
        if asked and self.ranges:
            start, end = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            status, body = 206, body[start : end + 1]
        cut = self.cut[file].pop(0) if handler.command == "GET" and self.cut.get(file) else None
        self.reply(handler, request, status, headers, body, cut)

    def reply(
        self, handler: Any, request: Request, status: int, headers: dict[str, str], body: bytes, cut: int | None = None
    ) -> None:
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        try:
            for at in range(0, len(body if cut is None else body[:cut]), 1 << 16):
                part = (body if cut is None else body[:cut])[at : at + (1 << 16)]
                handler.wfile.write(part)
                request.sent += len(part)
        except OSError:  # the client has read enough
            handler.close_connection = True
        if cut is not None:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True


def oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    server = StandIn()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    yield server
    server.close()


def failure(call: Callable[..., Any], *args: Any) -> HubError:
    """The HubError that `call` ends in: one line, a hint, no traceback of other libraries behind it."""
    with pytest.raises(HubError) as caught:
        call(*args)
    error = caught.value
    assert "\n" not in error.message and "\n" not in error.hint
    assert error.hint
    assert error.__cause__ is None
    return error


@pytest.mark.parametrize(
    ("model", "is_name"),
    [
        ("Qwen/Qwen2.5-72B-Instruct", True),
        ("o/m_1.x", True),
        ("Qwen2.5-72B", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("../b", False),
        ("/a/b", False),
        ("~/b", False),
        ("a/..", False),
        ("a b/c", False),
        ("a/b?x=1", False),
        ("a/b\n", False),
        ("https://huggingface.co/a/b", False),
        ("", False),
    ],
)
def test_hub_names(model: str, is_name: bool) -> None:
    assert is_hub_name(model) is is_name


def test_a_local_path_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("models/tiny")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert not is_hub_name("models/tiny")


def test_every_tokenizer_file_is_fetched() -> None:
    from qwenq.text.tokens import TOKENIZER_FILES  # imports torch

    assert set(TOKENIZER_FILES) <= set(hub.SMALL_FILES)
    assert not any(name.endswith((".py", ".bin")) for name in hub.SMALL_FILES)


def test_a_model_arrives_whole_and_nothing_else(stand_in: StandIn) -> None:
    lines: list[str] = []
    directory = fetch_model("org/tiny", listen=lines.append)
    repo = stand_in.repos["org/tiny"]
    wanted = {*SHARDS, INDEX_NAME, "config.json", "tokenizer.json"}
    assert {p.name for p in directory.iterdir()} == wanted
    assert all((directory / name).read_bytes() == repo[name] for name in wanted)
    assert len(checkpoint_tensors(directory)) == 4
    assert not stand_in.files() & set(EXTRAS)
    assert lines[0].startswith("downloading org/tiny: 3 files, ") and COMMIT[:12] in lines[-1]

    stand_in.requests.clear()
    assert fetch_model("org/tiny") == directory
    assert not any("safetensors" in path for path in stand_in.paths())


def test_in_a_process_of_its_own(stand_in: StandIn, tmp_path: Path) -> None:
    """As users run it: the environment is read, the terminal stays silent, the second run needs no network."""
    code = (
        "import sys, qwenq.io.hub as hub\n"
        "assert not {'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "print(hub.fetch_model('org/tiny'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path / "home")}
    for offline in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = subprocess.run([sys.executable, "-c", code], env=environment | offline, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert Path(done.stdout.strip()) == tmp_path / "home/hub/models--org--tiny/snapshots" / COMMIT


def test_config_alone_asks_for_no_weights(stand_in: StandIn) -> None:
    directory = fetch_config("org/tiny")
    assert [p.name for p in directory.iterdir()] == ["config.json"]
    assert not any("safetensors" in path for path in stand_in.paths())


def test_headers_are_read_by_ranges(stand_in: StandIn, tmp_path: Path) -> None:
    repo = stand_in.repos["org/tiny"]
    for name in (*SHARDS, INDEX_NAME):
        (tmp_path / name).write_bytes(repo[name])
    here = checkpoint_tensors(tmp_path)
    assert fetch_headers("org/tiny") == {n: dataclasses.replace(t, file=Path(t.file.name)) for n, t in here.items()}
    shards = [r for r in stand_in.requests if r.path.endswith(".safetensors")]
    assert len(shards) == 2 and all(r.headers["range"].startswith("bytes=0-") for r in shards)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


@pytest.mark.parametrize("ranges", [True, False])
def test_headers_cost_no_weights(stand_in: StandIn, ranges: bool) -> None:
    """A header longer than the first request, before weights that must not travel, even where ranges are ignored."""
    names = [f"model.layers.{k}.a_rather_long_name.weight" for k in range(1500)]
    head, _ = encode_header({n: TensorSpec(n, "F32", (64, 128)) for n in names})
    assert len(head) > 1 << 16
    stand_in.repos["org/big"] = {"model.safetensors": head + bytes(1500 * 64 * 128 * 4), "config.json": b"{}"}
    stand_in.ranges = ranges
    found = fetch_headers("org/big")
    assert len(found) == 1500 and found[names[0]].end - found[names[0]].start == 64 * 128 * 4
    assert sum(r.sent for r in stand_in.requests) < (1 << 18 if ranges else 20_000_000)


@pytest.mark.parametrize("ranges", [True, False])
def test_two_tensors_are_told_apart_by_their_first_bytes(ranges: bool, stand_in: StandIn) -> None:
    """A head and the embedding it is said to be tied to: 8 KB are read, or what lies before them."""
    stand_in.ranges = ranges
    specs = {name: TensorSpec(name, "BF16", (40, 700)) for name in ("embed", "head", "same")}
    head, order = encode_header(specs)
    size = specs["embed"].nbytes
    body = {name: bytes(k % 251 for k in range(size)) for name in order}
    body["head"] = body["head"][:4000] + b"\xff" + body["head"][4001:]
    stand_in.repos["org/tied"] = {"model.safetensors": head + b"".join(body[n] for n in order), "config.json": b"{}"}
    found = fetch_headers("org/tied")
    before = sum(request.sent for request in stand_in.requests)
    assert same_start("org/tied", found["embed"], found["same"])
    assert not same_start("org/tied", found["embed"], found["head"])
    if ranges:
        assert sum(request.sent for request in stand_in.requests) - before == 4 * 4096


def test_headers_that_lie_are_refused(stand_in: StandIn) -> None:
    repo = stand_in.repos["org/tiny"]
    repo[SHARDS[1]] += b"tail"
    for call in (fetch_headers, fetch_model):  # a repository at fault is no download at fault, and refused as well
        assert f"{SHARDS[1]}: 4 bytes after the last tensor" in failure_message(call, "org/tiny")
    repo[SHARDS[1]] = repo[SHARDS[0]]
    assert "index.json puts it in" in failure_message(fetch_headers, "org/tiny")
    repo[SHARDS[1]] = (1 << 40).to_bytes(8, "little") + bytes(100)
    assert "header length 1099511627776 is not possible" in failure_message(fetch_headers, "org/tiny")
    repo[SHARDS[1]] = b"short"
    failure_message(fetch_headers, "org/tiny")


def failure_message(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(HubError) as caught:
        call(*args)
    return caught.value.message


@pytest.mark.parametrize("named", ["../evil.safetensors", "onnx/model.safetensors", "absent.safetensors", "a.bin"])
def test_an_index_names_only_shards_of_its_repository(stand_in: StandIn, named: str) -> None:
    index = {"weight_map": {"t0": named}}
    stand_in.repos["org/tiny"][INDEX_NAME] = json.dumps(index).encode()
    for call in (fetch_headers, fetch_model):
        assert f"names {named}" in failure_message(call, "org/tiny")


def test_pickled_weights_are_refused(stand_in: StandIn) -> None:
    stand_in.repos["org/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"cos\nsystem\n"}
    for call in (fetch_model, fetch_headers):
        error = failure(call, "org/pickled")
        assert "pytorch_model.bin" in error.message and "refused" in error.message
        assert "safetensors" in error.hint
    assert not any("/resolve/" in path for path in stand_in.paths())


def test_what_is_no_checkpoint(stand_in: StandIn) -> None:
    stand_in.repos |= {"org/gguf": {"m.gguf": b""}, "org/bare": {"config.json": b"{}"}, "org/empty": {}}
    assert "no config.json" in failure(fetch_config, "org/gguf").message
    assert "no safetensors" in failure(fetch_model, "org/bare").message
    assert "empty" in failure_message(fetch_config, "org/empty")


def test_repository_not_found(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (fetch_config, fetch_headers, fetch_model):
        error = failure(call, "org/absent")
        assert error.message == f"org/absent: no such repository on {stand_in.url} (404), nor a directory here"
        assert "spelling" in error.hint and "HF_TOKEN" in error.hint
    stand_in.refuse = lambda path: (401, {"X-Error-Message": "Invalid username or password."})
    assert "(401)" in failure(fetch_model, "org/private").message
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecret")
    error = failure(fetch_model, "org/private")
    assert "HF_TOKEN is not accepted" in error.message and "hf_" not in error.message + error.hint


def refusing(part: str, status: int, code: str = "") -> Callable[[str], tuple[int, dict[str, str]] | None]:
    return lambda path: (status, {"X-Error-Code": code}) if part in path else None


def test_gated(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub lists a gated repository to everyone, and refuses its files."""
    stand_in.refuse = refusing("/resolve/", 401, "GatedRepo")
    for call in (fetch_config, fetch_headers, fetch_model):
        error = failure(call, "org/tiny")
        assert "gated (401)" in error.message
        assert f"{stand_in.url}/org/tiny" in error.hint and "accept the license" in error.hint
        assert "then set HF_TOKEN" in error.hint
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecret")
    stand_in.refuse = refusing("/resolve/", 403, "GatedRepo")
    error = failure(fetch_model, "org/tiny")
    assert "gated (403)" in error.message and "account" in error.hint and "hf_" not in error.hint
    for part in ("/api/", "/resolve/"):
        stand_in.refuse = refusing(part, 403)
        assert "access refused (403)" in failure(fetch_model, "org/tiny").message


@pytest.mark.parametrize(("status", "words"), [(429, "too many requests"), (503, "is not working (503)")])
def test_the_hub_is_busy(stand_in: StandIn, status: int, words: str) -> None:
    stand_in.refuse = lambda path: (status, {})
    assert words in failure(fetch_model, "org/tiny").message


def test_no_network(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://someone:hf_password1@127.0.0.1:{port}/")
        for call in (fetch_config, fetch_headers, fetch_model):
            error = failure(call, "org/tiny")
            assert f"http://127.0.0.1:{port} cannot be reached" in error.message and "password" not in error.message
            assert "HF_ENDPOINT" in error.hint and "HF_HUB_OFFLINE=1" in error.hint


def test_a_page_that_is_no_hub(stand_in: StandIn) -> None:
    stand_in.refuse = lambda path: (200, {"Content-Type": "text/html"})
    error = failure(fetch_model, "org/tiny")
    assert stand_in.url in error.message and "HF_ENDPOINT" in error.hint


def test_offline_with_and_without_a_copy(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (fetch_config, fetch_headers, fetch_model):
        error = failure(call, "org/tiny")
        assert "not in the cache" in error.message and "unset HF_HUB_OFFLINE" in error.hint
    assert not stand_in.requests

    monkeypatch.delenv("HF_HUB_OFFLINE")
    directory = fetch_config("org/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stand_in.requests.clear()
    assert fetch_config("org/tiny") == directory
    error = failure(fetch_model, "org/tiny")  # a config alone is no model
    assert "not whole" in error.message and "unset HF_HUB_OFFLINE" in error.hint

    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetch_model("org/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stand_in.requests.clear()
    assert fetch_model("org/tiny") == directory and len(fetch_headers("org/tiny")) == 4
    assert not stand_in.requests


def test_a_cut_connection_is_taken_up_again(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[logging.LogRecord] = []
    collector = logging.Handler()
    monkeypatch.setattr(collector, "emit", said.append)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [collector])
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    stand_in.cut[SHARDS[0]] = [1000]
    directory = fetch_model("org/tiny")
    assert (directory / SHARDS[0]).read_bytes() == stand_in.repos["org/tiny"][SHARDS[0]]
    again = [r for r in stand_in.requests if r.method == "GET" and r.path.endswith(SHARDS[0])]
    assert [r.headers.get("range") for r in again] == [None, "bytes=1000-"]
    assert not said  # huggingface_hub would tell addresses, signatures included


def test_a_connection_that_stays_cut_leaves_no_file(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    stand_in.cut[SHARDS[1]] = [1000] + [0] * 20
    error = failure(fetch_model, "org/tiny")
    assert "broke or stalled" in error.message and "finished files are kept" in error.hint
    assert not list(Path(constants.HF_HUB_CACHE).rglob(SHARDS[1]))
    whole = {oid(body) for body in stand_in.repos["org/tiny"].values()}
    blobs = [p for p in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if not p.name.endswith(".incomplete")]
    assert blobs and all(p.name == oid(p.read_bytes()) and p.name in whole for p in blobs)

    stand_in.cut.clear()
    stand_in.requests.clear()
    directory = fetch_model("org/tiny")
    assert (directory / SHARDS[1]).read_bytes() == stand_in.repos["org/tiny"][SHARDS[1]]
    assert SHARDS[0] not in stand_in.files()


def test_a_stalled_hub_is_given_up(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    stand_in.stall.clear()
    assert "broke or stalled" in failure(fetch_config, "org/tiny").message
    assert len(stand_in.requests) == 1


def test_an_endpoint_that_serves_a_file_cut_short(stand_in: StandIn) -> None:
    """A mirror whose copy is shorter than the listing says, and which is consistent about it."""
    stand_in.served[SHARDS[0]] = stand_in.repos["org/tiny"][SHARDS[0]][:-100]
    error = failure(fetch_model, "org/tiny")
    assert SHARDS[0] in error.message and "bytes in the cache" in error.message and "delete" in error.hint


def test_a_damaged_cache_is_noticed(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = (fetch_model("org/tiny") / SHARDS[0]).resolve()
    with open(blob, "r+b") as file:
        file.truncate(500)
    error = failure(fetch_model, "org/tiny")
    assert "500 bytes in the cache" in error.message and str(blob) in error.hint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = failure(fetch_model, "org/tiny")
    assert "not whole" in error.message and SHARDS[0] in error.message


def test_disk_full(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        error = failure(fetch_model, "org/tiny")
        assert "1.0 kB free" in error.message and "HF_HOME" in error.hint
        assert not stand_in.files() & set(SHARDS)

    def fill(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", fill)
    error = failure(fetch_model, "org/tiny")
    assert "disk is full" in error.message and "HF_HOME" in error.hint


def test_a_cache_that_cannot_be_written(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert "Not a directory" in failure(fetch_model, "org/tiny").message


def test_the_token_goes_to_the_hub_alone(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    cdn = StandIn()
    try:
        stand_in.cdn = cdn.url.replace("127.0.0.1", "localhost")
        fetch_headers("org/tiny")
        assert stand_in.requests and all("authorization" not in r.headers for r in stand_in.requests + cdn.requests)
        monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecret")
        stand_in.requests.clear()
        fetch_headers("org/tiny")
        fetch_model("org/tiny")
        assert all(r.headers.get("authorization") == "Bearer hf_thisIsASecret" for r in stand_in.requests)
        assert set(SHARDS) <= cdn.files() and all("authorization" not in r.headers for r in cdn.requests)
    finally:
        cdn.close()


def test_secrets_are_not_shown() -> None:
    error = ValueError("\nGET https://me:pass@host/a/b?X-Amz-Signature=s3cret failed for hf_thisIsASecret\nsecond line")
    assert hub._one_line(error) == "GET https://host/a/b failed for "
