"""`qwenq run`: load a checkpoint across this machine's devices and talk to it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenq.api import load_options
from qwenq.cli.console import warn
from qwenq.cli.options import (
    ANSWER,
    ENGINE,
    JOB,
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
    warn_of_shipped,
)
from qwenq.cli.plain import print_json, print_line, print_step, typed
from qwenq.errors import RunError, UsageError
from qwenq.pipeline.config import flag
from qwenq.pipeline.source import no_checkpoint
from qwenq.units import format_gb

if TYPE_CHECKING:
    from qwenq.planning.questions import Question
    from qwenq.runtime.chat import Chat
    from qwenq.runtime.foreign import ForeignEngine
    from qwenq.runtime.generate import Sampling, Session
    from qwenq.runtime.load import Loaded, LoadOptions

_OWN_OPTIONS = ("prefill_chunk", "compute_dtype", "gpu_memory", "cpu_memory", "offload_dir")
SMALL_DIFFERENCE = 64 << 20  # between a peak and its prediction: what allocators and libraries do, no error to be told
MaxNewTokens = Annotated[
    int | None,
    option(ANSWER, "--max-new-tokens", "-n", min=1, help="Maximum answer tokens. Default: the model's; else 512."),
]
Temperature = Annotated[
    float | None,
    option(
        ANSWER,
        "--temperature",
        help="0: always the likeliest token. Default: the model's; else 0, or 1 with --top-p or --top-k.",
    ),
]
EngineName = Annotated[str, option(ENGINE, "--engine", help="qwenq; or gptqmodel, vllm or llama.cpp if installed.")]


def run(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str | None, option(ANSWER, "--prompt", "-p", help="One prompt; without it, a chat.")] = None,
    system: Annotated[str, option(ANSWER, "--system", help="System message for the chat.")] = "",
    raw: Annotated[bool, option(ANSWER, "--raw", help="Continue the text as is, without a template.")] = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: Annotated[float | None, option(ANSWER, "--top-p", help="Nucleus sampling threshold.")] = None,
    top_k: Annotated[
        int | None, option(ANSWER, "--top-k", min=-1, help="Sample from this many likeliest tokens; 0 or -1: all.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, option(ANSWER, "--repetition-penalty", help="Penalty for tokens already in the text; 1: none.")
    ] = None,
    seed: Annotated[int, option(ANSWER, "--seed", help="Sampling seed.")] = 0,
    max_model_len: MaxModelLen = "",
    prefill_chunk: PrefillChunk = 2048,
    kv_cache_dtype: KvDtype = "auto",
    compute_dtype: RunDtype = "auto",
    engine: EngineName = "qwenq",
    gpu_memory: GpuMemory = "",
    cpu_memory: CpuMemory = "",
    offload_dir: OffloadDir = None,
    dry_run: Annotated[
        bool,
        option(JOB, "--dry-run", help="Print placement, memory per device and expected speed; load nothing."),
    ] = False,
    follow_links: FollowLinks = False,
    json: JsonFlag = False,
) -> None:
    """Run a checkpoint with packed weights on this machine's GPUs, host memory and disk, and chat with it.

    Ends with tokens per second and each device's peak memory compared with the prediction. --dry-run reads only headers
    (from the hub for a hub model), and exits with 3 if the model does not fit.
    """
    from qwenq.checkpoint.reader import open_checkpoint
    from qwenq.runtime.chat import Chat
    from qwenq.runtime.foreign import foreign_engine
    from qwenq.runtime.generate import Sampling, new_tokens
    from qwenq.runtime.load import describe, loaded

    foreign = foreign_engine(engine)
    if foreign is not None:
        _check_foreign(context, engine, foreign)
    asked: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
        "top_k": None if top_k is None else max(0, top_k), "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    Sampling(**{name: value for name, value in asked.items() if value is not None})  # before anything is downloaded
    words = load_words(context)
    if foreign is not None and foreign.own_kv:
        del words["kv_cache_dtype"]
    options = load_options(**words)
    if prompt == "":
        raise UsageError("--prompt: the prompt is empty", hint="write one, or leave --prompt out for a chat")
    if options.max_model_len and max_new_tokens and max_new_tokens >= options.max_model_len:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in --context {options.max_model_len}",
            hint=f"at most {options.max_model_len - 1}",
        )
    if dry_run:
        print_forecast(model, options, json)
        return
    if system and raw:
        raise UsageError("--system needs a chat template, and --raw does not use one", hint="leave one of them out")
    if json and prompt is None:
        raise UsageError("--json needs a prompt", hint="give it with --prompt")
    if prompt is None and sys.stdin is None:
        raise UsageError("a chat reads stdin, which is closed", hint="ask one question with --prompt")
    if foreign is not None and prompt is None:
        raise UsageError(f"--engine {engine} needs a prompt", hint="give it with --prompt, or use `qwenq serve`")
    directory = fetched(model)
    checkpoint = open_checkpoint(directory)
    for line in checkpoint.notes:
        warn(line)
    chat = Chat(directory, checkpoint.spec.vocab_size)
    sampling = chat.sampling(**asked)
    if not raw and not chat.has_template:
        if system:
            raise UsageError("--system needs a chat template, and the checkpoint has none", hint="leave it out")
        warn("the checkpoint has no chat template: the text is continued as is")
        raw = True
    ids = _ids(chat, prompt, system, raw) if prompt is not None else None
    own = options.work(checkpoint.spec).context  # checked against the model, for other engines too
    room = own if foreign is None or options.max_model_len else checkpoint.spec.extended_context
    limit = new_tokens(1 if ids is None else len(ids), sampling, room)  # here, not after minutes of loading
    if foreign is not None:
        assert ids is not None
        with redirect_stdout(sys.stderr):  # all of them log to stdout
            answering = foreign(directory, options.max_model_len, kv_cache_dtype)
        with closing(answering):
            _answer_foreign(answering, chat, ids, replace(sampling, max_new_tokens=limit), json)
        return
    with loaded(checkpoint, options) as found:
        if not json:
            for line in describe(found):
                print_step(line)
        session = found.session(chat.stop_ids)
        if ids is not None:
            _answer(found, session, chat, ids, sampling, json)
        else:
            _talk(found, session, chat, sampling, system, raw)


def _check_foreign(context: typer.Context, engine: str, foreign: type[ForeignEngine]) -> None:
    """UsageError for options that another engine is not told of; RunError where not installed."""
    if context.params["dry_run"]:
        raise UsageError(
            f"--dry-run is for qwenq's own engine, not {engine}",
            hint=f"`qwenq plan`, or `qwenq serve --dry-run`, with --engine {engine}",
        )
    refuse_typed(context, _OWN_OPTIONS, f"engine, not {engine}")
    foreign.check_installed()
    if not foreign.own_kv and context.params["kv_cache_dtype"] != "auto":
        raise UsageError(f"`run` does not pass --kv-cache-dtype to {engine}", hint="`qwenq serve` passes it to vLLM")


def refuse_typed(context: typer.Context, names: Iterable[str], whose: str) -> None:
    """UsageError for an option of our own engine or server that another one would not be told of."""
    for name in names:
        if typed(context, name):
            raise UsageError(f"{flag(name)} is for qwenq's own {whose}", hint="--engine qwenq, or leave it out")


def stored_question(model: str, engine: str, **asked: Any) -> Question:
    """A question to the planner about a checkpoint as it is stored, downloading nothing.

    Headers of a directory or GGUF file, or of the hub; a shipped model's hub name stands for the shipped shapes, in
    16 bits unless it says otherwise.
    """
    from qwenq.io.gguf import gguf_model
    from qwenq.io.hub import is_hub_name
    from qwenq.planning.models import load_model
    from qwenq.planning.questions import Question

    if os.path.isdir(model) or gguf_model(Path(model)) is not None:
        return Question(model, checkpoint=Path(model), engine=engine, **asked)
    if not is_hub_name(model):
        raise no_checkpoint(model)
    found = load_model(model)
    if not found.hub:
        warn_of_shipped(model)
    bits = None if found.hub or found.published else 16
    return Question(model, bits=bits, engine=engine, **asked)


def print_forecast(model: str, options: LoadOptions, json: bool) -> None:
    """Print the forecast of loading MODEL on this machine."""
    from qwenq.runtime.forecast import forecast

    resolved = stored_question(model, "qwenq").resolve()
    found = forecast(resolved.spec, resolved.weights, options)
    if json:
        print_json(found.to_json())
    else:
        print_line("\n".join(found.lines()))


def _ids(chat: Chat, prompt: str, system: str, raw: bool) -> list[int]:
    if raw:
        return chat.text_ids(prompt)
    first = [{"role": "system", "content": system}] if system else []
    return chat.prompt_ids([*first, {"role": "user", "content": prompt}])


def _answer(found: Loaded, session: Session, chat: Chat, ids: list[int], sampling: Sampling, json: bool) -> str:
    from qwenq.runtime.generate import Timing
    from qwenq.runtime.peaks import forget_peaks, read_peaks

    devices = found.model.devices
    forget_peaks(devices)
    timing, tokens, text = Timing(), list[int](), ""
    made = session.generate(ids, sampling, timing, listen=lambda token, logits_V: tokens.append(token))
    for part in chat.stream(made, ids):
        text += part
        if not json:
            print_line(part, end="")
    rows = found.beside_prediction(read_peaks(devices, found.base_rss))
    if json:
        print_json(
            {
                "text": text,
                "token_ids": tokens,
                "timing": timing.to_json(),
                "peaks": rows,
                "plan": found.plan.to_json(),
                "kernels": found.model.kernels(),
                "fallbacks": found.model.fallbacks(),
                "decoding": session.decoding,
                "compute_dtype": str(found.model.dtype)[6:],
                "load_seconds": round(found.seconds, 3),
            }
        )
        return text
    print_line()
    print_step(
        f"prompt {timing.prompt_tokens} tokens, {timing.prefill_speed:.1f} tokens/s; "
        f"answer {timing.new_tokens} tokens, {timing.decode_speed:.2f} tokens/s, by {session.decoding}",
    )
    for row in rows:
        small = abs(row["allocated_bytes"] - row["predicted_bytes"]) < SMALL_DIFFERENCE
        error = f" ({row['error_percent']:+.1f} %)" if row["error_percent"] is not None and not small else ""
        print_step(
            f"{row['device']}: peak {format_gb(row['allocated_bytes'])}, predicted "
            f"{format_gb(row['predicted_bytes'])}{error}",
        )
    return text


def _talk(found: Loaded, session: Session, chat: Chat, sampling: Sampling, system: str, raw: bool) -> None:
    """Turn after turn from stdin; an empty line is skipped, /clear forgets, end of input or /exit ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # whatever the locale: a bad line is refused below
    messages = [{"role": "system", "content": system}] if system else []
    if sys.stdin.isatty():
        print_step("each line is one turn; /clear forgets the chat, /exit or Ctrl-D ends it")
    while True:
        if sys.stdin.isatty():
            print_step("> ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if not line.strip():
            continue
        if line.strip() == "/clear":
            del messages[1 if system else 0 :]
            continue
        if not line.isascii() and any("\ud800" <= letter <= "\udfff" for letter in line):
            print_step("error: the line is not UTF-8 text\nhint: set the terminal to UTF-8; the line was left out")
            continue
        turn = [*messages, {"role": "user", "content": line.strip()}]
        ids = chat.text_ids(line.rstrip("\n")) if raw else chat.prompt_ids(turn)
        try:
            text = _answer(found, session, chat, ids, sampling, False)
        except RunError as error:  # the context is full, say: the model stays loaded
            print_step(f"error: {error.message}\nhint: {error.hint}; /clear forgets the chat")
            continue
        if not raw:
            messages = [*turn, {"role": "assistant", "content": text}]


def _answer_foreign(engine: ForeignEngine, chat: Chat, ids: list[int], sampling: Sampling, json: bool) -> None:
    from qwenq.runtime.generate import Timing

    for line in engine.notes:
        warn(line)
    timing = Timing()
    with redirect_stdout(sys.stderr):
        tokens = list(engine.generate(ids, sampling, chat.stop_ids, timing))
    text = "".join(chat.stream(tokens, ids))
    if json:
        print_json({"text": text, "token_ids": tokens, "timing": timing.to_json(), "engine": engine.name})
        return
    print_line(text)
    if timing.prefill_seconds:  # it tells them apart
        prompt = f"prompt {timing.prompt_tokens} tokens, {timing.prefill_speed:.1f} tokens/s; "
        print_step(f"{engine.name}: {prompt}answer {timing.new_tokens} tokens, {timing.decode_speed:.2f} tokens/s")
        return
    speed = timing.new_tokens / timing.decode_seconds if timing.decode_seconds else 0.0
    print_step(f"{engine.name}: {timing.new_tokens} tokens, {speed:.2f} tokens/s with the prompt")
