"""Interrupts before anything is under way, too few files, too little memory: one line each, and no traceback."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_job

from qwenq.errors import RunError, out_of_memory
from qwenq.pipeline.monitor import memory_errors
from qwenq.pipeline.quantize import quantize
from tests.conftest import run

# `python -m qwenq` with a SIGINT at the import whose number is given, counted from the first of the command line's.
INTERRUPTED = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
at, seen = int(sys.argv.pop(1)), []
def hook(event, arguments):
    if event == "import" and (seen or arguments[0].startswith("qwenq.cli")):
        seen.append(arguments[0])
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
runpy.run_module("qwenq", run_name="__main__", alter_sys=True)
"""
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


@pytest.mark.parametrize("at", [1, 2, 30, 100, 250])
def test_an_interrupt_while_it_imports(at: int, tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(at), "inspect", str(tiny)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def limited(kind: int, limit: int, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwenq", *map(str, words)], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
    )  # fmt: skip


def test_too_few_open_files(tiny: Path) -> None:
    done = limited(resource.RLIMIT_NOFILE, 7, "run", tiny, "-p", "x", "-n", 1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "hint: raise the limit: ulimit -n"


def test_too_little_memory_to_begin(tiny: Path) -> None:
    done = limited(resource.RLIMIT_AS, 300 << 20, "run", tiny, "-p", "x", "-n", 1)
    assert done.returncode == 1
    assert done.stderr == "error: out of memory\nhint: close other programs, or ask for less at once\n"


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError(NO_MEMORY)], ids=["Python", "torch"])
def test_too_little_memory_to_convert(failure: Exception, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    quantize(small_job(tiny, tmp_path / "whole"))

    def fail(*arguments: object) -> str:
        raise failure

    monkeypatch.setattr("qwenq.io.tensors.write_shard", fail)
    words = ["convert", str(tmp_path / "whole"), str(tmp_path / "out"), "--format", "compressed-tensors"]
    result = run(*words)
    assert result.exit_code == 1 and result.stderr.startswith("error: CPU: out of memory while converting: ")
    assert {path.name for path in tmp_path.iterdir()} == {"whole"}


def test_what_is_a_lack_of_memory() -> None:
    for error in (MemoryError(), RuntimeError(NO_MEMORY), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
                  ImportError("libx.so: failed to map segment from shared object")):  # fmt: skip
        assert out_of_memory(error)
    for other in (ValueError("out of memory"), RuntimeError("shapes differ"), ImportError("no module named x"),
                  ImportError("libx.so: cannot allocate memory in static TLS block")):  # fmt: skip
        assert not out_of_memory(other)


def test_a_lack_of_memory_behind_another_error_is_one() -> None:
    """As torch has it: ending the capture of a graph that ran out of memory fails by itself."""
    lack = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 3221225472 bytes. out of memory")
    monitored = memory_errors("quantizing", torch.device("cpu"), None, "fewer windows")
    with pytest.raises(RunError, match=r"out of memory while quantizing: needs 3\.00 GiB more"), monitored:
        try:
            raise lack
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
