"""Chat templates of checkpoints, rendered by a child process with limits on time, memory and output.

A template is a program of somebody else's: Jinja's sandbox keeps it from files and Python, and these limits from
taking the machine. The child calls transformers' own `render_jinja_template`; it reads a JSON request a line and
answers with one. Memory is limited on Linux, where the size of a process can be.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from qwenq.errors import CalibrationError

MAX_TEMPLATE_BYTES = 256 << 10  # the longest published ones have 30 KB
CPU_S = 3  # for one conversation, the template's translation included
MEMORY_BYTES = 384 << 20  # beside what the renderer has when it starts
OUTPUT_CHARACTERS = 256 << 10  # and OUTPUT_RATIO times what goes in
OUTPUT_RATIO = 8
_WALL_S = 60  # whatever keeps the renderer from running
_START_S = 120
_REASON_CHARACTERS = 1000


class TemplateFault(Exception):
    """A template that refused a conversation, or (`limit`) went over a limit."""

    def __init__(self, reason: str, *, limit: bool = False) -> None:
        super().__init__(reason)
        self.limit = limit


@dataclass(frozen=True)
class Rendering:
    """One conversation for a template: its JSON is what the template sees."""

    template: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    answer: bool  # up to where the model's answer begins
    settings: Mapping[str, Any]

    def encode(self) -> bytes:
        fields = {
            "template": self.template, "messages": list(self.messages), "tools": self.tools and list(self.tools),
            "answer": self.answer, "settings": dict(self.settings), "cpu_limit_s": CPU_S,
        }  # fmt: skip
        return json.dumps(fields).encode() + b"\n"


def render(asked: Rendering) -> tuple[str, float]:
    """The conversation as the template writes it, and the processor seconds it took; TemplateFault otherwise."""
    if (size := len(asked.template.encode("utf-8", "surrogatepass"))) > MAX_TEMPLATE_BYTES:
        raise TemplateFault(f"{size} bytes, more than the {MAX_TEMPLATE_BYTES} a template can need", limit=True)
    return _renderer().render(asked)


class _Renderer:
    """The child process: started when first needed, and again when a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, asked: Rendering) -> tuple[str, float]:
        request = asked.encode()
        with self._lock:
            answer = self._answer(request)
        if "text" in answer:
            return answer["text"], answer["cpu_s"]
        raise TemplateFault(answer["reason"], limit=answer["limit"])

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a fork's copy is its parent's
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        process.wait()

    def _answer(self, request: bytes) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = self._line(process, _WALL_S)
        except BrokenPipeError:
            line = None
        except BaseException:  # an answer that nobody waits for would be the next one's
            self.close()
            raise
        if line is not None:
            answer: dict[str, Any] = json.loads(line)
            if answer.get("limit"):
                self.close()
            return answer
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        code = process.returncode
        self.close()
        if code == -signal.SIGXCPU:
            return {"reason": f"more than {CPU_S} s of processor time", "limit": True}
        if code is None:
            return {"reason": f"no answer in {_WALL_S} s", "limit": True}
        return {"reason": f"it ended the process that renders it (status {code})", "limit": True}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self.close()
        path = os.pathsep.join(place for place in sys.path if place)
        own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
               "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "qwenq.text.rendering"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | own,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )  # fmt: skip
        self._process, self._owner = process, os.getpid()
        if self._line(process, _START_S) is None:
            self.close()
            raise CalibrationError(
                f"the process that renders chat templates did not start within {_START_S} s",
                hint=f"try `{sys.executable} -m qwenq.text.rendering` by hand",
            )
        return process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line; None when the process has ended or `seconds` have passed."""
        assert process.stdout is not None
        handle, parts, end = process.stdout.fileno(), [], time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([handle], [], [], left)[0]:
                part = os.read(handle, 1 << 20)
                if not part:
                    return None
                parts.append(part)
                if part.endswith(b"\n"):
                    return b"".join(parts)
        return None


@cache
def _renderer() -> _Renderer:
    renderer = _Renderer()
    atexit.register(renderer.close)
    return renderer


def _serve() -> None:
    """The child: requests from stdin, answers to the stdout it was started with."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _write(answers, {"ready": True})
    for line in sys.stdin.buffer:
        request, start = json.loads(line), time.process_time()
        limit = math.ceil(start) + request["cpu_limit_s"]
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        answer = _rendered(render_jinja_template, request, OUTPUT_CHARACTERS + OUTPUT_RATIO * len(line))
        _write(answers, answer | {"cpu_s": time.process_time() - start})


def _limit_memory() -> None:
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # no dumps, no files
        resource.setrlimit(kind, (0, 0))
    with suppress(FileNotFoundError):
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))


def _rendered(function: Callable[..., Any], request: Mapping[str, Any], characters: int) -> dict[str, Any]:
    try:
        (text,), _ = function(
            conversations=[request["messages"]],
            tools=request["tools"],
            chat_template=request["template"],
            add_generation_prompt=request["answer"],
            **request["settings"],
        )
        text.encode()
    except MemoryError:
        return {"reason": f"more than {MEMORY_BYTES >> 20} MiB of memory", "limit": True}
    except UnicodeEncodeError:
        return {"reason": "half of a surrogate pair in its output", "limit": False}
    except Exception as error:  # whatever the template's own code raises
        return {"reason": _reason(error), "limit": False}
    if len(text) > characters:
        return {"reason": f"{len(text)} characters of output, more than the {characters} it may have", "limit": True}
    return {"text": text}


def _reason(error: Exception) -> str:
    try:
        return str(error)[:_REASON_CHARACTERS].strip() or type(error).__name__
    except Exception:
        return type(error).__name__


def _write(handle: int, answer: Mapping[str, Any]) -> None:
    data = memoryview(json.dumps(answer).encode() + b"\n")
    while data:
        data = data[os.write(handle, data) :]


if __name__ == "__main__":
    _serve()
