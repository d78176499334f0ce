"""llama.cpp's server: found, told what the plan says, asked for tokens, ended."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError, PlanError, RunError
from qwenq.io.gguf import gguf_model
from qwenq.io.json import shown
from qwenq.planning.case import Case
from qwenq.planning.engines.base import pci_order
from qwenq.planning.engines.llamacpp import LlamaCppEngine
from qwenq.planning.placement import Placement, place
from qwenq.planning.questions import Question
from qwenq.planning.rig import Rig, detect_rig, parse_rig
from qwenq.runtime.foreign import ForeignEngine
from qwenq.runtime.generate import GREEDY_BELOW, Sampling, Timing
from qwenq.runtime.load import DEFAULT_CONTEXT

PROGRAM = "llama-server"
VARIABLE = "QWENQ_LLAMA_SERVER"  # names the program where it is not on PATH
_START_S = 1800  # 47 GB from a slow disk
_ENGINE = LlamaCppEngine.name


@dataclass(frozen=True)
class Serving:
    """llama.cpp serving a GGUF file: a case and the placement of its layers; no placement without a GPU."""

    file: Path
    case: Case
    placement: Placement | None
    notes: tuple[str, ...] = ()  # a line for each thing that is otherwise than one might expect

    @property
    def engine(self) -> LlamaCppEngine:
        return LlamaCppEngine(self.case.engine.version)

    @property
    def words(self) -> list[str]:
        """Words of the command, without its address."""
        return self.engine.words(self.case, self.placement, str(self.file))

    @property
    def setting(self) -> str:
        """`CUDA_DEVICE_ORDER=PCI_BUS_ID ` where CUDA might number the GPUs otherwise than the plan."""
        return pci_order(self.case) if self.case.rig else ""

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the setting."""
        return os.environ | dict(pair.split("=", 1) for pair in self.setting.split())

    @property
    def modelfile(self) -> str:
        """The same for `ollama create`."""
        return self.engine.modelfile(self.case, self.placement, str(self.file.absolute()))


def serving(model: str, context: int = 0, kv_dtype: str = "auto", ubatch: int = 0, gpu: str = "") -> Serving:
    """The plan for a GGUF file, or a directory's only one, on the rig `gpu`, else on this machine's GPUs or its CPU.

    context: 0 for 4k, or the model's own where that is less. CheckpointError for what is no GGUF file, HonestNo where
    not even the output fits.
    """
    file = gguf_model(Path(model))
    if file is None:
        raise CheckpointError(
            f"{shown(model)}: not a GGUF file, which is what llama.cpp reads",
            hint="`qwenq quantize --format gguf` writes one; --engine qwenq reads checkpoints",
        )
    rig, notes = _rig(gpu)
    asked = Question(model, engine=_ENGINE, kv_cache_dtype=kv_dtype, prefill_chunk=ubatch, rig=rig).resolve()
    case = asked.at(context or min(DEFAULT_CONTEXT, asked.spec.max_position_embeddings))
    placement = None
    if rig is not None:
        placement = place(case, offload=True)
        if placement.host_layers:
            notes += ("not all layers fit the GPUs: the first ones stay on the CPU",)
    return Serving(file, case, placement, (*notes, *asked.notes))


def _rig(gpu: str) -> tuple[Rig | None, tuple[str, ...]]:
    """The rig, None for the CPU, and a line where that is not what was asked for."""
    if gpu:
        return parse_rig(gpu), ()
    try:
        rig = detect_rig()
    except PlanError as error:  # llama.cpp runs on a CPU too
        return None, (f"llama.cpp gets no GPU layers: {error.message}",)
    return rig, rig.notes


def find_server() -> str:
    """The program; RunError where there is none."""
    named = os.environ.get(VARIABLE, "")
    found = shutil.which(named or PROGRAM)
    if found is None:
        where = f"{VARIABLE} names {shown(named)}, which is not a program" if named else f"no {PROGRAM} on PATH"
        raise RunError(
            f"--engine {_ENGINE}: {where}",
            hint=f"install llama.cpp, or name its server: {VARIABLE}=/path/{PROGRAM}",
        )
    return found


def has_server() -> bool:
    """Whether the program is there; RunError where it is named and is not."""
    return bool(os.environ.get(VARIABLE) and find_server()) or shutil.which(PROGRAM) is not None


class LlamaCppServer(ForeignEngine):
    """`llama-server` with the plan's flags, in a process of its own, until `close`."""

    name = _ENGINE
    extra = ""
    own_kv = True

    def __init__(self, directory: Path, context: int = 0, kv_dtype: str = "auto") -> None:
        program, planned = find_server(), serving(str(directory), context, kv_dtype)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        words = [program, *planned.words[1:], "--host", "127.0.0.1", "--port", str(self._port)]
        self.notes = planned.notes
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=planned.environment
            )
        except OSError as error:
            raise RunError(f"{program}: {error.strerror or error}") from None
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        """Until the model is loaded; RunError, with the log's last word, where the server ends before."""
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RunError(
                    f"{PROGRAM} ended with {self._process.returncode} before it answered ({self._last_error()})",
                    hint="`qwenq serve --engine llama.cpp --dry-run` prints its command",
                )
            try:
                if self._ask("GET", "/health", timeout_s=10)[0] == http.client.OK:
                    return
            except (OSError, http.client.HTTPException, ValueError):
                pass  # it does not listen yet
            time.sleep(0.1)
        raise RunError(f"{PROGRAM} did not answer within {_START_S} s")

    def _last_error(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if "error" in line.lower()]
        return shown((said or lines or ["it said nothing"])[-1], 300)

    def _ask(self, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout_s)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def generate(
        self, ids: Sequence[int], sampling: Sampling, stop_ids: frozenset[int], timing: Timing
    ) -> Iterator[int]:
        greedy = sampling.temperature < GREEDY_BELOW
        body = {
            "prompt": list(ids),
            "n_predict": sampling.max_new_tokens,
            "return_tokens": True,
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": -1,  # of every token there is
            "seed": sampling.seed,
        }
        try:
            status, answer = self._ask("POST", "/completion", body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RunError(f"{PROGRAM} failed ({error or type(error).__name__}: {self._last_error()})") from None
        if status != http.client.OK:
            said = answer.get("error", answer) if isinstance(answer, dict) else answer
            reason = said.get("message", said) if isinstance(said, dict) else said
            raise RunError(f"{PROGRAM} refused the prompt ({shown(str(reason), 300)})")
        if not isinstance(answer, dict) or not {"tokens", "timings"} <= answer.keys():
            raise RunError(f"{PROGRAM} does not return the tokens of its answer", hint="use a newer llama.cpp")
        made, timings = list(answer["tokens"]), answer["timings"]
        # It stops at end tokens of the file's own, or known by their text; a request has words to stop at, not tokens.
        end = next((k for k, token in enumerate(made) if token in stop_ids), len(made))
        timing.prompt_tokens, timing.new_tokens = len(ids), len(made[: end + 1])
        timing.prefill_seconds = timings["prompt_ms"] / 1000
        timing.decode_seconds = timings["predicted_ms"] / 1000 * timing.new_tokens / max(1, len(made))
        timing.stopped = "length" if end == len(made) and answer.get("stop_type") == "limit" else "stop"
        yield from made[:end]

    @classmethod
    def check_installed(cls) -> None:
        find_server()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
