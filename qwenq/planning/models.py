"""From what a user calls a model to its shapes and its weights: a family name, a directory or a hub name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError, PlanError, UsageError
from qwenq.escaping import printable
from qwenq.formats.base import Recipe, Scheme
from qwenq.io.json import inside, read_object, shown
from qwenq.io.safetensors import INDEX_NAME, TensorSpec, checkpoint_tensors
from qwenq.model.spec import ModelSpec, family_spec, near_names, refuse_experts, spec_from_config
from qwenq.planning.ggufsize import BITS_TO_TYPE, gguf_weights
from qwenq.planning.weights import Weights, header_weights, published_weights, recipe_weights

_PUBLISHED = re.compile(r"(.*?)-(GPTQ-Int[48]|AWQ|FP8)", re.IGNORECASE)
_STATED_KEYS = ("num_parameters", "total_parameters", "n_params", "parameters")


@dataclass(frozen=True)
class Model:
    """A model's shapes, and where they came from; `directory` holds its headers when it is on disk."""

    spec: ModelSpec
    config: Mapping[str, Any]
    directory: Path | None = None
    hub: str = ""  # its hub name, when config.json came from there
    published: str = ""  # GPTQ-Int4, GPTQ-Int8, AWQ, FP8 when the name says so


def load_spec(model: str) -> ModelSpec:
    """Shapes of a family name, a directory with a config.json, or a hub name."""
    return load_model(model).spec


def load_model(model: str, expect_parameters: float | None = None) -> Model:
    """A model by family name, directory or hub name, its stated totals checked against its shapes."""
    found = _find(model)
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


def model_weights(model: Model, asked: WeightsAsked = WeightsAsked()) -> Weights:
    """The weights asked for; PlanError or UsageError for what the model cannot have.

    With nothing asked, headers of a directory or hub model count, else 4 bits in groups of 128.
    """
    spec, bits, ranks = model.spec, asked.bits, asked.pad_for_tp
    if asked.checkpoint is not None:
        _refuse_padding(ranks)
        return _checkpoint_weights(spec, asked.checkpoint, read_object(inside(asked.checkpoint, "config.json")))
    mixed = {"--target-size": asked.target_bytes, "--recipe": asked.recipe}
    if asked.gguf:
        return _gguf(spec, bits, mixed | {"--group-size": asked.group_size, "--pad-for-tp": ranks})
    if all(value is None for value in (bits, asked.group_size, *mixed.values())):
        found = _own_weights(model)
        if found is not None:
            _refuse_padding(ranks)
            return found
    if any(value is not None for value in mixed.values()):
        return _mixed_weights(model, asked)
    scheme = Scheme(4 if bits in (None, 16) else bits, 128 if asked.group_size is None else asked.group_size)
    uniform = Recipe(None if bits == 16 else scheme)
    if ranks is not None:
        if bits == 16:
            _refuse_padding(ranks)
        from qwenq.planning.budget import widened

        spec = widened(spec, ranks, uniform)
    uniform.check(spec)
    return recipe_weights(spec, uniform)


def _mixed_weights(model: Model, asked: WeightsAsked) -> Weights:
    """Weights of several schemes: by a recipe file, or by the recipe that a size asks for."""
    from qwenq.planning.budget import sized_recipe, widened
    from qwenq.planning.recipefile import saved_recipe

    spec, ranks, dtype_of = model.spec, asked.pad_for_tp, source_dtypes(model)
    spec = widened(spec, ranks, None) if ranks is not None else spec
    if asked.recipe is not None:
        chosen, source = saved_recipe(spec, asked.recipe), "every tensor of the recipe, byte for byte"
    else:
        assert asked.target_bytes is not None
        chosen = sized_recipe(spec, asked.target_bytes, dtype_of, ranks)
        source = "every tensor of the recipe that the prior chooses, byte for byte"
    chosen.check(spec)
    return recipe_weights(spec, chosen, dtype=dtype_of, source=source)


def _own_weights(model: Model) -> Weights | None:
    """Weights of the model's own files; None where there are none to be asked."""
    if model.published:
        return published_weights(model.spec, model.published)
    stored = _stored_tensors(model)
    return _of_headers(model.spec, stored, model.config, str(model.directory or model.hub)) if stored else None


def _stored_tensors(model: Model) -> dict[str, TensorSpec]:
    """Headers of a directory or hub model; empty for a family, and for a directory without weights."""
    if model.directory is not None:
        if not _has_tensors(model.directory):
            return {}
        return {name: location.spec for name, location in checkpoint_tensors(model.directory).items()}
    if not model.hub:
        return {}
    from qwenq.io.hub import fetch_headers

    return {name: location.spec for name, location in fetch_headers(model.hub).items()}


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
    stored = _stored_tensors(model)
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


def _gguf(spec: ModelSpec, bits: int | None, others: Mapping[str, object]) -> Weights:
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]} is for what quantize writes, llama.cpp reads GGUF", hint="use --bits 4, 8 or 16")
    bits = 4 if bits is None else bits
    if bits not in BITS_TO_TYPE:
        raise UsageError(f"bits is {bits}, wanted 4, 8 or 16")
    return gguf_weights(spec, BITS_TO_TYPE[bits])


def _refuse_padding(ranks: int | None) -> None:
    if ranks is not None:
        raise PlanError(
            f"--pad-for-tp {ranks} is for what quantize writes, these weights are as they are",
            hint="give --bits 4 or 8, --target-size or --recipe too",
        )


def _find(model: str) -> Model:
    path = Path(model)
    if (path / "config.json").is_file():
        config = read_object(inside(path, "config.json"))
        spec = spec_from_config(config, where=shown(str(path / "config.json")), name=printable(path.resolve().name))
        return Model(spec, config, directory=path)
    match = _PUBLISHED.fullmatch(model)
    for name, published in ((model, ""), (match[1], match[2]) if match else ("", "")):
        spec_found = family_spec(name) if name else None
        if spec_found is not None:
            return Model(spec_found, {}, published=published)
    if not path.exists():
        refuse_experts(model)
    if path.is_dir():
        raise CheckpointError(f"{shown(model)}: no config.json", hint="give the folder of a Hugging Face checkpoint")
    if path.exists() or model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise CheckpointError(
            f"{shown(model)}: neither a directory nor a shipped model",
            hint=near_names(model),
        )
    return _from_hub(model)


def _from_hub(model: str) -> Model:
    from qwenq.io.hub import fetch_config  # asks the network, so only when a name is the hub's

    config = read_object(inside(fetch_config(model), "config.json"))
    spec = spec_from_config(config, where=f"{shown(model)} config.json", name=model.split("/")[1])
    return Model(spec, config, hub=model)


def _has_tensors(directory: Path) -> bool:
    return (directory / INDEX_NAME).exists() or any(directory.glob("*.safetensors"))


def _checkpoint_weights(spec: ModelSpec, directory: Path, config: Mapping[str, Any]) -> Weights:
    tensors = {name: location.spec for name, location in checkpoint_tensors(directory).items()}
    return _of_headers(spec, tensors, config, str(directory))


def _of_headers(spec: ModelSpec, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Weights:
    _check_shapes(spec, tensors, shown(where))
    return header_weights(spec, tensors, config, f"{shown(where)}/config.json")


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
                hint="config.json and weights are not of one model",
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
