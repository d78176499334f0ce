"""Layers of a finished checkpoint made again from its source, and compared byte for byte with what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qwenq.checkpoint.manifest import MANIFEST_NAME, Finding, current_names
from qwenq.checkpoint.reader import Checkpoint, GGUFCheckpoint, open_checkpoint, open_source
from qwenq.errors import CalibrationError, CheckpointError, JobError, QwenqError
from qwenq.formats.base import Recipe, Scheme
from qwenq.io.json import inside
from qwenq.io.tensors import raw_bytes
from qwenq.model.spec import spec_from_config
from qwenq.pipeline.activations import LayerRunner, embed_tokens
from qwenq.pipeline.config import DEFAULT_WINDOWS, QuantizeConfig, unreadable
from qwenq.pipeline.head import solve_head, tied_hessian
from qwenq.pipeline.job import DTYPES, QuantizeJob
from qwenq.pipeline.monitor import StageClock
from qwenq.pipeline.quantize import make_layer
from qwenq.text.calibration import load_windows, set_names, with_builtin
from qwenq.text.tokens import ModelTokenizer, TokenWindows


def sample(layers: int) -> tuple[int, ...]:
    """The first, a middle and the last layer."""
    return tuple(sorted({0, layers // 2, layers - 1}))


@torch.inference_mode()
def reproduce(
    directory: Path,
    source: Path,
    manifest: Mapping[str, Any],
    layers: Iterable[int] | None = None,
    *,
    calibration: str | None = None,
    listen: Callable[[str], None] = lambda line: None,
) -> tuple[tuple[int, ...], list[Finding]]:
    """Make `layers` (None: the first, a middle and the last one) again; returns those made, and what differs.

    An embedding that is solved is made again before any layer. The first that differs is the last that is made. The
    calibration tokens run through the written layers up to each that is made again. calibration: the file they come
    from, when the manifest names one. Raises QwenqError when something needed cannot be had.
    """
    opened = _as_solved(open_source(source), manifest)
    spec = opened.spec
    wanted = sample(spec.num_hidden_layers) if layers is None else tuple(sorted(set(layers)))
    if not wanted or not 0 <= wanted[0] <= wanted[-1] < spec.num_hidden_layers:
        raise JobError(f"--layers: the model has layers 0 to {spec.num_hidden_layers - 1}")
    job = read_job(manifest, opened, directory, calibration)
    whole = manifest["job"].get("files")  # names of files that are the whole model
    first = whole[0] if isinstance(whole, list) and whole else None
    if first is not None and first not in [*manifest["files"]]:  # it may be of any type
        raise unreadable(KeyError("files"))
    written = open_checkpoint(directory if first is None else inside(directory, first))
    here, then = job.numerics, manifest["job"].get("numerics")
    then = then if isinstance(then, Mapping) else {}
    _refuse_other_sums(then, here)
    if job.head_windows and (was := manifest["job"].get("head_windows")) != job.head_windows:
        raise _other_version(f"its embedding was made in another way (head_windows {was}, here {job.head_windows})")
    findings: list[Finding] = []
    made: list[int] = []
    try:
        torch.set_num_threads(_threads(then))
        calibrator = job.workers(DTYPES[job.config.calibration_dtype], job.calibration)
        if job.head_windows:
            listen("the embedding, which is the head too: recomputing")
            tensors, _ = solve_head(job, calibrator, tied_hessian(job, calibrator, job.source.finite_layer_state))
            if problem := _difference(tensors, written):
                file = first or job.files.file_of(0)
                return (), [Finding(file, f"the embedding, recomputed, {problem}{_why(then, here)}")]
        embedded = written if job.head_windows else None
        states = embed_tokens(job.source, job.tokens(), Path.cwd(), job.convert, written=embedded)
        both = {"calibration": calibrator, "original": calibrator}
        runner = LayerRunner(states.states, states.shares, both)
        for layer in range(wanted[-1] + 1):
            if layer not in wanted:
                if job.calibration is not None:
                    listen(f"layer {layer}: replaying")
                    runner.replay(layer, job.source.finite_layer_state, written.layer_state)
                continue
            listen(f"layer {layer}: recomputing")
            state = job.source.finite_layer_state(layer)
            tensors, _ = make_layer(job, calibrator, layer, state, states, StageClock())
            made.append(layer)
            if problem := _difference(tensors, written):
                file = first or job.files.file_of(layer + 1)
                findings.append(Finding(file, f"layer {layer}, recomputed, {problem}{_why(then, here)}"))
                break  # what follows would be made from other hidden states
    finally:
        torch.set_num_threads(here["threads"])
    return tuple(made), findings


def _as_solved(source: Checkpoint, manifest: Mapping[str, Any]) -> Checkpoint:
    """The source with its FFN padded, and rotated, as by the job; CheckpointError for a width that no model has."""
    job = manifest.get("job")
    options = job.get("options") if isinstance(job, Mapping) else None
    if isinstance(options, Mapping) and options.get("rotate") is True:
        source = source.rotated()
    width = job.get("intermediate_size") if isinstance(job, Mapping) else None
    if type(width) is not int or width <= source.spec.intermediate_size:
        return source
    spec_from_config(source.config | {"intermediate_size": width}, where=MANIFEST_NAME)
    return source.padded(width)


def read_job(manifest: Mapping[str, Any], source: Checkpoint, out: Path, calibration: str | None = None) -> QuantizeJob:
    """The job that a manifest describes; CheckpointError for a description that makes none."""
    try:
        job = current_names(manifest["job"])
        overrides = tuple((name, Scheme(**s) if s else None) for name, s in job["overrides"].items())
        recipe = Recipe(Scheme(**job["scheme"]) if job["scheme"] else None, overrides, job["format"])
        text = job["calibration"]
    except (KeyError, TypeError, ValueError, AttributeError, QwenqError) as error:
        raise unreadable(error) from None
    config = QuantizeConfig.from_manifest(job)
    recipe.check(source.spec)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = {"cuda", *(f"cuda:{k}" for k in range(count))} if count else set()
    if config.device != "cpu" and not set(config.device.split(",")) <= here:
        raise JobError(
            f"{MANIFEST_NAME}: made on {config.device}, which is not here", hint="GPUs and CPUs round differently"
        )
    windows = None if text is None else _calibration(text, config.seed, source, calibration)
    some = windows or TokenWindows(torch.zeros(1, 2, dtype=torch.int64), "none", {})
    evaluation = TokenWindows(some.ids[:1], "none", {})
    return QuantizeJob(source, out, recipe, config, windows, evaluation)


def _calibration(text: Any, seed: int, source: Checkpoint, given: str | None) -> TokenWindows:
    """The tokens the manifest names, from the named set or the file given; recognized by their SHA-256."""
    try:
        name, length, count, digest = (text[key] for key in ("text", "window_tokens", "windows", "tokens_sha256"))
        replaced = text.get("builtin", {}).get("windows", 0)
        if not isinstance(name, str) or any(type(value) is not int for value in (length, count, replaced)):
            raise TypeError
        if length < 1 or not 0 <= replaced <= count:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{MANIFEST_NAME}: job.calibration does not say which text was read") from None
    if given is None and name not in set_names():
        raise CalibrationError(
            f"calibrated on {name!r}, a file whose path is not known", hint="pass it with --calibration FILE"
        )
    tokenizer = ModelTokenizer(source.directory)
    for asked in (None, count):  # all there are up to a limit, or so many, which draws others
        try:
            found = load_windows(
                given or name,
                tokenizer,
                source.spec,
                length=length,
                count=asked,
                seed=seed,
                up_to=max(DEFAULT_WINDOWS, count),
            )
        except CalibrationError:
            if asked is not None:
                raise
            continue
        found = with_builtin(found, replaced, tokenizer, source.spec, seed=seed)
        if found.sha256 == digest:
            return found
    raise CalibrationError(
        f"{given or name}: gives other tokens than those that were calibrated on",
        hint="the set `builtin` reads the running Python's own text too: the manifest names that version"
        if name == "builtin"
        else "name the very file: --calibration FILE",
    )


def _difference(tensors: Mapping[str, torch.Tensor], written: Checkpoint) -> str:
    """How a layer made again differs from the written one; empty when shapes, dtypes and all bytes are the same."""
    other, total, names = 0, 0, []
    as_bytes = isinstance(written, GGUFCheckpoint)  # which has no torch dtypes
    for name, tensor in tensors.items():
        stored = written.read_packed(name)
        same = (stored.shape, stored.dtype) == (tensor.shape, tensor.dtype)
        if not (stored.nbytes == tensor.nbytes if as_bytes else same):
            return f"has {name} as {list(tensor.shape)} {tensor.dtype}, written is {list(stored.shape)} {stored.dtype}"
        a, b = (torch.frombuffer(raw_bytes(t), dtype=torch.uint8) for t in (tensor, stored))
        different = int((a != b).sum())
        other, total = other + different, total + a.numel()
        if different:
            names.append(name)
    return f"differs in {other} of {total} bytes, first in {names[0]}" if names else ""


def _refuse_other_sums(then: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise JobError where the job took its sums over windows otherwise than it would here."""
    was = then.get("sums")
    if was != here.get("sums"):
        raise _other_version(
            f"its sums over windows were taken in another way ({was or 'all in a row'}, here {here.get('sums')}), "
            "which ends in other last bits"
        )


def _other_version(problem: str) -> JobError:
    return JobError(
        f"{MANIFEST_NAME}: {problem}",
        hint="the version that made it makes its layers again; --layers none compares files alone",
    )


def _why(then: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Differences of the machine that change last bits, but for threads, which are set as they were."""
    changed = [key for key, value in here.items() if key != "threads" and then.get(key) != value]
    return f" (made with {'; '.join(f'{key} {then.get(key)}, here {here[key]}' for key in changed)})" if changed else ""


def _threads(then: Mapping[str, Any]) -> int:
    """As many threads as the job had: sums over another number end in other bits."""
    count = then.get("threads")
    return count if type(count) is int and 0 < count <= 1024 else torch.get_num_threads()
