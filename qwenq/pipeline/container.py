"""What a file that is a whole model holds beside its tensors: shapes, tokenizer, origin, sampling. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.checkpoint.shards import NOTHING, Beside
from qwenq.formats.base import Recipe, get_format
from qwenq.io.json import inside, read_object, shown
from qwenq.model.metadata import (
    GENERATION_NAME,
    ROPE_FACTORS,
    metadata_of_config,
    metadata_of_generation,
    rope_factors,
)
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.card import HUB_NAME, source_license
from qwenq.pipeline.config import QuantizeConfig
from qwenq.pipeline.source import Shapes
from qwenq.text.vocabulary import metadata_of_tokenizer
from qwenq.units import parse_size

if TYPE_CHECKING:
    from qwenq.checkpoint.reader import Checkpoint


def container_of(
    spec: ModelSpec,
    recipe: Recipe,
    config: Mapping[str, Any],
    directory: Path | None,
    mixture: str = "",
    split_size: str | None = None,
) -> Beside:
    """For the files of a model stored by `recipe`; nothing where its container has files beside it for all of this.

    config: its config.json. directory: None where the model is not on this machine: then its tokenizer is missing.
    mixture: the recipe's name, if it has one. CheckpointError for a tokenizer that cannot be written.
    """
    form = get_format(recipe.format)
    if not form.whole_file:
        return NOTHING
    shapes = metadata_of_config(spec, config)
    architecture = "general.architecture"
    metadata: dict[str, Any] = {architecture: shapes.pop(architecture), "general.type": "model"}
    metadata |= dict(_origin(spec, directory))
    metadata |= form.file_metadata(recipe, mixture) | shapes
    if directory is not None:
        metadata |= metadata_of_tokenizer(directory, spec.vocab_size)
    factors = rope_factors(spec, config)
    types = mixture or ("mixed" if recipe.mixed else recipe.label)
    stem = f"{spec.name.rpartition('/')[2] or 'model'}-{types}"
    split_bytes = None if split_size is None else parse_size(split_size)
    return Beside(stem, metadata, split_bytes, {} if factors is None else {ROPE_FACTORS: factors})


def containers(
    source: Checkpoint | Shapes, config: QuantizeConfig
) -> Callable[[ModelSpec, Recipe], Beside]:
    """`container_of` for any shapes and recipe of a model that is quantized as configured."""
    return lambda spec, recipe: container_of(
        spec, recipe, source.config, source.directory, config.mixture, config.split_size
    )


def _origin(spec: ModelSpec, directory: Path | None) -> Iterator[tuple[str, Any]]:
    """Name, licence, and the model that it was made from."""
    yield "general.name", spec.name.rpartition("/")[2] or "model"
    yield "general.size_label", size_label(spec.parameters)
    yield "general.quantized_by", "qwenq"
    if directory is not None:
        path = inside(directory, GENERATION_NAME)
        settings = read_object(path) if path.is_file() else {}
        yield from metadata_of_generation(settings, shown(str(path)))
        for key, value in source_license(directory).items():
            yield f"general.{key.replace('_', '.')}", value
    if hub := HUB_NAME.fullmatch(spec.name):
        yield "general.base_model.count", 1
        yield "general.base_model.0.name", hub[2]
        yield "general.base_model.0.organization", hub[1]
        yield "general.base_model.0.repo_url", f"https://huggingface.co/{spec.name}"


def size_label(parameters: int) -> str:
    """The number of weights with two digits or more, as GGUF's naming convention has it: 494M, 7.6B, 73B."""
    factor, suffix = next(
        ((factor, suffix) for factor, suffix in ((1e-12, "T"), (1e-9, "B"), (1e-6, "M")) if parameters * factor > 1),
        (1e-3, "K"),
    )
    scaled = parameters * factor
    digits = max(0, 2 - len(str(round(scaled)).lstrip("0")))
    return f"{scaled:.{digits}f}{suffix}"
