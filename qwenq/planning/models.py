"""From what a user calls a model to its shapes and its weights: a family name, a directory or a hub name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenq.checkpoint.contents import (
    Contents,
    read_config,
    read_contents,
    read_headers,
    refuse_adapter,
    refuse_file,
    refuse_no_config,
)
from qwenq.errors import CheckpointError, PlanError, UsageError
from qwenq.formats.base import FORMATS, SIZED, Recipe, Scheme, get_format
from qwenq.io.gguf import gguf_model, is_gguf
from qwenq.io.json import inside, model_name, read_object, shown
from qwenq.io.safetensors import INDEX_NAME, TensorLocation, TensorSpec, checkpoint_tensors
from qwenq.model.spec import ModelSpec, family_spec, near_names, refuse_experts, spec_from_config
from qwenq.planning.weights import (
    BITS_TO_TYPE,
    Weights,
    gguf_types,
    gguf_weights,
    header_weights,
    is_gguf_type,
    published_weights,
    recipe_weights,
)

_PUBLISHED = re.compile(r"(.*?)-(GPTQ-Int[48]|AWQ|FP8)", re.IGNORECASE)
_STATED_KEYS = ("num_parameters", "total_parameters", "n_params", "parameters")


@dataclass(frozen=True)
class Model:
    """A model's shapes, and where they came from; `directory`, or GGUF file, holds its headers when it is on disk."""

    spec: ModelSpec
    config: Mapping[str, Any]
    directory: Path | None = None
    hub: str = ""  # its hub name, when config.json came from there
    published: str = ""  # GPTQ-Int4, GPTQ-Int8, AWQ, FP8 when the name says so
    repository: str = ""  # of the publisher's own files, where the name was given with its owner
    notes: tuple[str, ...] = ()  # a line for each thing that is read otherwise than config.json says


def load_spec(model: str) -> ModelSpec:
    """Shapes of a family name, a directory with a config.json, or a hub name."""
    return load_model(model).spec


def load_model(model: str, expect_parameters: float | None = None) -> Model:
    """A model by family name, directory or hub name, its stated totals checked against its shapes."""
    found = _find(model)
    if found.spec.tie_word_embeddings:  # unless another head is stored
        stored = _contents(found)
        found = replace(found, spec=stored.spec, config=stored.config, notes=stored.notes)
    _audit(found, expect_parameters)
    return found


@dataclass(frozen=True)
class WeightsAsked:
    """Which weights of a model: of a checkpoint, as `quantize` would write them, or with nothing said its own."""

    bits: int | None = None  # 4, 8, or 16 for not quantized
    group_size: int | None = None
    target_bytes: int | None = None
    recipe: Path | None = None  # a file
    checkpoint: Path | None = None
    pad_for_tp: int | None = None
    gguf: bool = False  # 4, 8 and 16 bits mean Q4_K_M, Q8_0 and F16
    format: str = ""  # gptq, awq, bnb-nf4, ..., fp8, or a GGUF type; empty: by the bits


def model_weights(model: Model, asked: WeightsAsked = WeightsAsked()) -> Weights:
    """The weights asked for; PlanError or UsageError for what the model cannot have.

    With nothing asked, headers of a directory or hub model count, else 4 bits in groups of 128.
    """
    spec, bits, ranks = model.spec, asked.bits, asked.pad_for_tp
    if asked.checkpoint is not None:
        _refuse_padding(ranks)
        return _checkpoint_weights(spec, gguf_model(asked.checkpoint) or asked.checkpoint)
    mixed = {"--target-size": asked.target_bytes, "--recipe": asked.recipe}
    if asked.gguf:
        plain = asked.bits is None and not asked.format
        if plain and is_gguf(model.directory or "") and (found := _own_weights(model)) is not None:
            return found
        return _gguf(spec, asked, mixed | {"--group-size": asked.group_size, "--pad-for-tp": ranks})
    if asked.format:
        return _of_format(spec, asked, mixed)
    if all(value is None for value in (bits, asked.group_size, *mixed.values())):
        found = _own_weights(model)
        if found is not None:
            _refuse_padding(ranks)
            return found
    if any(value is not None for value in mixed.values()):
        return _mixed_weights(model, asked)
    if bits not in (None, 4, 8, 16):
        raise UsageError(f"--bits {bits}: wanted 4, 8, or 16 for not quantized")
    scheme = Scheme(4 if bits in (None, 16) else bits, 128 if asked.group_size is None else asked.group_size)
    if bits == 16:
        _refuse_padding(ranks)
    return _uniform_weights(spec, Recipe(None if bits == 16 else scheme), ranks)


def _uniform_weights(spec: ModelSpec, uniform: Recipe, ranks: int | None) -> Weights:
    """Weights of one scheme, the FFN padded for so many ranks."""
    if ranks is not None:
        from qwenq.planning.budget import widened

        spec = widened(spec, ranks, uniform)
    uniform.check(spec)
    return recipe_weights(spec, uniform)


def _mixed_weights(model: Model, asked: WeightsAsked) -> Weights:
    """Weights of several schemes: by a recipe file, or by the recipe that a size asks for."""
    from qwenq.planning.budget import recipe_of, sized_recipe, widened
    from qwenq.planning.recipefile import read_recipe

    spec, ranks, dtype_of = model.spec, asked.pad_for_tp, source_dtypes(model)
    spec = widened(spec, ranks, None) if ranks is not None else spec
    if asked.recipe is not None:
        chosen = recipe_of(spec, read_recipe(asked.recipe, spec))
        source = "every tensor of the recipe, byte for byte"
    else:
        assert asked.target_bytes is not None
        chosen = sized_recipe(spec, asked.target_bytes, dtype_of, ranks)
        source = "every tensor of the recipe that the prior chooses, byte for byte"
    chosen.check(spec)
    return recipe_weights(spec, chosen, dtype=dtype_of, source=source)


def _own_weights(model: Model) -> Weights | None:
    """Weights of the model's own files; None where there are none to be asked."""
    if model.published:
        return replace(published_weights(model.spec, model.published), place=model.repository)
    stored = stored_tensors(model)
    return _of_headers(model.spec, stored, model.config, str(model.directory or model.hub)) if stored else None


def stored_tensors(model: Model) -> dict[str, TensorSpec]:
    """Headers of a directory, GGUF file or hub model; empty for a family, and for a directory without weights."""
    return _specs(_contents(model).tensors)


def _specs(tensors: Mapping[str, TensorLocation]) -> dict[str, TensorSpec]:
    return {name: location.spec for name, location in tensors.items()}


def _contents(model: Model) -> Contents:
    """Stored contents of a checkpoint or hub model: headers, and for a tied head, a comparison with the embedding."""
    where = shown(str(model.directory or model.hub or model.spec.name))
    if model.directory is not None and _has_tensors(model.directory):
        if is_gguf(model.directory):
            return read_headers(model.directory)
        return read_contents(model.spec, model.config, checkpoint_tensors(model.directory), where)
    if model.directory is not None or not model.hub:
        return Contents(model.spec, dict(model.config), {})
    from qwenq.io.hub import fetch_headers, same_start

    return read_contents(
        model.spec, model.config, fetch_headers(model.hub), where, lambda one, other: same_start(model.hub, one, other)
    )


def source_dtypes(model: Model) -> Callable[[str], str]:
    """The dtype each tensor of a 16-bit source is stored in, which `quantize` keeps; BF16 for a family.

    CheckpointError for what is no such source.
    """
    where = shown(str(model.directory or model.hub or model.spec.name))
    if model.published or model.config.get("quantization_config"):
        raise CheckpointError(
            f"{where}: already quantized{f' ({model.published})' if model.published else ''}",
            hint="plan from the original 16-bit checkpoint",
        )
    stored = stored_tensors(model)
    if not stored:
        return lambda name: "BF16"
    _check_shapes(model.spec, stored, where)

    def dtype_of(name: str) -> str:
        dtype = stored[name].dtype if name in stored else None
        if dtype not in ("F16", "BF16", "F32"):
            raise CheckpointError(
                f"{where}: {name} is {dtype or 'missing'}, wanted F16, BF16 or F32",
                hint="plan from the original 16-bit checkpoint",
            )
        return dtype

    return dtype_of


def _gguf(spec: ModelSpec, asked: WeightsAsked, others: Mapping[str, object]) -> Weights:
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise UsageError(
            f"{given[0]} is not supported for llama.cpp",
            hint="a GGUF type (--format Q4_K_M), --bits 4, 8 or 16, or the file that quantize wrote",
        )
    if asked.format and asked.format.upper() != "GGUF":
        if asked.bits is not None:
            raise UsageError("--bits and --format exclude each other for GGUF", hint="give one of them")
        if asked.format.lower() in (*FORMATS, *ALIASES, *SIZED):
            raise UsageError(
                f"--format {asked.format} is not a GGUF type, which llama.cpp needs",
                hint=f"one of {', '.join(gguf_types())}",
            )
        return gguf_weights(spec, asked.format.upper())
    bits = 4 if asked.bits is None else asked.bits
    if bits not in BITS_TO_TYPE:
        raise UsageError(f"--bits {bits}: wanted 4, 8, or 16 for not quantized")
    return gguf_weights(spec, BITS_TO_TYPE[bits])


def format_names() -> list[str]:
    """Formats that plans are made for by name, beside GGUF's types."""
    return [*(name for name, form in FORMATS.items() if not form.whole_file), *SIZED]


ALIASES = {"nf4": "bnb-nf4", "int8": "bnb-int8", "ct": "compressed-tensors"}


def _of_format(spec: ModelSpec, asked: WeightsAsked, mixed: Mapping[str, object]) -> Weights:
    """Uniform weights in a format by name; UsageError for one that there is not, or that has no such scheme."""
    name = ALIASES.get(asked.format.lower(), asked.format.lower())
    if is_gguf_type(asked.format) or (name in FORMATS and FORMATS[name].whole_file):
        raise UsageError(f"--format {asked.format} is GGUF", hint="--engine llama.cpp reads it")
    given = [option for option, value in mixed.items() if value is not None]
    if given:
        raise UsageError(f"--format and {given[0]} exclude each other", hint="give one of them")
    sizes = {"--bits": asked.bits, "--group-size": asked.group_size}
    if name in SIZED:
        said = [option for option, value in sizes.items() if value is not None]
        if said or asked.pad_for_tp is not None:
            raise UsageError(f"--format {name} has no {(*said, '--pad-for-tp')[0]}", hint="leave it out")
        return published_weights(spec, name)
    if name not in FORMATS:
        raise UsageError(
            f"--format {shown(asked.format)}: wanted one of {', '.join(format_names())}",
            hint="or a GGUF type, with --engine llama.cpp",
        )
    form = get_format(name)
    if form.fixed is not None:
        for option, value, only in zip(sizes, sizes.values(), (form.fixed.bits, form.fixed.group_size), strict=True):
            if value not in (None, only):
                raise UsageError(f"{option} is {value}, --format {name} has {only}", hint="leave it out")
        scheme = form.fixed
    else:
        bits = 4 if asked.bits is None else asked.bits
        scheme = Scheme(bits, 128 if asked.group_size is None else asked.group_size, not form.asymmetric)
    return _uniform_weights(spec, Recipe(scheme, format=name), asked.pad_for_tp)


def _refuse_padding(ranks: int | None) -> None:
    if ranks is not None:
        raise PlanError(
            f"--pad-for-tp {ranks} is for checkpoints that quantize writes, not for existing weights",
            hint="give --bits 4 or 8, --target-size or --recipe too",
        )


def _find(model: str) -> Model:
    path = Path(model)
    if (file := gguf_model(path)) is not None:
        found = read_headers(file)
        return Model(found.spec, found.config, directory=file)
    if os.path.isfile(path / "config.json"):
        config = read_object(inside(path, "config.json"))
        spec = spec_from_config(config, where=shown(str(path / "config.json")), name=model_name(path.resolve()))
        return Model(spec, config, directory=path)
    match = _PUBLISHED.fullmatch(model)
    for name, published in ((model, ""), (match[1], match[2]) if match else ("", "")):
        spec_found = family_spec(name) if name else None
        if spec_found is not None:
            return Model(spec_found, {}, published=published, repository=model if "/" in model else "")
    if not os.path.exists(path):
        refuse_experts(model)
    if os.path.isdir(path):
        refuse_adapter(path)
        refuse_no_config(path)
    refuse_file(path)
    if os.path.exists(path) or model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{shown(model)}: neither a directory nor a shipped model", hint=near_names(model))
    return _from_hub(model)


def _from_hub(model: str) -> Model:
    from qwenq.io.hub import fetch_config  # asks the network, so only when a name is the hub's

    config = read_object(inside(fetch_config(model), "config.json"))
    spec = spec_from_config(config, where=f"{shown(model)} config.json", name=model.split("/")[1])
    return Model(spec, config, hub=model)


def _has_tensors(directory: Path) -> bool:
    return is_gguf(directory) or (directory / INDEX_NAME).exists() or any(directory.glob("*.safetensors"))


def _checkpoint_weights(spec: ModelSpec, path: Path) -> Weights:
    """Weights as a checkpoint has them, whose own config says whether the head is tied."""
    if is_gguf(path):
        found = read_headers(path)
        own = replace(spec, tie_word_embeddings=found.spec.tie_word_embeddings)
    else:
        config = read_config(path)
        tied = bool(config.get("tie_word_embeddings", spec.tie_word_embeddings))
        found = read_contents(
            replace(spec, tie_word_embeddings=tied), config, checkpoint_tensors(path), shown(str(path))
        )
        own = found.spec
    return _of_headers(own, _specs(found.tensors), found.config, str(path))


def _of_headers(spec: ModelSpec, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Weights:
    _check_shapes(spec, tensors, shown(where))
    return header_weights(spec, tensors, config, f"{shown(where)}/config.json", where)


def _check_shapes(spec: ModelSpec, tensors: Mapping[str, TensorSpec], where: str) -> None:
    """Embedding and first norm against the config: enough to see that they are not of one model."""
    first = next(spec.layer_tensors(0))
    wanted = {spec.embedding_tensor: (spec.vocab_size, spec.hidden_size), first.name: first.shape}
    for name, shape in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: no tensor {name}", hint="is it a checkpoint of this model?")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} is {list(tensors[name].shape)}, the config says {list(shape)}",
                hint="config.json and weights belong to different models",
            )


def _audit(model: Model, expect_parameters: float | None) -> None:
    """CheckpointError when a stated total, or the family's name, contradicts the shapes."""
    spec, config = model.spec, model.config
    stated = [(key, config[key]) for key in _STATED_KEYS if isinstance(config.get(key), int | float)]
    if expect_parameters is not None:
        stated.append(("--expect-params", expect_parameters))
    for key, value in stated:
        if abs(spec.parameters - value) > 0.02 * spec.parameters:
            raise _contradiction(spec, f"{key} says {value / 1e9:.1f} B parameters")
    names = [str(config.get("_name_or_path", "")), spec.name] if config else []
    for name in names:
        family = family_spec(name) if name else None
        if family is not None:
            for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"):
                if getattr(family, key) != getattr(spec, key):
                    raise _contradiction(spec, f"{family.name} has {key} {getattr(family, key)}")


def _contradiction(spec: ModelSpec, other: str) -> CheckpointError:
    return CheckpointError(
        f"the config contradicts itself: hidden_size {spec.hidden_size}, {spec.num_attention_heads} heads, "
        f"{spec.num_hidden_layers} layers make {spec.parameters / 1e9:.1f} B parameters, but {other}",
        hint="Qwen2.5-72B, for one, is hidden 8192 with 64 heads; take config.json from the model's own repository",
    )
