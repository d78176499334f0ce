"""What is said of a checkpoint's weights as a whole: by a recipe, or by config.json, whatever tool wrote it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwenq.errors import UnreadScheme
from qwenq.formats.config import method_of, read_quantization_config
from qwenq.layout import BNB_FORMATS
from qwenq.planning.tensor_parallel import RowGroups, row_groups, same_groups
from qwenq.scheme import Recipe
from qwenq.spec import LinearSpec, ModelSpec


@dataclass(frozen=True)
class Declared:
    """Method and scheme of the weights; `recipe` says it linear by linear."""

    method: str  # none, gptq, awq, compressed-tensors, bitsandbytes, or as config.json names another
    bits: int  # of most linears; 16 when not quantized, or not said
    group_size: int  # the largest group in use, 0 without groups, -1 for one group a row
    row_groups: RowGroups
    recipe: Recipe | None  # None: a scheme that this version does not read
    unread: str = ""  # why it does not
    sorted_columns: bool = False  # GPTQ that stored its columns out of order

    def sym(self, lin: LinearSpec) -> bool:
        """Whether a linear has no zero points of its own."""
        scheme = self.recipe.scheme_of(lin) if self.recipe else None
        return scheme is None or scheme.sym


def declared_by_recipe(spec: ModelSpec, recipe: Recipe, sorted_columns: bool = False) -> Declared:
    """What a recipe's checkpoint declares."""
    schemes = [scheme for lin in spec.linears if (scheme := recipe.scheme_of(lin)) is not None]
    method = "bitsandbytes" if recipe.format in BNB_FORMATS else recipe.format
    return Declared(
        method=method if schemes else "none",
        bits=Counter(scheme.bits for scheme in schemes).most_common(1)[0][0] if schemes else 16,
        group_size=max((scheme.group_size for scheme in schemes), default=0),
        row_groups=row_groups(spec, recipe),
        recipe=recipe,
        sorted_columns=sorted_columns,
    )


def declared_by_config(spec: ModelSpec, config: Mapping[str, Any], where: str) -> Declared:
    """What config.json declares, read and refused as when the checkpoint is opened.

    A scheme that this version does not read is no reason not to size the weights: then what is stated is believed.
    """
    found = config.get("quantization_config")
    if not found:
        return declared_by_recipe(spec, Recipe(None))
    try:
        recipe = read_quantization_config(found, where).recipe(spec)
    except UnreadScheme as error:
        return _as_stated(found, error.message)
    recipe.check(spec)
    return declared_by_recipe(spec, recipe, found.get("desc_act") is True)


def _as_stated(config: Mapping[str, Any], unread: str) -> Declared:
    method = method_of(config)
    if method == "compressed-tensors":
        bits, groups = _compressed(config)
    elif method == "fp8":
        bits, groups = [8], _blocks(config.get("weight_block_size"))
    elif method == "bitsandbytes":
        bits, groups = [4], []  # what it has in 8 bits is read
    else:
        bits = _whole([config.get("bits", config.get("w_bit"))])
        groups = _whole([config.get("group_size", config.get("q_group_size"))])
    return Declared(
        method=method,
        bits=Counter(bits).most_common(1)[0][0] if bits else 16,
        group_size=max(groups, default=0),
        row_groups=same_groups(sorted(set(groups))),
        recipe=None,
        unread=unread,
    )


def _compressed(config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Bits and group sizes of all config groups."""
    groups = config.get("config_groups")
    found = [group.get("weights") for group in _objects(groups.values() if isinstance(groups, Mapping) else ())]
    bits = _whole(weights.get("num_bits") for weights in _objects(found))
    sizes = _whole(weights.get("group_size") for weights in _objects(found))
    return bits, sizes + [size for weights in _objects(found) for size in _blocks(weights.get("block_structure"))]


def _blocks(shape: Any) -> list[int]:
    """Columns of the blocks that share a scale, of their [rows, columns]."""
    return _whole(shape[1:2]) if isinstance(shape, list) else []


def _objects(values: Iterable[Any]) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)]


def _whole(values: Iterable[Any]) -> list[int]:
    return [value for value in values if type(value) is int and value]
