"""A model's parts, and whether its config, its tensors' headers and its stated totals agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwenq.checkpoint.contents import is_unused
from qwenq.escaping import shown
from qwenq.formats.base import Recipe, get_format, read_quantization_config, recognized
from qwenq.io.json import inside, read_object
from qwenq.io.safetensors import INDEX_NAME, MAX_HEADER_BYTES, TensorSpec
from qwenq.model.spec import ModelSpec
from qwenq.planning.tensor_parallel import sizes_of_recipe
from qwenq.planning.weights import published_recipe, published_spec

_TOLERANCE = 0.005  # stated totals are rounded: 72.7B
HEADERS = "the checkpoint's own headers"
SHIPPED = "shapes shipped with qwenq, no header was read"


@dataclass(frozen=True)
class Part:
    """One part of the model: parameters, and bytes as stored (or as the shipped shapes would take)."""

    name: str
    parameters: int
    stored_bytes: int


@dataclass(frozen=True)
class Audit:
    """The answer of `qwenq inspect`."""

    spec: ModelSpec
    scheme: str
    parameters: int
    parts: tuple[Part, ...]
    tensors_read: bool  # stored bytes are from headers, not from shapes
    source: str  # where the shapes are from: HEADERS or SHIPPED
    expected_parameters: float | None
    kv_bytes_per_token: float  # 16-bit keys and values
    tensor_parallel: dict[str, str]
    disagreements: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"spec": _spec_json(self.spec)}


def _spec_json(spec: ModelSpec) -> dict[str, Any]:
    """The spec's fields, and in the place of configuration keys which linears of the first layer have biases."""
    biased = {lin.kind for lin in spec.layer_linears(0) if lin.bias}
    fields = asdict(spec)
    del fields["bias_keys"]
    return fields | {
        "attention_bias": "q_proj" in biased,
        "o_bias": "o_proj" in biased,
        "mlp_bias": "down_proj" in biased,
        "qk_norm": bool(spec.architecture.qk_norms),
    }


def audit(
    spec: ModelSpec,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec] | None,
    *,
    shipped: Recipe | None = None,
    expect_parameters: float | None = None,
    index_total_bytes: int | None = None,
) -> Audit:
    """Compare shapes from the config with `tensors` (from headers; None without any) and with stated totals.

    `shipped`: how shapes that come with this project are stored, where there is neither config nor header.
    """
    quantization = config.get("quantization_config")
    recipe = shipped or Recipe(None)
    scheme = f"{recipe.default.label}, {recipe.format}" if recipe.default else "16-bit"
    problems: list[str] = []
    readable = True
    if quantization:
        readable = recognized(quantization) is not None
        if readable:
            recipe = read_quantization_config(quantization, "config.json").recipe(spec)
            scheme = f"{recipe.label}, {recipe.format}"
        else:  # a method this version cannot read: shapes and totals are still worth an audit
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else "unknown"
            scheme = shown(str(method), 40)
    if tensors is not None and readable:
        problems += _compare(recipe, spec, tensors)
    if expect_parameters is not None and abs(spec.parameters - expect_parameters) > _TOLERANCE * expect_parameters:
        problems.append(f"parameters: {expect_parameters:,.0f} expected, the shapes make {spec.parameters:,}")
    stored = sum(t.nbytes for t in tensors.values()) if tensors is not None else None
    if index_total_bytes is not None and stored is not None and index_total_bytes != stored:
        problems.append(f"total_size: the index says {index_total_bytes} bytes, the headers sum to {stored}")
    return Audit(
        spec=spec,
        scheme=scheme,
        parameters=spec.parameters,
        parts=_parts(spec, recipe.tensors(spec) if tensors is None else tensors.values()),
        tensors_read=tensors is not None,
        source=HEADERS if tensors is not None else SHIPPED,
        expected_parameters=expect_parameters,
        kv_bytes_per_token=spec.kv_bytes_per_token(),
        tensor_parallel=sizes_of_recipe(spec, recipe),
        disagreements=tuple(problems),
    )


def published_shapes(spec: ModelSpec, published: str) -> tuple[ModelSpec, Recipe]:
    """Shapes and scheme of the publisher's own files, `published` (GPTQ-Int4, AWQ); FP8's are shown in 16 bits."""
    recipe = published_recipe(published)
    return (spec, Recipe(None)) if recipe is None else (published_spec(spec), recipe)


def index_total(directory: Path) -> int | None:
    """`total_size` as the index of a sharded checkpoint states it."""
    if not (directory / INDEX_NAME).is_file():
        return None
    metadata = read_object(inside(directory, INDEX_NAME), limit=MAX_HEADER_BYTES).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    return int(total) if isinstance(total, int | float) else None


def _compare(recipe: Recipe, spec: ModelSpec, tensors: Mapping[str, TensorSpec]) -> list[str]:
    problems = []
    form, head = get_format(recipe.format), spec.architecture.head + "."
    packed_head = any(name.startswith(head) and name not in (head + "weight", head + "bias") for name in tensors)
    needed = {t.name: t for t in recipe.tensors(spec) if not (packed_head and t.name.startswith(head))}
    for name, want in needed.items():
        if form.lacks(tensors, name):
            problems.append(f"{name}: the config needs it, no shard has it")
        elif name in tensors and not form.same_shape(tensors[name], want):
            problems.append(f"{name}: shape {list(tensors[name].shape)}, the config says {list(want.shape)}")
    for name in tensors:
        unused = is_unused(spec, tensors[name], quantized=recipe.default is not None)
        if name not in needed and not unused and not (packed_head and name.startswith(head)):
            problems.append(f"{shown(name)}: stored, but the config has no place for it")
    return problems


def _parts(spec: ModelSpec, tensors: Iterable[TensorSpec]) -> tuple[Part, ...]:
    def part_of(name: str) -> str:
        names = spec.architecture
        if name.startswith(names.embedding):
            return "embedding (and head)" if spec.tie_word_embeddings else "embedding"
        if name.startswith(names.head):
            return "head"
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            return "norms"
        return "attention" if f".{names.attention}." in name else "mlp" if ".mlp." in name else "other"

    parameters, stored = Counter[str](), Counter[str]()
    for count, listed in ((parameters, spec.tensors("I8")), (stored, tensors)):
        for tensor in listed:
            count[part_of(tensor.name)] += tensor.nbytes
    return tuple(Part(name, parameters[name], stored[name]) for name in {**parameters, **stored})
