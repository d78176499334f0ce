"""`qwenq serve`: an OpenAI-compatible server, by vLLM where it is installed, else by what `run` loads."""

from __future__ import annotations

import importlib.util
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.api import load_options
from qwenq.cli.console import warn
from qwenq.cli.options import (
    ENGINE,
    JOB,
    MACHINE,
    SERVER,
    CpuMemory,
    FollowLinks,
    GpuMemory,
    JsonFlag,
    KvDtype,
    MaxModelLen,
    Model,
    OffloadDir,
    PrefillChunk,
    RunDtype,
    fetched,
    load_words,
    option,
)
from qwenq.cli.plain import names_in, print_json, print_line, print_step, typed
from qwenq.cli.run import print_forecast, refuse_typed, stored_question
from qwenq.errors import PlanError, RunError, UsageError
from qwenq.io.gguf import gguf_model, is_gguf, split_stem
from qwenq.io.json import model_name

if TYPE_CHECKING:
    from qwenq.planning.engines.base import Engine
    from qwenq.runtime.load import LoadOptions

AUTO = "auto"
_OWN_OPTIONS = ("allowed_hosts", "max_queue", "compute_dtype", "gpu_memory", "cpu_memory", "offload_dir")


def serve(
    context: typer.Context,
    model: Model,
    host: Annotated[str, option(SERVER, "--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option(SERVER, "--port", min=0, max=65535, help="0: any free port.")] = 8000,
    served_model_name: Annotated[
        str,
        option(SERVER, "--served-model-name", help="Model name for clients. Default: that of the directory or file."),
    ] = "",
    api_key: Annotated[
        str, option(SERVER, "--api-key", envvar="QWENQ_API_KEY", help="Key that clients must send.", show_envvar=True)
    ] = "",
    allowed_hosts: Annotated[
        str,
        option(SERVER, "--allowed-hosts", help="Host names to accept besides IP addresses and local names; *: any."),
    ] = "",
    max_queue: Annotated[int, option(SERVER, "--max-queue", min=0, help="Maximum number of waiting requests.")] = 16,
    engine: Annotated[
        str,
        option(
            ENGINE,
            "--engine",
            help="vllm, llama.cpp or qwenq; auto: llama.cpp for GGUF, vLLM with a GPU, if installed; else qwenq.",
        ),
    ] = "auto",
    max_model_len: MaxModelLen = "",
    prefill_chunk: PrefillChunk = 2048,
    kv_cache_dtype: KvDtype = "auto",
    compute_dtype: RunDtype = "auto",
    gpu_memory: GpuMemory = "",
    cpu_memory: CpuMemory = "",
    offload_dir: OffloadDir = None,
    gpu: Annotated[
        str, option(MACHINE, "--gpu", help='vLLM, llama.cpp: the rig, e.g. "2x RTX 3090". Default: this machine.')
    ] = "",
    hosts: Annotated[
        str, option(MACHINE, "--hosts", help="vLLM on several identical hosts, head node first: a,b,c.")
    ] = "",
    dry_run: Annotated[
        bool, option(JOB, "--dry-run", help="Print the engine's commands, or what qwenq's server would load.")
    ] = False,
    follow_links: FollowLinks = False,
    json: JsonFlag = False,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API: /v1/models, /v1/chat/completions, /v1/completions.

    With several hosts, prints vLLM's Ray commands to run on each. With --dry-run, a hub name is planned from its
    headers and nothing is downloaded.
    """
    from qwenq.planning.engines.base import ENGINES

    if json and not dry_run:
        raise UsageError("--json is for --dry-run", hint="leave it out")
    kind = ENGINES.get(engine)
    if engine != AUTO and (kind is None or not kind.started):
        raise UsageError(f"unknown engine {engine!r}", hint=f"{AUTO}, vllm, llama.cpp or qwenq")
    door = _Door(served_model_name, host, port, api_key, allowed_hosts, max_queue)
    chunk = prefill_chunk if typed(context, "prefill_chunk") else 0  # else a server's own
    if _by_llama_cpp(model, kind, hosts):
        refuse_typed(context, _OWN_OPTIONS, "server, and this is llama.cpp's")
        _serve_by_llama_cpp(model, max_model_len, kv_cache_dtype, chunk, gpu, door, dry_run, json)
        return
    here = kind is not None and kind.layered
    if here and (gpu or hosts):
        raise UsageError("--gpu and --hosts are for other servers' commands", hint="--engine vllm, or leave them out")
    installed = importlib.util.find_spec("vllm") is not None
    options = load_options(**load_words(context))
    theirs = installed and _has_gpu() and gguf_model(Path(model)) is None  # vLLM is handed no GGUF
    ours = here or (kind is None and not (gpu or hosts) and not theirs)
    if not ours:
        refuse_typed(context, _OWN_OPTIONS, "server, and this is vLLM's")
    if not door.name:
        place = Path(model)
        named = model_name(place.resolve()) if place.is_dir() else split_stem(place) if is_gguf(place) else model
        door = replace(door, name=named)
    leads = names_in(hosts)
    if dry_run and ours:
        print_forecast(model, options, json)
        return
    options = options if ours else replace(options, prefill_chunk=chunk)
    if dry_run or len(leads) > 1:  # nothing is started here, so nothing is downloaded
        lines = vllm_commands(model, options, gpu, leads, door)
        door.warn_of_key("VLLM_API_KEY")
        text = "\n".join(lines)
        if json:
            print_json({"engine": "vllm", "command": text})
        else:
            print_line(text)
        return
    if ours:
        _serve_here(model, options, door)
        return
    if not installed:
        raise RunError("--engine vllm: not installed", hint="pip install 'qwenq[vllm]', or --engine qwenq")
    lines = vllm_commands(str(fetched(model)), options, gpu, leads, door)
    print_step(lines[0])
    environment = os.environ | ({"VLLM_API_KEY": api_key} if api_key else {})
    words = shlex.split(lines[0])
    if "=" in words[0]:  # as a shell would take it
        variable, _, value = words.pop(0).partition("=")
        environment[variable] = value
    os.execvpe(words[0], words, environment)


@dataclass(frozen=True)
class _Door:
    """Address, key and model name for clients."""

    name: str  # empty: after the file
    host: str
    port: int
    api_key: str
    allowed_hosts: str
    max_queue: int

    def warn_of_key(self, variable: str) -> None:
        """Say that commands which are only printed do not carry the key."""
        if self.api_key:
            warn(f"the commands below do not contain the key: set {variable} where you run them")


def _by_llama_cpp(model: str, kind: type[Engine] | None, hosts: str) -> bool:
    """Whether llama.cpp is asked for, or is the one for a GGUF file where no engine was named."""
    from qwenq.runtime.llamacpp import has_server

    if kind is not None:
        if kind.needs_gguf and hosts:
            raise UsageError("--hosts is for vLLM's commands", hint="--engine vllm, or leave it out")
        return kind.needs_gguf
    return not hosts and gguf_model(Path(model)) is not None and has_server()


def _serve_by_llama_cpp(
    model: str, context: str, kv_dtype: str, ubatch: int, gpu: str, door: _Door, dry_run: bool, json: bool
) -> None:
    """Start llama-server with the plan's flags; with `dry_run` print its command and Ollama's Modelfile."""
    from qwenq.runtime.llamacpp import find_server, serving
    from qwenq.units import parse_tokens

    program = "" if dry_run else find_server()
    planned = serving(model, parse_tokens(context) if context else 0, kv_dtype, ubatch, gpu)
    name = door.name or split_stem(planned.file)
    words = [*planned.words, "--alias", name, "--host", door.host, "--port", str(door.port)]
    for line in planned.notes:
        warn(line)
    if dry_run:
        door.warn_of_key("LLAMA_API_KEY")
        command = planned.setting + shlex.join(words)
        if json:
            print_json({"engine": "llama.cpp", "command": command, "modelfile": planned.modelfile})
            return
        lines = [command, "", "# Modelfile, for `ollama create NAME -f Modelfile`"]
        print_line("\n".join([*lines, planned.modelfile]))
        return
    print_step(planned.setting + shlex.join(words))
    os.execvpe(program, words, planned.environment | ({"LLAMA_API_KEY": door.api_key} if door.api_key else {}))


def vllm_commands(model: str, options: LoadOptions, gpu: str, hosts: list[str], door: _Door) -> list[str]:
    """`vllm serve ...` with the plan's flags; for several hosts Ray's commands before it. HonestNo if nothing fits."""
    from qwenq.planning.engines.base import ServerEngine, pci_order
    from qwenq.planning.engines.vllm import ray_commands
    from qwenq.planning.plan import make_plan
    from qwenq.planning.rig import detect_rig, parse_rig

    try:
        one = parse_rig(gpu) if gpu else detect_rig()
    except PlanError as error:
        if gpu:
            raise
        raise PlanError(
            f"vLLM's flags depend on the rig, and none was found: {error.message}",
            hint='name the rig with --gpu "2x RTX 3090", or take --engine qwenq',
        ) from None
    count = max(1, len(hosts))
    rig = replace(one, gpus=one.gpus * count, free_bytes=one.free_bytes * count)
    asked = stored_question(
        model, "vllm", kv_cache_dtype=options.kv_dtype, prefill_chunk=options.prefill_chunk, rig=rig
    ).resolve()
    case, engine = asked.at(options.max_model_len or min(4096, asked.spec.max_position_embeddings)), asked.engine
    assert isinstance(engine, ServerEngine)
    words = engine.plan_words(make_plan(case), model, hosts=count)
    words += ["--served-model-name", door.name, "--host", door.host, "--port", str(door.port)]
    return ray_commands(words, hosts) if count > 1 else [pci_order(case) + shlex.join(words)]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _serve_here(model: str, options: LoadOptions, door: _Door) -> None:
    try:
        from qwenq.io.http import Line, Server, address_of, is_loopback, listen
        from qwenq.runtime.server import Service, make_app
    except ImportError as error:
        raise RunError(f"the server needs {error.name}", hint="pip install 'qwenq[page]'") from None
    from qwenq.checkpoint.reader import open_checkpoint
    from qwenq.runtime.chat import Chat
    from qwenq.runtime.load import describe, loaded

    directory = fetched(model)
    checkpoint = open_checkpoint(directory)
    for line in checkpoint.notes:
        warn(line)
    chat = Chat(directory, checkpoint.spec.vocab_size)
    with listen(door.host, door.port) as bound, loaded(checkpoint, options) as found:
        for line in describe(found):
            print_step(line)
        session = found.session(chat.stop_ids)
        print_step(f"tokens by {session.decoding}")
        service = Service(session, chat, door.name, Line(door.max_queue), door.api_key)
        print_line(f"{address_of(bound, door.host)}/v1")
        print_step("Ctrl-C stops it")
        if not door.api_key and not is_loopback(door.host):
            warn(f"{door.host} is reachable from other machines without an --api-key: anyone who reaches it can use it")
        Server(make_app(service, names_in(door.allowed_hosts)), service.closing.set).run(sockets=[bound])
