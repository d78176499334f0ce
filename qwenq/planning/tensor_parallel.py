"""Over how many GPUs tensor parallelism can cut a checkpoint, why not over others, and how far to pad for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qwenq.scheme import Recipe
from qwenq.spec import ModelSpec

SIZES = (1, 2, 4, 8)  # that tables show
RowGroups = Mapping[str, tuple[int, ...]]  # "o", "down" -> group sizes met in linears cut by input


def tensor_parallel_reasons(spec: ModelSpec, groups: RowGroups, ranks: int) -> list[str]:
    """Why `ranks` GPUs cannot cut the model; empty when they can.

    Linears before attention and activation split by output (heads, FFN width), those after (o, down) by input, where no
    quantization group may straddle two ranks. With one scale a row (group size -1) every rank keeps all scales. Engines
    pad the vocabulary themselves.
    """
    reasons = []
    heads, kv_heads, inner = spec.num_attention_heads, spec.num_key_value_heads, spec.intermediate_size
    if heads % ranks:
        reasons.append(f"{heads} heads are not divisible by {ranks}")
    if kv_heads % ranks and ranks % kv_heads:
        reasons.append(f"{kv_heads} KV heads cannot be shared out or copied evenly over {ranks}")
    if inner % ranks:
        reasons.append(f"FFN width {inner} is not divisible by {ranks}")
    if reasons:
        return reasons
    for unit, width, what in (("down", inner, "FFN width"), ("o", spec.q_size, "attention width")):
        straddling = [g for g in sorted(groups.get(unit, ()), reverse=True) if g > 0 and (width // ranks) % g]
        if straddling:
            reasons.append(
                f"{what} {width} / {ranks} = {width // ranks} is not a multiple of the group size {straddling[0]}, "
                "so a quantization group would straddle ranks"
            )
    return reasons


def tensor_parallel_sizes(spec: ModelSpec, groups: RowGroups) -> dict[str, str]:
    """`1`, `2`, `4` and `8` with why not, or nothing where it works; what padding the FFN would allow is said."""
    found = {}
    for ranks in SIZES:
        reasons = tensor_parallel_reasons(spec, groups, ranks)
        wider = padded_width(spec.intermediate_size, max(groups.get("down", ()), default=1), ranks)
        if reasons and all("FFN" in reason for reason in reasons):
            reasons[0] += f" (--pad-for-tp {ranks} makes it {wider})"
        found[str(ranks)] = "; ".join(reasons)
    return found


def row_groups(spec: ModelSpec, recipe: Recipe) -> RowGroups:
    """Group sizes of the linears that tensor parallelism cuts by input."""
    found: dict[str, set[int]] = {"o": set(), "down": set()}
    for lin in spec.linears:
        scheme = recipe.scheme_of(lin)
        if lin.unit in found and scheme is not None:
            found[lin.unit].add(scheme.group_size)
    return {unit: tuple(sorted(sizes)) for unit, sizes in found.items()}


def same_groups(sizes: Iterable[int]) -> RowGroups:
    """Groups of unknown place: met everywhere."""
    return dict.fromkeys(("o", "down"), tuple(sizes))


def padded_width(width: int, group: int, ranks: int) -> int:
    """Smallest FFN width from `width` on whose groups no rank shares (29696 for 29568, g128 and up to 8 ranks).

    Without groups (-1, or 16 bit) widths stay multiples of the 8 codes of an int32 word.
    """
    step = max(group, 8) * ranks
    return -(-width // step) * step
