"""A model's weight bytes by place: embedding, layers, norm, head; of a recipe, a published format or real headers."""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from qwenq.errors import CheckpointError, PlanError, UnreadScheme
from qwenq.escaping import printable
from qwenq.formats.base import (
    FORMATS,
    SIZED,
    Recipe,
    SizedOnly,
    get_format,
    method_of,
    read_quantization_config,
    stated,
)
from qwenq.io.safetensors import TensorSpec
from qwenq.machine import Compute
from qwenq.model.spec import ModelSpec
from qwenq.planning.kernels import LayerParts, choose, dense_from, kept, layer_parts, row_block_bytes
from qwenq.planning.tensor_parallel import RowGroups, row_groups, same_groups
from qwenq.units import MIB


@dataclass(frozen=True)
class Weights:
    """Tensor sizes in bytes by place, as stored. A tied head is stored once, with the embedding."""

    label: str  # 4-bit g128
    method: str  # none, gptq, awq, compressed-tensors, bitsandbytes, fp8, gguf, or as config.json names another
    bits: int  # of most linears; 16 when not quantized
    group_size: int  # the largest group in use, 0 without groups, -1 for one group a row
    embed: tuple[int, ...]
    norm: tuple[int, ...]
    head: tuple[int, ...]  # empty when tied
    layers: tuple[tuple[int, ...], ...]
    widest_linear: int  # most weights in one linear; 0 when none is quantized
    intermediate_size: int  # as stored, padding included
    source: str
    row_groups: RowGroups = field(default_factory=dict)  # of linears that tensor parallelism cuts by input
    parts: tuple[LayerParts, ...] = ()  # layers as this project's own engine reads them; empty: it keeps them as stored
    row_block_bytes: int = 0  # of `kept`: most that one row block takes while weights are written out
    dense_from: int = 1  # of `kept`: rows from which they are
    place: str = ""  # the directory, GGUF file or hub name that has them; empty: planned

    def kept(self, compute: Compute) -> Weights:
        """The same with layers as this project's own engine keeps them in memory when it computes like that."""
        if not self.parts:
            return self
        if compute not in self._kept:
            packed = {shape for part in self.parts for shape in part.packed}
            sizes = {shape: kept(shape, compute) for shape in packed}
            self._kept[compute] = replace(
                self,
                layers=tuple(
                    (*(size for shape in part.packed for size in sizes[shape]), *part.others) for part in self.parts
                ),
                parts=(),
                row_block_bytes=max((row_block_bytes(shape, compute) for shape in packed), default=0),
                dense_from=min((dense_from(choose(s, compute).kind, compute.device) for s in packed), default=1),
                source=f"{self.source}, as kernels store it" if packed else self.source,
            )
        return self._kept[compute]

    @cached_property
    def _kept(self) -> dict[Compute, Weights]:
        return {}

    @cached_property
    def by_share(self) -> dict[Any, int]:
        """Bytes of a server's ranks, as far as they were asked for."""
        return {}

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        return tuple(sum(layer) for layer in self.layers)

    @cached_property
    def layer_sums(self) -> tuple[int, ...]:
        """Bytes of the first layers: 0, one, two, ..., all of them."""
        return tuple(accumulate(self.layer_bytes, initial=0))

    @cached_property
    def allocated(self) -> tuple[int, tuple[int, ...], int]:
        """Embedding, each layer, norm with head, as torch's allocator counts them when loaded in this order."""
        embed, *layers, last = allocated_groups([self.embed, *self.layers, (*self.norm, *self.head)])
        return embed, tuple(layers), last

    @cached_property
    def allocated_sums(self) -> tuple[int, ...]:
        """Bytes that the allocator counts for the first layers: 0, one, two, ..., all of them."""
        return tuple(accumulate(self.allocated[1], initial=0))

    def stored_spec(self, spec: ModelSpec) -> ModelSpec:
        """The model with the FFN as wide as it is stored."""
        width = self.intermediate_size
        return spec if spec.intermediate_size == width else replace(spec, intermediate_size=width)

    @cached_property
    def total_bytes(self) -> int:
        return sum(self.embed) + sum(self.norm) + sum(self.head) + sum(self.layer_bytes)

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "bytes": self.total_bytes, "source": self.source}


def recipe_weights(
    spec: ModelSpec,
    recipe: Recipe,
    label: str = "",
    dtype: str | Callable[[str], str] = "BF16",
    source: str = "every tensor of the scheme, byte for byte",
) -> Weights:
    """Weights stored by `recipe`; what it leaves out is stored in `dtype`, one or one a name."""
    declared = declared_by_recipe(spec, recipe)
    kinds = recipe.layer_kinds(spec, dtype)
    tensors = {layer: tuple(recipe.layer_tensors(spec, layer, dtype)) for layer in sorted(set(kinds))}
    sizes = {layer: tuple(t.nbytes for t in found) for layer, found in tensors.items()}
    parts = {layer: layer_parts(spec, layer, {t.name: t for t in found}, recipe) for layer, found in tensors.items()}
    return Weights(
        label=label or recipe.label,
        method=declared.method,
        bits=declared.bits,
        group_size=declared.group_size,
        layers=tuple(sizes[layer] for layer in kinds),
        widest_linear=_widest_linear(spec, declared),
        intermediate_size=spec.intermediate_size,
        source=source,
        row_groups=declared.row_groups,
        parts=tuple(parts[layer] for layer in kinds),
        **_outer(spec, recipe.outer_tensors(spec, dtype)),
    )


def published_recipe(quant: str) -> Recipe | None:
    """The recipe of the publisher's own files of that name; None for another name, or one that no format here reads."""
    name = quant.upper().replace("_", "-")
    found = ((form, scheme) for form in FORMATS.values() for known, scheme in form.published if known == name)
    return next((Recipe(scheme, format=form.name) for form, scheme in found), None)


def published_spec(spec: ModelSpec) -> ModelSpec:
    """The model as the publisher's own quantized files have it, its FFN perhaps padded."""
    return replace(spec, intermediate_size=spec.official_quantized_intermediate_size or spec.intermediate_size)


def published_weights(spec: ModelSpec, quant: str) -> Weights:
    """Weights of the publisher's own files: `BF16`, `GPTQ-Int4`, `GPTQ-Int8`, `AWQ`, `FP8` (group 128)."""
    name = quant.upper().replace("_", "-")
    if name in ("BF16", "FP16", "F16"):
        return recipe_weights(spec, Recipe(None), label=quant)
    spec = published_spec(spec)
    if (recipe := published_recipe(quant)) is not None:
        return recipe_weights(spec, recipe, label=quant, dtype="F16")
    for sized in SIZED.values():
        if name in sized.published:
            return _sized_weights(spec, quant, sized, dtype="BF16")
    raise PlanError(f"unknown quantization {quant!r}", hint="one of BF16, GPTQ-Int4, GPTQ-Int8, AWQ, FP8")


BITS_TO_TYPE = {4: "Q4_K_M", 8: "Q8_0", 16: "F16"}  # of GGUF
_GGUF_ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}  # llama-quantize's own


def gguf_types() -> tuple[str, ...]:
    """Names of llama.cpp's mixtures, largest first."""
    return get_format("gguf").mixtures


def is_gguf_type(name: str) -> bool:
    """Whether it is the name of a mixture, in any case."""
    return name.upper() in (*gguf_types(), *_GGUF_ALIASES)


@lru_cache(maxsize=64)
def gguf_weights(spec: ModelSpec, file_type: str) -> Weights:
    """Weights of a GGUF of `file_type` (`Q4_K_M`, `Q8_0`, ...), without the file's header.

    Checked against published files of Qwen2.5 (tests/planning/test_weights.py).
    """
    form, name = get_format("gguf"), _GGUF_ALIASES.get(file_type.upper(), file_type.upper())
    if name not in form.mixtures:
        raise PlanError(f"unknown GGUF type {file_type!r}", hint=f"one of {', '.join(form.mixtures)}")
    sixteen = name if name in ("F16", "BF16") else "F16"
    return recipe_weights(
        spec,
        form.mixture(name, spec),
        label=f"GGUF {name}",
        dtype=lambda tensor: form.stored_dtype(tensor, sixteen),
        source="llama.cpp's type for each tensor",
    )


def header_weights(
    spec: ModelSpec,
    tensors: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    where: str = "config.json",
    place: str = "",
) -> Weights:
    """Weights of a real checkpoint, at `place`, from its headers; CheckpointError when they are not this model's.

    `where` is the config's name in what is refused: all that opening the checkpoint refuses.
    """
    layers: list[dict[str, TensorSpec]] = [{} for _ in range(spec.num_hidden_layers)]
    outer: dict[str, list[int]] = {"embed": [], "norm": [], "head": []}
    embedding = spec.architecture.embedding.rpartition(".")[2]
    layer_name = re.compile(rf"(?:^|\.){re.escape(spec.architecture.layers.rpartition('.')[2])}\.(\d+)\.")
    for tensor in tensors.values():
        match = layer_name.search(tensor.name)
        if match:
            if int(match[1]) >= len(layers):
                raise CheckpointError(f"{tensor.name}: config.json has only {len(layers)} layers")
            layers[int(match[1])][tensor.name] = tensor
        elif spec.architecture.head in tensor.name:
            if not spec.tie_word_embeddings:
                outer["head"].append(tensor.nbytes)
        else:
            outer["embed" if embedding in tensor.name else "norm"].append(tensor.nbytes)
    for layer, found in enumerate(layers):
        if not found:
            raise CheckpointError(f"no tensor of layer {layer}, config.json has {len(layers)} layers")
    declared = declared_by_config(spec, config, where)
    parts = tuple(
        layer_parts(spec, layer, found, declared.recipe, declared.sorted_columns)
        for layer, found in enumerate(layers)
        if declared.recipe
    )
    label = "checkpoint"
    source = "the checkpoint's own headers"
    if declared.unread:
        label += f", {printable(declared.method[:40])}{_UNREAD_SAID}"
        source += f" (not read by qwenq itself: {declared.unread})"
    return Weights(
        label=label,
        method=declared.method,
        bits=declared.bits,
        group_size=declared.group_size,
        embed=tuple(outer["embed"]),
        norm=tuple(outer["norm"]),
        head=tuple(outer["head"]),
        layers=tuple(tuple(tensor.nbytes for tensor in found.values()) for found in layers),
        widest_linear=_widest_linear(spec, declared),
        intermediate_size=spec.intermediate_size,
        source=source,
        row_groups=declared.row_groups,
        parts=parts,
        place=place,
    )


def _widest_linear(spec: ModelSpec, declared: Declared) -> int:
    return 0 if declared.method == "none" else max(lin.parameters for lin in spec.layer_linears(0))


def _outer(spec: ModelSpec, tensors: Iterable[TensorSpec]) -> dict[str, Any]:
    outer: dict[str, tuple[int, ...]] = {"embed": (), "norm": (), "head": ()}
    for tensor in tensors:
        key = {spec.embedding_tensor: "embed", spec.norm_tensor: "norm"}.get(tensor.name, "head")
        outer[key] += (tensor.nbytes,)
    return outer


_UNREAD_SAID = " that qwenq itself does not read"


def _sized_weights(spec: ModelSpec, label: str, sized: SizedOnly, dtype: str) -> Weights:
    linears = {lin.name + ".weight" for lin in spec.layer_linears(0)}
    sizes = [t.nbytes for t in spec.layer_tensors(0, dtype) if t.name not in linears]
    for lin in spec.layer_linears(0):
        sizes += sized.linear_bytes(lin)
    return Weights(
        label=f"{label}{_UNREAD_SAID}",
        method=sized.method,
        bits=sized.bits,
        group_size=sized.group_size,
        layers=(tuple(sizes),) * spec.num_hidden_layers,
        widest_linear=max(lin.parameters for lin in spec.layer_linears(0)),
        intermediate_size=spec.intermediate_size,
        source="every tensor of the format, byte for byte",
        row_groups=same_groups(spec, [sized.group_size]),
        **_outer(spec, spec.outer_tensors(dtype)),
    )


class Declared(NamedTuple):
    """Method and scheme of the weights; `recipe` says it linear by linear."""

    method: str  # none, gptq, awq, compressed-tensors, bitsandbytes, or as config.json names another
    bits: int  # of most linears; 16 when not quantized, or not said
    group_size: int  # the largest group in use, 0 without groups, -1 for one group a row
    row_groups: RowGroups
    recipe: Recipe | None  # None: a scheme that this version does not read
    unread: str = ""  # why it does not
    sorted_columns: bool = False  # GPTQ that stored its columns out of order


def declared_by_recipe(spec: ModelSpec, recipe: Recipe, sorted_columns: bool = False) -> Declared:
    """The declaration of a recipe's checkpoint."""
    bits, sizes = Counter[int](), set[int]()
    for layer, count in Counter(recipe.layer_kinds(spec)).items():
        for lin in spec.layer_linears(layer):
            if (scheme := recipe.scheme_of(lin)) is not None:
                bits[scheme.bits] += count
                sizes.add(scheme.group_size)
    return Declared(
        method=get_format(recipe.format).method if bits else "none",
        bits=bits.most_common(1)[0][0] if bits else 16,
        group_size=max(sizes, default=0),
        row_groups=row_groups(spec, recipe),
        recipe=recipe,
        sorted_columns=sorted_columns,
    )


def declared_by_config(spec: ModelSpec, config: Mapping[str, Any], where: str) -> Declared:
    """The declaration of config.json, read and refused as when the checkpoint is opened.

    A scheme that this version does not read is no reason not to size the weights: then what is stated is believed.
    """
    found = config.get("quantization_config")
    if not found:
        return declared_by_recipe(spec, Recipe(None))
    try:
        quantization = read_quantization_config(found, where)
    except UnreadScheme as error:
        return _as_stated(spec, found, error.message)
    recipe = quantization.recipe(spec)
    recipe.check(spec)
    return declared_by_recipe(spec, recipe, quantization.sorted_columns)


def _as_stated(spec: ModelSpec, config: Mapping[str, Any], unread: str) -> Declared:
    bits, groups = stated(config)
    return Declared(
        method=method_of(config),
        bits=Counter(bits).most_common(1)[0][0] if bits else 16,
        group_size=max(groups, default=0),
        row_groups=same_groups(spec, sorted(set(groups))),
        recipe=None,
        unread=unread,
    )


def allocated_bytes(sizes: Iterable[int], free: list[int] | None = None) -> int:
    """`torch.cuda.memory_allocated` after tensors of these sizes, loaded in this order and never freed.

    Rules of c10/cuda/CUDACachingAllocator.cpp: sizes round up to 512 bytes; up to 1 MiB come from a pool of small
    blocks; larger ones take the best-fitting free block, else a new segment of 20 MiB (below 10 MiB) or of whole 2 MiB;
    a block is split only when more than 1 MiB would be left, otherwise all of it counts as allocated. `free`: sizes of
    free blocks, ascending, which are taken and left; none on an empty GPU.
    """
    counted, free = 0, [] if free is None else free
    for size in sizes:
        wanted = -(-size // 512) * 512
        if wanted > MIB:
            fit = bisect_left(free, wanted)
            block = free.pop(fit) if fit < len(free) else _segment(wanted)
            if block - wanted > MIB:
                insort(free, block - wanted)
            else:
                wanted = block
        counted += wanted
    return counted


def _segment(wanted: int) -> int:
    """Bytes of a new segment for a large tensor."""
    return 20 * MIB if wanted < 10 * MIB else -(-wanted // (2 * MIB)) * (2 * MIB)


def allocated_groups(groups: Sequence[tuple[int, ...]]) -> list[int]:
    """`allocated_bytes` of groups of tensors loaded one after the other, of each; equal layers soon repeat themselves.

    They do where a group meets the same free blocks again, without those too small for any large tensor.
    """
    least = min((size for group in set(groups) for size in group if size > MIB), default=0)
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
    found, free = [], tuple[int, ...]()
    for group in groups:
        if (group, free) not in known:
            left = list(free)
            n_bytes = allocated_bytes(group, left)
            known[group, free] = n_bytes, tuple(block for block in left if block >= least)
        n_bytes, free = known[group, free]
        found.append(n_bytes)
    return found


def allocated_equal(size: int, count: int) -> int:
    """`allocated_bytes` of `count` tensors of one size, in closed form: what is left of a segment serves the next."""
    wanted = -(-size // 512) * 512
    if wanted <= MIB:
        return wanted * count
    each, left = divmod(_segment(wanted), wanted)
    kept = left if left <= MIB else 0  # with the segment's last tensor
    return wanted * count + kept * (count // each)
