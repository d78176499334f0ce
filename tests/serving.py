"""A server of a tiny model in this process, for tests that ask it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from starlette.types import ASGIApp

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.io.http import Line, Server, listen
from qwenq.planning.placement import host_map
from qwenq.runtime.chat import Chat
from qwenq.runtime.generate import Sampling, Session
from qwenq.runtime.model import CheckpointWeights, build_model
from qwenq.runtime.server import Service


def make_service(path: Path, *, dtype: torch.dtype = torch.float32, queue: int = 1, context: int = 400) -> Service:
    checkpoint = open_checkpoint(path)
    weights = CheckpointWeights(checkpoint)
    model = build_model(weights, checkpoint.config, checkpoint.spec, host_map(checkpoint.spec), dtype=dtype)
    chat = Chat(path, checkpoint.spec.vocab_size)
    return Service(Session(model, context, stop_ids=chat.stop_ids), chat, "tiny", Line(queue))


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The address of an application on loopback."""
    with listen("127.0.0.1", 0) as bound:
        server = Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def direct(service: Service, ids: list[int], new: int) -> str:
    """The greedy text of the session itself."""
    tokens = service.session.generate(ids, Sampling(max_new_tokens=new))
    return "".join(service.chat.stream(tokens, ids))


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
