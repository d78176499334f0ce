"""The same codes in another format: unpacked and packed again, nothing is solved or rounded.

One decoder layer is in memory at a time. Scales, zero points, biases and everything unquantized keep their bits.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwenq.checkpoint.manifest import MANIFEST_NAME, SourceFiles, read_manifest
from qwenq.checkpoint.reader import Checkpoint
from qwenq.checkpoint.shards import StoredFiles, stored_files
from qwenq.errors import CheckpointError, JobError, PlanError, QwenqError
from qwenq.formats.base import FORMATS, Recipe, Scheme, get_format, quantization_config
from qwenq.io.durable import make_directory, write_json
from qwenq.io.fields import Fields
from qwenq.io.gguf import GGUFFile, is_gguf
from qwenq.io.safetensors import FLOAT_NAMES, FLOATS
from qwenq.io.tensors import TORCH_DTYPES, all_finite
from qwenq.machine import forget_peak_rss, free_disk, host_facts, peak_rss_bytes, versions
from qwenq.model.metadata import GENERATION_NAME, generation_of_metadata
from qwenq.model.spec import LinearSpec
from qwenq.pipeline.card import CARD_NAME, model_card, rotated_too
from qwenq.pipeline.container import container_of
from qwenq.pipeline.monitor import memory_errors
from qwenq.pipeline.output import Output, copied_files
from qwenq.pipeline.preflight import partial_directory, refuse_place
from qwenq.results import finite_json
from qwenq.solver.grid import QTensor
from qwenq.text.tokens import write_tokenizer
from qwenq.units import format_gb


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    out: Path
    source_format: str
    format: str
    scheme: str
    tensor_bytes: int
    file_bytes: int
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def target_recipe(source: Checkpoint, format: str) -> Recipe:
    """The source's recipe in another format; PlanError, naming both, when that cannot hold the same codes.

    Where all zero points are the middle one and the source's format cannot say so (AWQ), it is a symmetric one.
    """
    if source.quantized is None:
        raise PlanError(f"{source.directory}: not quantized", hint="`qwenq quantize --format` quantizes it")
    recipe, form = source.recipe, get_format(format)
    if recipe.format == format:
        raise PlanError(f"{source.directory}: is {format} already")
    for each in (get_format(recipe.format), form):
        if not each.integer_codes:
            raise PlanError(
                f"{recipe.format} to {format}: {each.name} stores other values than codes on a grid of float16 scales",
                hint=f"`qwenq quantize --format {format}` makes it from the 16-bit checkpoint",
            )

    linears = (lin for layer in range(source.spec.num_hidden_layers) for lin in source.spec.layer_linears(layer))
    centred = all(get_format(recipe.format).centred(source.read, lin) for lin in linears if recipe.scheme_of(lin))

    def held(scheme: Scheme | None) -> Scheme | None:
        if scheme is None:
            return None
        integers = get_format(recipe.format).as_integers(scheme)
        return form.held_as(replace(integers, sym=True) if centred else integers)

    outside = {lin.name for lin in source.spec.outer_linears}  # a format that packs them too is no reason for the other
    overrides = tuple((name, held(scheme)) for name, scheme in recipe.overrides if name not in outside)
    changed = Recipe(held(recipe.default), overrides, format)
    changed.check(source.spec)
    return changed


def target_files(source: Checkpoint, recipe: Recipe) -> StoredFiles:
    """The files of `source` converted to the recipe's format."""
    stored_dtype = get_format(recipe.format).stored_dtype
    container = container_of(source.spec, recipe, source.config, source.directory)
    return stored_files(source.spec, recipe, lambda name: stored_dtype(name, source.dtype_of(name)), container)


@torch.inference_mode()
def convert(source: Checkpoint, out: Path, format: str, *, listen: Callable[[int], None] = lambda k: None) -> Converted:
    """Write `source` at `out` in another format; `listen` is told each finished file. Raises QwenqError in one line."""
    started = time.perf_counter()
    forget_peak_rss()
    recipe = target_recipe(source, format)
    refuse_place(out, source.directory)
    files = target_files(source, recipe)
    file_bytes = files.file_bytes
    if file_bytes > (free := free_disk(out)):
        raise JobError(f"{out}: needs {format_gb(file_bytes)} of disk, {format_gb(free)} are free")
    work = partial_directory(out)
    try:
        make_directory(work, exist_ok=False)
    except FileExistsError:
        raise JobError(f"{work}: left by an unfinished job", hint="delete it, or finish that job") from None
    except OSError as error:
        raise JobError(f"{work}: {error.strerror}", hint="choose another OUT") from None
    try:
        with memory_errors("converting", torch.device("cpu"), None, "end other programs"):
            copied = copied_files(source.folder)
            source = source.hash_files(copied)
            hashes = files.hashes(work, _write_parts(source, recipe, files, work, listen))
            made = Converted(
                out=out,
                source_format=source.recipe.format,
                format=format,
                scheme=recipe.label,
                tensor_bytes=files.tensor_bytes,
                file_bytes=file_bytes,
                seconds=time.perf_counter() - started,
                peak_rss_bytes=peak_rss_bytes(),
            )
            read = source.hashed
            assert read is not None
            config = dict(source.config) | {"quantization_config": quantization_config(recipe, source.spec)}
            output = Output(work, out, recipe, config, files, copied)
            hashes |= output.copy_small_files(source.directory, read.hashes)
            if not files.whole:
                hashes |= write_tokenizer(source.directory, work) | _write_generation(source, work)
            read.refuse_replaced()
            hashes |= output.write_configs()
            described, card = _describe(source, recipe, read, made, files.model_file)
            source.refuse_changed([CARD_NAME])
            output.finish(finite_json(described), hashes, card)
            return made
    except OSError as error:
        raise JobError(f"{error.filename or work}: {error.strerror or error}", hint="nothing is kept") from error
    finally:
        if os.path.lexists(work):
            shutil.rmtree(work)


def _write_generation(source: Checkpoint, work: Path) -> dict[str, str]:
    """Write what a GGUF file says of sampling as generation_config.json; its SHA-256. Nothing for another source."""
    if not is_gguf(source.directory):
        return {}
    settings = generation_of_metadata(GGUFFile.open(source.directory).metadata, source.config)
    return {GENERATION_NAME: write_json(work / GENERATION_NAME, settings)} if settings else {}


def _write_parts(
    source: Checkpoint, recipe: Recipe, files: StoredFiles, work: Path, listen: Callable[[int], None]
) -> dict[int, str]:
    """Write all tensors, part by part; SHA-256 of each part."""
    files.begin(work)
    parts = {}
    for number, specs in enumerate(files.parts):
        wanted = {spec.name: spec for spec in specs}
        tensors = _layer(source, recipe, number - 1) if 0 < number < len(files.parts) - 1 else {}
        for name in wanted.keys() - tensors.keys():
            tensors[name] = source.read(name).to(TORCH_DTYPES[wanted[name].dtype])
            if not all_finite(tensors[name]):
                raise CheckpointError(f"{source.directory}: {name} holds what no {wanted[name].dtype} is")
            if name.endswith(".weight"):
                source.refuse_blank(name, tensors[name])
        parts[number] = files.write(work, number, {name: tensors[name] for name in wanted})
        listen(number)
    return parts


def _layer(source: Checkpoint, recipe: Recipe, layer: int) -> dict[str, torch.Tensor]:
    """Tensors of the quantized linears of one layer in the recipe's format, by full name."""
    form = get_format(recipe.format)
    tensors: dict[str, torch.Tensor] = {}
    for lin in source.spec.layer_linears(layer):
        scheme = recipe.scheme_of(lin)
        if scheme is not None:
            packed = form.pack(_grid(source, lin, scheme), form.version(recipe))
            tensors |= {f"{lin.name}.{part}": tensor for part, tensor in packed.items()}
    return tensors


def _grid(source: Checkpoint, lin: LinearSpec, scheme: Scheme) -> QTensor:
    """The linear's codes under `scheme`, its scales in float16; CheckpointError when they cannot be kept so."""
    found = source.linear(lin)
    if isinstance(found, QTensor):
        found = get_format(source.recipe.format).integers(found, lin)
    if not isinstance(found, QTensor) or found.order_I is not None:
        raise CheckpointError(
            f"{lin.name}: its groups are out of order (act-order): no other format holds them",
            hint="quantize from the 16-bit checkpoint instead",
        )
    source.refuse_blank(f"{lin.name}.scales", found.scales_OG)
    scales_OG = found.scales_OG.half()
    if not torch.equal(scales_OG.float(), found.scales_OG.float()):
        raise CheckpointError(f"{lin.name}: its scales are {found.scales_OG.dtype}, and float16 does not hold them")
    finer = found.codes_OI.shape[1] // scheme.group_width(lin.in_features) // scales_OG.shape[1]
    scales_OG, zeros_OG = (p_OG.repeat_interleave(finer, 1) for p_OG in (scales_OG, found.zeros_OG))
    return QTensor(found.codes_OI, (scales_OG, zeros_OG), scheme.grid())


def _describe(
    source: Checkpoint, recipe: Recipe, read: SourceFiles, made: Converted, file: str
) -> tuple[dict[str, Any], str | None]:
    """The manifest but for the files' hashes, and a card where it is known how the codes were made."""
    origin = _origin(source)
    described: dict[str, Any] = {
        "job": {
            "convert": {"from": made.source_format, "to": made.format},
            "model": source.spec.name,
            "format": recipe.format,
            "scheme": asdict(recipe.default) if recipe.default else None,
            "overrides": {name: asdict(scheme) if scheme else None for name, scheme in recipe.overrides},
            "source": read.hashes,
        },
        "versions": versions(),
        "parameters": source.spec.parameters,
        "tensor_bytes": made.tensor_bytes,
        "file_bytes": made.file_bytes,
        "bits_per_linear_weight": recipe.bits_per_linear_weight(source.spec),
        "made_from": origin,
        "run": {"seconds": made.seconds, "peak_rss_bytes": made.peak_rss_bytes, **host_facts()},
    }
    if origin is None:
        return described, None
    sizes = {key: described[key] for key in ("parameters", "file_bytes", "bits_per_linear_weight")}
    quantized_as = origin["job"]["format"]
    other = quantized_as if quantized_as != recipe.format else ""
    card = model_card(
        origin | sizes, source.folder, source.spec, recipe, converted_from=other, file=file,
        outside=_outside(source, recipe, Fields(origin, MANIFEST_NAME, "").sub("job")),
    )  # fmt: skip
    return described, card


def _outside(source: Checkpoint, recipe: Recipe, job: Fields) -> dict[str, str]:
    """What embedding, norms and head are in, those that are not as in the 16-bit model: `Q6_K unpacked to float16`.

    job: that made the codes. A GGUF file's types for embedding and head are unpacked for any other format.
    """
    spec, overrides = source.spec, job.sub("overrides")
    made_as, stored_dtype = FORMATS.get(job.text("format")), get_format(recipe.format).stored_dtype
    asked = FLOATS.get(job.text("dtype"))
    found: dict[str, str] = {}
    for part, name in (
        ("embedding", spec.embedding_tensor), ("norms", spec.norm_tensor), ("head", spec.head_tensor)
    ):  # fmt: skip
        module, read = name.removesuffix(".weight"), source.dtype_of(name)
        written = stored_dtype(name, read)
        if overrides.value.get(module) is not None:
            found[part] = f"{overrides.sub(module).text('codes')} unpacked to {FLOAT_NAMES[written]}"
        elif written not in (read, "F32"):
            found[part] = f"in {FLOAT_NAMES[written]}"
        elif asked and made_as and made_as.stored_dtype(name, asked) == asked:
            found[part] = f"in {FLOAT_NAMES[asked]}"
    return rotated_too(found) if job.sub("options").value.get("rotate") else found


def _origin(source: Checkpoint) -> dict[str, Any] | None:
    """What the manifest of the checkpoint that was quantized says of its making, its drift and its layers' errors: the
    codes are the same.

    A converted checkpoint hands on what it was made from. None without a manifest that is as it was written.
    """
    try:
        manifest, findings = read_manifest(source.folder)
    except QwenqError:
        return None
    if findings or not set(source.own_files) <= manifest["files"].keys():
        return None
    if "made_from" in manifest:
        if manifest["made_from"] is None:
            return None
        origin = dict(Fields(manifest, MANIFEST_NAME, "").sub("made_from").value)
    else:
        origin = {key: manifest.get(key) for key in ("digest", "job", "drift", "warnings", "layers")}
    _check_origin(Fields(origin, MANIFEST_NAME, ""))
    return origin


def _check_origin(fields: Fields) -> None:
    """Raise CheckpointError for a field of a wrong type among those that a model card is written from."""
    job, drift = fields.sub("job"), fields.sub("drift")
    fields.texts("warnings")
    for key in ("model", "qwenq", "format"):
        job.text(key)
    job.sub("options")
    job.sub("source")
    job.whole("seed")
    calibration = job.optional_sub("calibration")
    for text in (job.sub("evaluation"), *([calibration] if calibration else [])):
        text.text("text")
        text.text("tokens_sha256")
        text.whole("windows")
        text.whole("window_tokens")
    if calibration and calibration.value.get("builtin") is not None:
        calibration.sub("builtin").whole("windows")
    drift.text("text")
    drift.text("compute_dtype")
    for key in ("kl", "top1_agreement", "perplexity_increase_percent"):
        drift.interval(key)
    for key in ("perplexity", "reference_perplexity"):
        drift.number(key)
    for key in ("windows", "window_tokens"):
        drift.whole(key)
