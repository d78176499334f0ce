"""The Python API: what the commands do, as functions that return objects. Re-exported by `qwenq`, imported lazily.

Errors are those of `qwenq.errors`, one line and a hint; messages name options as the command line spells them. Nothing
is printed: long calls take a `progress` callback. Importing this imports no torch, and neither do the calls about
planning: `estimate`, `plan`, `inspect`, and `dry_run` of a model whose tokenizer is not on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from qwenq.errors import CheckpointError, JobError, RunError, UsageError
from qwenq.io.gguf import gguf_model, is_gguf
from qwenq.io.json import followed_links, shown
from qwenq.pipeline.config import (
    DEFAULT_EVALUATION_WINDOWS,
    EvaluateConfig,
    QuantizeConfig,
    check_format,
    pick_compute_dtype,
    pick_device,
)
from qwenq.pipeline.source import model_directory

if TYPE_CHECKING:
    from qwenq.checkpoint.manifest import Verification
    from qwenq.model.spec import ModelSpec
    from qwenq.pipeline.convert import Converted
    from qwenq.pipeline.dryrun import DryRun
    from qwenq.pipeline.job import QuantizeResult
    from qwenq.pipeline.ranks import Ranks
    from qwenq.pipeline.reference_logits import SavedLogits
    from qwenq.planning.audit import Audit
    from qwenq.planning.plan import Plan, Recommendation
    from qwenq.planning.questions import Question, Spread
    from qwenq.planning.sensitivity import Sensitivity
    from qwenq.results import BlockResult, DriftReport
    from qwenq.runtime.generate import Session, Timing
    from qwenq.runtime.load import Loaded, LoadOptions

StrPath = str | Path
Message = dict[str, str]  # role, content


def _nothing(*events: object) -> None:
    pass


# ---------------------------------------------------------------------- quantize


class QuantizeOptions(TypedDict, total=False):
    """Options of `quantize` by name: those of QuantizeConfig, which has their meanings and defaults."""

    bits: int | None
    group_size: int | None
    format: str
    gguf_type: str | None
    split_size: str | None
    asymmetric: bool | None
    target_size: str | None
    bpw: str | None
    fit: str | None
    context: str | None
    engine: str | None
    recipe: Path | None
    sensitivity: Path | None
    rotate: bool | None
    pad_for_tp: int | None
    calibration: str
    num_samples: int | None
    builtin_share: float | None
    sequence_length: int
    seed: int
    eval_text: str
    eval_samples: int | None
    strict: bool
    method: str | None
    damp_percent: float | None
    fold: bool
    error_correction: float | None
    error_correction_share: float
    sink_weight: float
    save_imatrix: Path | None
    device: str
    dtype: str
    compute_dtype: str
    calibration_dtype: str


def quantize(
    model: StrPath,
    out: StrPath,
    config: QuantizeConfig | None = None,
    *,
    resume: bool = False,
    progress: Callable[[BlockResult | str], None] = _nothing,
    warn: Callable[[str], None] = _nothing,
    ranks: Ranks | None = None,
    **options: Unpack[QuantizeOptions],
) -> QuantizeResult:
    """Quantize a 16-bit model, layer by layer, into the directory `out`, and measure the divergence on held-out text.

    model: a directory or a hub name. config: options; those given by name take precedence. resume: go on with a stopped
    job, whose options must be the same. progress: gets a line of text at each step and a BlockResult for each finished
    layer. warn: gets a line before the work begins for each thing that is read otherwise than config.json says, or left
    out of the model or a text; those of the work are in the result. ranks: this process among those that quantize
    together (`qwenq.pipeline.ranks.joined`), the first of which writes. Returns sizes in bytes, times in seconds, KL in
    nats per token. Raises QwenqError: PlanError and UsageError for options, CheckpointError for the model,
    CalibrationError for texts, JobError for `out`.
    """
    from qwenq.pipeline.prepare import check_asked, prepare
    from qwenq.pipeline.quantize import quantize as run
    from qwenq.pipeline.ranks import ALONE

    ranks = ranks or ALONE
    settings = replace(config or QuantizeConfig(), **_with_paths(options))
    settings.refuse_idle(options.keys())
    check_asked(str(model), settings, Path(out), resume=resume, ranks=ranks)
    directory = model_directory(str(model), progress)
    prepared = prepare(directory, Path(out), settings, resume=resume, listen=progress, ranks=ranks)
    for line in prepared.notes:
        warn(line)
    if prepared.calibrates:
        progress(prepared.calibrates)
    job = prepared.measured(resume=resume, listen=progress, ranks=ranks).job
    return run(job, resume=resume, listen=progress, ranks=ranks)


def dry_run(
    model: StrPath,
    out: StrPath | None = None,
    config: QuantizeConfig | None = None,
    *,
    ranks: int = 1,
    network: str = "",
    **options: Unpack[QuantizeOptions],
) -> DryRun:
    """Sizes to the byte, predicted peaks and disk of `quantize` with the same arguments. Bytes.

    model: a family's name ("Qwen2.5-72B") too, in BF16. out: the directory whose disk is asked, which
    `preflight.check_disk(out)` of the result refuses where it is too small; without it the current one's, and a
    warning. Whether something is there already is not asked. ranks: that would share the work, each with the memory
    told. network: between them (10gbps), to say how long their sums take. Raises QwenqError for options, models and
    texts that `quantize` would refuse.
    """
    from qwenq.pipeline.dryrun import dry_run as run

    settings = replace(config or QuantizeConfig(), **_with_paths(options))
    settings.refuse_idle(options.keys())
    return run(str(model), settings, None if out is None else Path(out), ranks=ranks, network=network)


def sensitivity(
    model: StrPath,
    output: StrPath | None = None,
    config: QuantizeConfig | None = None,
    *,
    progress: Callable[[str], None] = _nothing,
    warn: Callable[[str], None] = _nothing,
    ranks: Ranks | None = None,
    **options: Unpack[QuantizeOptions],
) -> Sensitivity:
    """Measure the KL (nats per token) that each fused group of a model causes at each scheme, and write it to `output`.

    Of the options only `calibration`, `num_samples`, `builtin_share`, `sequence_length`, `strict`, `seed`, `format`,
    `asymmetric`, `rotate`, `device` (one GPU) and `compute_dtype` count: the table is that of `quantize` with the same
    ones. Hidden states lie on the disk of `output`, or of the current directory, meanwhile, in files without a name.
    progress: gets a line of text at each step. warn: gets a line for each thing that is read otherwise than config.json
    says, or left out of the text. ranks: this process among those that measure together
    (`qwenq.pipeline.ranks.joined`); the first one writes. Raises QwenqError.
    """
    from qwenq.checkpoint.reader import open_source
    from qwenq.io.durable import write_bytes
    from qwenq.pipeline.config import check_rotatable
    from qwenq.pipeline.fisher import measure_sensitivity, split_windows
    from qwenq.pipeline.job import DTYPES, builtin_lacks
    from qwenq.pipeline.preflight import refuse_existing
    from qwenq.pipeline.prepare import read_calibration
    from qwenq.pipeline.ranks import ALONE
    from qwenq.planning.sensitivity import encode_sensitivity
    from qwenq.text.calibration import check_text
    from qwenq.text.tokens import ModelTokenizer

    settings = replace(config or QuantizeConfig(), **_with_paths(options))
    ranks = ranks or ALONE
    path = None if output is None or not ranks.first else Path(output)
    if path is not None:
        refuse_existing(path)
    check_text(settings.calibration)
    scratch = ranks.scratch(Path.cwd() if path is None else path.absolute().parent)
    if not scratch.is_dir():
        raise JobError(f"{scratch}: no such directory", hint="make it, or choose another --output")
    source = open_source(model_directory(str(model), progress))
    if settings.rotate:
        check_rotatable(source.spec)
        source = source.rotated()
    windows = read_calibration(settings, source, ModelTokenizer(source.directory))
    for line in filter(None, (*source.notes, windows.left_out, builtin_lacks(settings, windows))):
        warn(line)
    asked = {"source": source.sampled(), "text": windows.to_json(), "options": settings.same_everywhere()}
    ranks.refuse_others("command", asked)
    device = pick_device(settings.device, several=False)
    found = measure_sensitivity(
        source,
        split_windows(windows, seed=settings.seed, asymmetric=bool(settings.asymmetric), format=settings.format),
        compute_dtype=DTYPES[pick_compute_dtype(settings.compute_dtype, device)],
        device=device,
        scratch=scratch,
        listen=progress,
        ranks=ranks,
    )
    if path is not None:
        write_bytes(path, encode_sensitivity(found))
    return found


def _with_paths(options: QuantizeOptions | PlanOptions) -> dict[str, Any]:
    """Options with text where a path is wanted made one."""
    given: dict[str, Any] = dict(options)
    for name in ("recipe", "sensitivity", "save_imatrix", "checkpoint", "profile"):
        if isinstance(given.get(name), str):
            given[name] = Path(given[name])
    return given


# ---------------------------------------------------------------------- evaluate, verify, convert


class EvaluateOptions(TypedDict, total=False):
    """Options of `evaluate` by name: those of EvaluateConfig, which has their meanings and defaults."""

    text: str
    num_samples: int | None
    sequence_length: int
    device: str
    compute_dtype: str
    strict: bool


def evaluate(
    model: StrPath,
    reference: StrPath,
    *,
    save_reference_logits: StrPath | SavedLogits | None = None,
    progress: Callable[[int, int], None] = _nothing,
    warn: Callable[[str], None] = _nothing,
    ranks: Ranks | None = None,
    **options: Unpack[EvaluateOptions],
) -> DriftReport:
    """KL divergence, perplexity and top-1 agreement of a checkpoint against another, both streamed layer by layer.

    model, reference: directories, GGUF files or hub names, 16-bit or quantized. progress: gets the layers done and
    their number. save_reference_logits: a file to write for `llama-perplexity --kl-divergence`, about 300 kB a
    position of a Qwen2.5. warn: gets a line for each thing that is read otherwise than a config.json says or left
    out of a text, and where the model's own tokenizer makes other tokens of that. KL in nats per token, with 95 %
    confidence intervals. ranks: this process among those that evaluate together (`qwenq.pipeline.ranks.joined`).
    Hidden states of more than 6 GiB lie in the current directory meanwhile, in files without a name. Raises
    CheckpointError where the two cannot be compared.
    """
    from qwenq.checkpoint.reader import open_checkpoint
    from qwenq.pipeline.evaluate import check_comparable, split_otherwise
    from qwenq.pipeline.evaluate import evaluate as run
    from qwenq.pipeline.job import DTYPES
    from qwenq.pipeline.ranks import ALONE
    from qwenq.pipeline.reference_logits import SavedLogits
    from qwenq.pipeline.shares import refuse_few
    from qwenq.text.calibration import load_windows
    from qwenq.text.tokens import ModelTokenizer

    config = EvaluateConfig(**options)
    saved = save_reference_logits
    checkpoint = open_checkpoint(model_directory(str(model)))
    base = open_checkpoint(model_directory(str(reference)))
    for line in dict.fromkeys((*checkpoint.notes, *base.notes)):
        warn(line)
    check_comparable(checkpoint, base)
    windows = load_windows(
        config.text, ModelTokenizer(base.directory), base.spec, length=config.sequence_length,
        count=config.num_samples, seed=None, up_to=DEFAULT_EVALUATION_WINDOWS,
        strict=config.strict,
    )  # fmt: skip
    for line in filter(None, (windows.left_out, split_otherwise(checkpoint, base, windows))):
        warn(line)
    ranks = ranks or ALONE
    full = base.quantized is None and saved is None  # what is far smaller or is read elsewhere has to be exact
    bits = checkpoint.recipe.uniform_bits(checkpoint.spec) if full else math.inf
    dtype = pick_compute_dtype(config.compute_dtype, device := pick_device(config.device), bits)
    asked = {"checkpoint": checkpoint.sampled(), "reference": base.sampled(), "text": windows.to_json()}
    ranks.refuse_others("command", asked | {"--compute-dtype": dtype})
    refuse_few(ranks.size, evaluation=len(windows.ids))
    layers = base.spec.num_hidden_layers
    return run(
        checkpoint,
        base,
        windows,
        compute_dtype=DTYPES[dtype],
        devices=device.split(","),
        listen=lambda layer: progress(layer + 1, layers),
        saved=SavedLogits(Path(saved)) if isinstance(saved, str | Path) else saved,
        ranks=ranks,
        scratch=ranks.scratch(Path.cwd()),
    )


def verify(
    checkpoint: StrPath,
    source: StrPath | None = None,
    *,
    layers: Sequence[int] | str | None = None,
    calibration: str | None = None,
    progress: Callable[[str], None] = _nothing,
) -> Verification:
    """Check a checkpoint's files against its manifest; with `source`, that too, and make some layers again from it.

    source: the directory of the 16-bit checkpoint. layers: numbers of those to make again, which must give the same
    bytes; "all"; an empty list for none; None for the first, a middle and the last one. calibration: the calibration
    file where the manifest names one that is no set. `findings` of the result has everything that is not as it was
    written. Raises CheckpointError where there is no manifest.
    """
    from qwenq.checkpoint.manifest import read_manifest, refuse_converted
    from qwenq.checkpoint.manifest import verify as run

    path, base = Path(checkpoint), None if source is None else Path(source)
    directory = path.parent if is_gguf(path) else path
    for place in (directory, base):
        if place is not None and not place.is_dir():
            missing = "a file, wanted a checkpoint's directory" if place.exists() else "no such directory"
            raise CheckpointError(f"{shown(str(place))}: {missing}")
    if isinstance(layers, str) and layers != "all":
        raise UsageError(f"layers is {layers!r}", hint='numbers from 0 on, or "all"')
    if base is None and (layers or calibration):
        raise UsageError(f"{'layers' if layers else 'calibration'} goes with source: layers are made again from it")
    recomputed = base is not None and (layers is None or len(layers) > 0)
    if recomputed:
        refuse_converted(directory)
    result = run(directory, base)
    if base is None or not recomputed or result.findings:
        return result
    from qwenq.pipeline.reproduce import reproduce

    manifest, _ = read_manifest(directory)
    wanted = result.layers_not_made_again if isinstance(layers, str) else layers
    again, findings = reproduce(directory, base, manifest, wanted, calibration=calibration, listen=progress)
    left = tuple(layer for layer in result.layers_not_made_again if layer not in again)
    return replace(result, layers_made_again=again, layers_not_made_again=left, findings=tuple(findings))


def convert(
    checkpoint: StrPath,
    out: StrPath,
    format: str,
    *,
    progress: Callable[[int], None] = _nothing,
    warn: Callable[[str], None] = _nothing,
) -> Converted:
    """Store a quantized checkpoint's codes in another format at `out`, bit for bit: nothing is solved or rounded.

    format: one of integer codes: gptq, awq, compressed-tensors, gguf. progress: gets the number of each finished file.
    warn: gets a line for each thing that is read otherwise than config.json says. Raises PlanError where the format
    cannot hold the codes.
    """
    check_format(format)

    from qwenq.checkpoint.reader import open_checkpoint
    from qwenq.pipeline.convert import convert as run

    path = Path(checkpoint)
    source = open_checkpoint(gguf_model(path) or path)
    for line in source.notes:
        warn(line)
    return run(source, Path(out), format, listen=progress)


# ---------------------------------------------------------------------- planning


class PlanOptions(TypedDict, total=False):
    """Options of `estimate` and `plan` by name, as `qwenq vram` and `qwenq plan` take them."""

    bits: int | None
    group_size: int | None
    format: str
    target_size: str | None
    recipe: Path | None
    checkpoint: Path | None
    pad_for_tp: int | None
    kv_cache_dtype: str
    batch_size: int
    engine: str
    engine_version: str
    prefill_chunk: int
    reserve: str
    tensor_parallel_size: int
    max_num_seqs: int
    gpu_memory_utilization: float | None
    enforce_eager: bool
    ram: str
    expect_params: str | None
    profile: Path | None


Context = int | str | Sequence[int | str] | None  # tokens: 8192, "8k", "1k,8k", [1024, "8k"]


def estimate(model: StrPath, gpu: str | None = None, context: Context = None, **options: Unpack[PlanOptions]) -> Spread:
    """Memory of a model against context, for each GPU, each term with its provenance. Bytes.

    model: a family's name ("Qwen2.5-72B"), a directory or a hub name, of which headers alone are read. gpu: a rig, "2x
    RTX 3090"; without one a single notional GPU. context: tokens, one or several. Raises PlanError for what is unknown.
    """
    from qwenq.planning.questions import contexts_of, spread

    asked = _question(model, gpu, options).resolve()
    return spread(asked, contexts_of(asked, _context(context)))


def plan(
    model: StrPath, gpu: str | None = None, context: int | str | None = None, **options: Unpack[PlanOptions]
) -> Plan:
    """Placement of a model on a rig: whether it fits, its speed and the largest context. Bytes, tokens/s.

    gpu: a rig, "2x RTX 3090"; without one this machine's GPUs and their free memory. context: tokens; 8k by default, or
    as far as the model goes. What does not fit is answered, not raised: `fits` is False. Raises PlanError for what is
    unknown.
    """
    from qwenq.planning.plan import make_plan
    from qwenq.planning.questions import context_of
    from qwenq.planning.rig import detect_rig

    question = _question(model, gpu, options)
    asked = (question if gpu is not None else replace(question, rig=detect_rig())).resolve()
    return make_plan(asked.at(context_of(asked, _context(context))))


def recommend(
    model: StrPath, context: int | str | None = None, **options: Unpack[PlanOptions]
) -> tuple[Recommendation, ...]:
    """Rigs of up to 8 equal GPUs that hold a model at a context: fewest cards first, then by price and power."""
    from qwenq.planning.plan import recommend as run
    from qwenq.planning.questions import context_of

    asked = _question(model, None, options).resolve()
    return run(asked.at(context_of(asked, _context(context))))


def _question(model: StrPath, gpu: str | None, options: PlanOptions) -> Question:
    from qwenq.planning.questions import Question

    return Question(str(model), gpu=gpu, **_with_paths(options))


def _context(context: Context) -> str:
    if context is None:
        return ""
    return str(context) if isinstance(context, int | str) else ",".join(map(str, context))


@dataclass(frozen=True)
class Inspection:
    """A model's shapes and the audit of its files."""

    spec: ModelSpec
    audit: Audit
    shipped: bool  # shapes as shipped with this package: no header was read
    notes: tuple[str, ...] = ()  # a line for each thing that is read otherwise than config.json says

    @property
    def disagreements(self) -> tuple[str, ...]:
        """A line for each figure that contradicts another."""
        return tuple(self.audit.disagreements)

    def to_json(self) -> dict[str, Any]:
        return self.audit.to_json()


def inspect(model: StrPath, expect_parameters: float | None = None) -> Inspection:
    """Shapes, parameters, bytes by part and KV bytes per token; config audited against headers and stated totals.

    model: a directory, a hub name (headers alone are fetched) or a family's name. expect_parameters: the total that the
    model card states. Disagreements are answered, not raised. Raises CheckpointError for files that cannot be read.
    """
    from qwenq.planning.audit import audit, index_total, published_shapes
    from qwenq.planning.models import load_model, stored_tensors

    found = load_model(str(model))
    tensors = total = recipe = None
    spec = found.spec
    if found.directory is not None or found.hub:
        tensors = stored_tensors(found)
        total = None if found.directory is None else index_total(found.directory)
    else:
        spec, recipe = published_shapes(spec, found.published or "BF16")
    result = audit(
        spec, found.config, tensors, shipped=recipe, expect_parameters=expect_parameters, index_total_bytes=total
    )
    return Inspection(spec, result, tensors is None, found.notes)


# ---------------------------------------------------------------------- run


class LoadWords(TypedDict, total=False):
    """Options of `load` in words, as `qwenq run` takes them."""

    max_model_len: str | int  # tokens, prompt and answer; 4k by default
    prefill_chunk: int  # prompt tokens computed at once
    gpu_memory: str  # limit a GPU, "20GiB" or "20GiB,10GiB"; what is free by default
    cpu_memory: str  # limit of host memory; what is over goes to disk
    offload_dir: StrPath | None
    kv_cache_dtype: str  # auto, bf16, fp16 or fp8
    compute_dtype: str  # auto, bfloat16 or float32


def load_options(**words: Unpack[LoadWords]) -> LoadOptions:
    """Options of a load, understood; UsageError or PlanError for what means nothing, TypeError for no option."""
    from qwenq.runtime.generate import KV_DTYPES
    from qwenq.runtime.load import LoadOptions
    from qwenq.units import parse_size, parse_tokens

    if unknown := words.keys() - LoadWords.__annotations__.keys():
        raise TypeError(f"no option {', '.join(sorted(unknown))}")
    kv_dtype, compute_dtype = words.get("kv_cache_dtype", "auto"), words.get("compute_dtype", "auto")
    if kv_dtype not in KV_DTYPES:
        raise UsageError(f"--kv-cache-dtype {kv_dtype}: wanted {', '.join(KV_DTYPES)}")
    if compute_dtype not in ("auto", "bfloat16", "float32"):
        raise UsageError(
            f"--compute-dtype {compute_dtype}: wanted bfloat16, float32 or auto",
            hint="float16 overflows in Qwen2.5's activations",
        )
    offload = words.get("offload_dir")
    if offload is not None and not Path(offload).is_dir():
        raise RunError(f"--offload-dir {offload}: no such directory")
    context, gpu, cpu = words.get("max_model_len", ""), words.get("gpu_memory", ""), words.get("cpu_memory", "")
    return LoadOptions(
        max_model_len=parse_tokens(str(context)) if context else 0,
        prefill_chunk=words.get("prefill_chunk", LoadOptions.prefill_chunk),
        kv_dtype=kv_dtype,
        compute_dtype=compute_dtype,
        gpu_memory=tuple(parse_size(part) for part in gpu.split(",")) if gpu else (),
        cpu_memory=parse_size(cpu) if cpu else 0,
        offload_directory=Path(offload or LoadOptions.offload_directory),
    )


@dataclass(frozen=True)
class Answer:
    """Generated text, its token ids, and how long it took."""

    text: str
    token_ids: tuple[int, ...]
    timing: Timing

    def __str__(self) -> str:
        return self.text


class LoadedModel:
    """A checkpoint in memory, ready to generate. A context manager; `close` lets go of the memory."""

    def __init__(
        self, checkpoint: Path, options: LoadOptions, progress: Callable[[int], None], warn: Callable[[str], None]
    ) -> None:
        from qwenq.checkpoint.reader import open_checkpoint
        from qwenq.runtime.chat import Chat
        from qwenq.runtime.load import loaded

        opened = open_checkpoint(checkpoint)
        for line in opened.notes:
            warn(line)
        self.spec = opened.spec
        self._chat = Chat(checkpoint, opened.spec.vocab_size)
        self._stack = ExitStack()
        self.loaded: Loaded = self._stack.enter_context(loaded(opened, options, progress))
        self._session: Session | None = self.loaded.session(self._chat.stop_ids)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self.loaded.work.context

    def generate(self, prompt: str | Sequence[Message], *, raw: bool = False, **sampling: Unpack[Sampling]) -> Answer:
        """Answer a prompt, or a conversation of messages with `role` and `content`.

        raw: continue the text as it stands, without the chat template, which is also done where there is none. Raises
        RunError where prompt and answer exceed `max_model_len`, UsageError for a sampling that means nothing.
        """
        from qwenq.runtime.generate import Timing

        timing, ids = Timing(), list[int]()
        text = "".join(self._stream(prompt, raw, sampling, timing, ids))
        return Answer(text, tuple(ids), timing)

    def stream(
        self, prompt: str | Sequence[Message], *, raw: bool = False, **sampling: Unpack[Sampling]
    ) -> Iterator[str]:
        """The text of `generate`, piece by piece as it is made."""
        from qwenq.runtime.generate import Timing

        return self._stream(prompt, raw, sampling, Timing(), [])

    def _stream(
        self, prompt: str | Sequence[Message], raw: bool, sampling: Sampling, timing: Timing, ids: list[int]
    ) -> Iterator[str]:
        session = self._session
        if session is None:
            raise UsageError("the model is closed", hint="load it again")
        if raw or not self._chat.has_template:
            if not isinstance(prompt, str):
                raise UsageError("messages need a chat template", hint="give a text")
            asked = self._chat.text_ids(prompt)
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            asked = self._chat.prompt_ids(messages)

        settings = self._chat.sampling(**sampling)
        made = session.generate(asked, settings, timing, listen=lambda token, logits_V: ids.append(token))
        return self._chat.stream(made, asked)

    def close(self) -> None:
        """Let go of weights and cache."""
        self._session = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Sampling(TypedDict, total=False):
    """Sampling settings; anything not given comes from the checkpoint's generation_config.json."""

    max_new_tokens: int  # where neither says, what the context leaves, at most 512
    temperature: float  # 0: always the likeliest token; where neither says, 1 with top_p or top_k, else 0
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int


def load(
    checkpoint: StrPath,
    *,
    progress: Callable[[int], None] = _nothing,
    warn: Callable[[str], None] = _nothing,
    **options: Unpack[LoadWords],
) -> LoadedModel:
    """Load a checkpoint, weights packed, over the GPUs, host memory and disk of this machine as the planner places it.

    checkpoint: a directory, a GGUF file or a hub name. progress: gets the number of each loaded layer. warn: gets a
    line for each thing that is read otherwise than config.json says. Raises RunError, naming the device and the bytes
    that are missing, where it does not fit.
    """
    understood = load_options(**options)  # before anything is downloaded
    return LoadedModel(model_directory(str(checkpoint)), understood, progress, warn)


__all__ = [
    "Answer", "EvaluateConfig", "Inspection", "LoadedModel", "QuantizeConfig", "convert", "dry_run", "estimate",
    "evaluate", "followed_links", "inspect", "load", "plan", "quantize", "recommend", "sensitivity", "verify",
]  # fmt: skip
