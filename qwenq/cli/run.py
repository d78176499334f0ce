"""`qwenq run`: load a checkpoint across this machine's devices and talk to it."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenq.cli.console import print_json, warn
from qwenq.cli.models import JsonFlag, Model, resolve_model, stored_question
from qwenq.errors import RunError, UsageError
from qwenq.units import format_gb, parse_size, parse_tokens

if TYPE_CHECKING:
    from qwenq.runtime.chat import Chat
    from qwenq.runtime.generate import Sampling, Session
    from qwenq.runtime.load import Loaded, LoadOptions

SMALL_DIFFERENCE = 64 << 20  # between a peak and its prediction: what allocators and libraries do, no error to be told
MaxModelLen = Annotated[
    str, typer.Option("--max-model-len", "-c", help="Context in tokens, prompt and answer, e.g. 16k. Default 4k.")
]
PrefillChunk = Annotated[int, typer.Option("--prefill-chunk", min=1, help="Prompt tokens computed at once.")]
GpuMemory = Annotated[
    str, typer.Option("--gpu-memory", help="Limit per GPU, e.g. 20GiB, or 20GiB,10GiB. Default: what is free.")
]
CpuMemory = Annotated[
    str,
    typer.Option("--cpu-memory", help="Limit of host memory; what is over goes to disk. Default: free."),
]
OffloadDir = Annotated[Path | None, typer.Option("--offload-dir", help="Where layers on disk are kept while it runs.")]
KvDtype = Annotated[str, typer.Option("--kv-cache-dtype", help="auto, bf16, fp16 or fp8.")]
ComputeDtype = Annotated[
    str,
    typer.Option("--compute-dtype", help="bfloat16 (packed kernels) or float32 (exact, slower); auto: bfloat16."),
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens of an answer. Default: at most 512.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="0: always the likeliest token. Default: the model's own setting.")
]
EngineName = Annotated[
    str, typer.Option("--engine", help="qwenq; or gptqmodel or vllm, where installed.")
]  # fmt: skip


def load_options(
    max_model_len: str,
    prefill_chunk: int,
    gpu_memory: str,
    cpu_memory: str,
    offload_dir: Path | None,
    kv_cache_dtype: str,
    compute_dtype: str,
) -> LoadOptions:
    """Options as typed, understood; a QwenqError for what is not."""
    from qwenq.runtime.generate import KV_DTYPES
    from qwenq.runtime.load import LoadOptions

    if kv_cache_dtype not in KV_DTYPES:
        raise UsageError(f"--kv-cache-dtype {kv_cache_dtype}: wanted {', '.join(KV_DTYPES)}")
    if compute_dtype not in ("auto", "bfloat16", "float32"):
        raise UsageError(
            f"--compute-dtype {compute_dtype}: wanted bfloat16, float32 or auto",
            hint="float16 overflows in Qwen2.5's activations",
        )
    if offload_dir is not None and not offload_dir.is_dir():
        raise RunError(f"--offload-dir {offload_dir}: no such directory")
    return LoadOptions(
        max_model_len=parse_tokens(max_model_len) if max_model_len else 0,
        prefill_chunk=prefill_chunk,
        kv_dtype=kv_cache_dtype,
        compute_dtype=compute_dtype,
        gpu_memory=tuple(parse_size(part) for part in gpu_memory.split(",")) if gpu_memory else (),
        cpu_memory=parse_size(cpu_memory) if cpu_memory else 0,
        offload_directory=offload_dir,
    )


def run(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One question; without it a chat.")] = None,
    system: Annotated[str, typer.Option("--system", help="System message of the chat.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a template.")] = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Draw from the likeliest of this share.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    max_model_len: MaxModelLen = "",
    prefill_chunk: PrefillChunk = 2048,
    gpu_memory: GpuMemory = "",
    cpu_memory: CpuMemory = "",
    offload_dir: OffloadDir = None,
    kv_cache_dtype: KvDtype = "auto",
    compute_dtype: ComputeDtype = "auto",
    engine: EngineName = "qwenq",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say where layers would go, what devices would hold, how fast; load none.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Run a checkpoint, weights packed, over the GPUs, host memory and disk of this machine, and talk to it.

    Ends with tokens a second and each device's peak memory beside what was predicted. With --dry-run headers alone are
    read, a hub model's from the hub; exit code 3 when it does not fit.
    """
    from qwenq.checkpoint.reader import open_checkpoint
    from qwenq.runtime.chat import Chat
    from qwenq.runtime.foreign import check_engine
    from qwenq.runtime.generate import Sampling, Session, new_tokens
    from qwenq.runtime.load import describe, loaded

    if dry_run and engine != "qwenq":
        raise UsageError(f"--dry-run is of qwenq's own engine, not {engine}", hint="`qwenq plan --engine`")
    check_engine(engine)
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    Sampling(**{name: value for name, value in asked.items() if value is not None})  # before anything is downloaded
    options = load_options(
        max_model_len, prefill_chunk, gpu_memory, cpu_memory, offload_dir, kv_cache_dtype, compute_dtype
    )
    if prompt == "":
        raise UsageError("--prompt: the prompt is empty", hint="write one, or leave --prompt out for a chat")
    if options.max_model_len and max_new_tokens and max_new_tokens >= options.max_model_len:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in --max-model-len {options.max_model_len}",
            hint=f"at most {options.max_model_len - 1}",
        )
    if dry_run:
        print_forecast(model, options, json)
        return
    if json and prompt is None:
        raise UsageError("--json answers one question", hint="give it with --prompt")
    directory = resolve_model(model)
    checkpoint = open_checkpoint(directory)
    chat = Chat(directory, checkpoint.spec.vocab_size)
    sampling = chat.sampling(**asked)
    if not raw and not chat.has_template:
        warn("the checkpoint has no chat template: the text is continued as it stands")
        raw = True
    ids = _ids(chat, prompt, system, raw) if prompt is not None else None
    own = options.work(checkpoint.spec).context  # checked against the model, for other engines too
    context = own if engine == "qwenq" or options.max_model_len else checkpoint.spec.extended_context
    new_tokens(1 if ids is None else len(ids), sampling.max_new_tokens, context)  # here, not after minutes of loading
    if engine != "qwenq":
        _foreign(engine, directory, chat, ids, sampling, options, json)
        return
    with loaded(checkpoint, options) as found:
        if not json:
            for line in describe(found):
                print(line, file=sys.stderr)
        session = Session(found.model, found.work.context, options.prefill_chunk, options.kv_dtype, chat.stop_ids)
        if ids is not None:
            _answer(found, session, chat, ids, sampling, json)
        else:
            _talk(found, session, chat, sampling, system, raw)


def print_forecast(model: str, options: LoadOptions, json: bool) -> None:
    """What a load of MODEL would come to on this machine."""
    from qwenq.runtime.forecast import forecast

    resolved = stored_question(model, "qwenq").resolve()
    found = forecast(resolved.spec, resolved.weights, options)
    if json:
        print_json(found.to_json())
    else:
        print("\n".join(found.lines()))


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
    timing, tokens = Timing(), []

    def noted() -> Any:
        for token in session.generate(ids, sampling, timing):
            tokens.append(token)
            yield token

    text = ""
    for part in chat.stream(noted(), ids):
        text += part
        if not json:
            print(part, end="", flush=True)
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
                "compute_dtype": str(found.model.dtype)[6:],
                "load_seconds": round(found.seconds, 3),
            }
        )
        return text
    print(flush=True)
    print(
        f"prompt {timing.prompt_tokens} tokens, {timing.prefill_speed:.1f} tokens/s; "
        f"answer {timing.new_tokens} tokens, {timing.decode_speed:.2f} tokens/s",
        file=sys.stderr,
    )
    for row in rows:
        small = abs(row["allocated_bytes"] - row["predicted_bytes"]) < SMALL_DIFFERENCE
        error = f" ({row['error_percent']:+.1f} %)" if row["error_percent"] is not None and not small else ""
        print(
            f"{row['device']}: peak {format_gb(row['allocated_bytes'])}, predicted "
            f"{format_gb(row['predicted_bytes'])}{error}",
            file=sys.stderr,
        )
    return text


def _talk(found: Loaded, session: Session, chat: Chat, sampling: Sampling, system: str, raw: bool) -> None:
    """Turn after turn from stdin; an empty line is skipped, /clear forgets, end of input or /exit ends."""
    messages = [{"role": "system", "content": system}] if system else []
    if sys.stdin.isatty():
        print("a line is a turn; /clear forgets what was said, /exit or Ctrl-D ends", file=sys.stderr)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if not line.strip():
            continue
        if line.strip() == "/clear":
            del messages[1 if system else 0 :]
            continue
        turn = [*messages, {"role": "user", "content": line.strip()}]
        ids = chat.text_ids(line.rstrip("\n")) if raw else chat.prompt_ids(turn)
        try:
            text = _answer(found, session, chat, ids, sampling, False)
        except RunError as error:  # the context is full, say: the model stays loaded
            print(f"error: {error.message}\nhint: {error.hint}; /clear forgets the dialogue", file=sys.stderr)
            continue
        if not raw:
            messages = [*turn, {"role": "assistant", "content": text}]


def _foreign(
    engine: str,
    directory: Path,
    chat: Chat,
    ids: list[int] | None,
    sampling: Sampling,
    options: LoadOptions,
    json: bool,
) -> None:
    from qwenq.runtime.foreign import GptqModelEngine, VllmEngine
    from qwenq.runtime.generate import Timing

    if ids is None:
        raise UsageError(f"--engine {engine} answers one question", hint="give it with --prompt, or use `qwenq serve`")
    length = {"max_model_len": options.max_model_len} if options.max_model_len else {}
    timing = Timing()
    with redirect_stdout(sys.stderr):  # both log to stdout
        loaded: Any = GptqModelEngine(directory) if engine == "gptqmodel" else VllmEngine(directory, **length)
        tokens = list(loaded.generate(ids, sampling, chat.stop_ids, timing))
    text = "".join(chat.stream(tokens, ids))
    if json:
        print_json({"text": text, "token_ids": tokens, "timing": timing.to_json(), "engine": engine})
        return
    print(text)
    speed = timing.new_tokens / timing.decode_seconds if timing.decode_seconds else 0.0
    print(f"{engine}: {timing.new_tokens} tokens, {speed:.2f} tokens/s with the prompt", file=sys.stderr)
