"""Bits to a byte budget: the recipe with the least predicted KL whose checkpoint is at most so large, exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from qwenq.checkpoint.shards import NOTHING, Beside, shard_file_bytes, stored_files
from qwenq.errors import HonestNo, PlanError
from qwenq.formats.base import GROUP_SIZES, Recipe, Scheme, get_format, of_most_weights
from qwenq.io.gguf import ALIGNMENT, BlockTensor
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case
from qwenq.planning.escapes import least_utilization
from qwenq.planning.knapsack import solve
from qwenq.planning.sensitivity import OUTER, FusedGroup, Sensitivity, fused_groups, members_of, prior, schemes_for
from qwenq.planning.tensor_parallel import cut_by_input, padded_width, tensor_parallel_reasons, widens_with_ffn
from qwenq.planning.weights import recipe_weights
from qwenq.units import format_gb, format_tokens

DtypeOf = Callable[[str], str]
Choice = Mapping[FusedGroup, Scheme | None]


@dataclass(frozen=True)
class Budgeted:
    """The optimum, and what is known of it."""

    recipe: Recipe
    choice: Choice
    predicted_kl: float  # the sum of its fused groups' own
    file_bytes: int  # of the shards, headers included
    bits_per_linear_weight: float
    bound_kl: float | None  # no recipe within the budget is predicted to lose less; None for a recipe as given
    sensitivity: str  # where the prediction comes from
    target: str


def choose_for_bytes(
    spec: ModelSpec,
    table: Sensitivity,
    target_bytes: int,
    dtype_of: DtypeOf,
    format: str = "gptq",
    *,
    beside: Beside = NOTHING,
    exact: bool = True,
) -> Budgeted:
    """Least predicted KL among recipes whose files, every byte counted, are at most `target_bytes`.

    Sizes of headers are counted from above, by a few bytes per layer. HonestNo, with the range, for a target out of it.
    exact False: a quick good recipe instead of the best one, for trying many targets.
    """
    fixed = fixed_bytes(spec, dtype_of, format, beside)
    costs = {fused: group_costs(spec, table, fused, dtype_of, format) for fused in fused_groups(spec, format)}
    smallest, whole = fixed + _least(costs.values()), file_bytes(spec, Recipe(None, (), format), dtype_of, beside)
    reach = f"reachable: {format_gb(smallest)} to below {format_gb(whole)} ({smallest} to {whole - 1} bytes)"
    if target_bytes < smallest:
        raise HonestNo(
            f"{spec.name}: the smallest recipe takes {format_gb(smallest)}, the target is {format_gb(target_bytes)}",
            hint=reach,
        )
    if target_bytes >= whole:
        raise HonestNo(
            f"{spec.name}: in 16 bit it takes {format_gb(whole)}, no more than the target of "
            f"{format_gb(target_bytes)}: there is nothing to quantize",
            hint=reach,
        )
    choice, bound = _solved(table, costs, target_bytes - fixed, exact=exact)
    found = describe_choice(spec, table, choice, dtype_of, format, target=format_gb(target_bytes), beside=beside)
    assert found.file_bytes <= target_bytes
    return replace(found, bound_kl=bound)


def reachable_bytes(
    spec: ModelSpec, table: Sensitivity, dtype_of: DtypeOf, format: str = "gptq", beside: Beside = NOTHING
) -> tuple[int, int]:
    """The least target there is a recipe for, and the bytes in 16 bit, which a target must be below."""
    costs = [group_costs(spec, table, fused, dtype_of, format) for fused in fused_groups(spec, format)]
    fixed = fixed_bytes(spec, dtype_of, format, beside)
    return fixed + _least(costs), file_bytes(spec, Recipe(None, (), format), dtype_of, beside)


def _least(costs: Iterable[Mapping[Scheme | None, int]]) -> int:
    """The cheapest options of all fused groups together."""
    return sum(min(options.values()) for options in costs)


def choose_for_bits(
    spec: ModelSpec,
    table: Sensitivity,
    bits: Fraction,
    dtype_of: DtypeOf,
    format: str = "gptq",
    *,
    beside: Beside = NOTHING,
) -> Budgeted:
    """Least predicted KL among recipes of at most `bits` stored bits per linear weight (codes, scales, zero points).

    Embedding and head count with them in a format that quantizes them.
    """
    form = get_format(format)
    costs = {
        fused: {
            scheme: sum(form.stored_bits(scheme, lin) for lin in members_of(spec, fused))
            for scheme in _held(spec, table, fused, format)
        }
        for fused in fused_groups(spec, format)
    }
    outer = spec.outer_linears if form.outer else ()
    per = "per weight, embedding and head included," if outer else "per linear weight"
    weights = spec.linear_parameters + sum(lin.parameters for lin in outer)
    smallest = Fraction(_least(costs.values()), weights)
    if not smallest <= bits < 16:
        raise HonestNo(
            f"{spec.name}: {float(bits):g} bits {per} are out of reach",
            hint=f"reachable: {math.ceil(smallest * 10_000) / 10_000:.4f} to below 16",
        )
    choice, bound = _solved(table, costs, bits * weights // 1)
    assert sum(costs[fused][scheme] for fused, scheme in choice.items()) <= bits * weights
    target = f"{float(bits):g} bits {per.rstrip(',')}"
    return replace(describe_choice(spec, table, choice, dtype_of, format, target=target, beside=beside), bound_kl=bound)


def describe_choice(
    spec: ModelSpec,
    table: Sensitivity,
    choice: Choice,
    dtype_of: DtypeOf,
    format: str = "gptq",
    *,
    target: str = "as written",
    beside: Beside = NOTHING,
) -> Budgeted:
    """A choice that is already made, with its size and the sum of its fused groups' own KL."""
    recipe = recipe_of(spec, choice, format)
    return Budgeted(
        recipe=recipe,
        choice=choice,
        predicted_kl=sum(table.loss(fused, choice[fused]) for fused in fused_groups(spec, format)),
        file_bytes=file_bytes(spec, recipe, dtype_of, beside),
        bits_per_linear_weight=recipe.bits_per_linear_weight(spec),
        bound_kl=None,
        sensitivity=table.source,
        target=target,
    )


def recipe_of(spec: ModelSpec, choice: Choice, format: str = "gptq") -> Recipe:
    """The recipe of a choice: the scheme of most weights in layers is the default, the rest are overrides."""
    default = of_most_weights(
        (lin, scheme) for fused, scheme in choice.items() if fused[0] != OUTER for lin in members_of(spec, fused)
    )
    return Recipe(
        default,
        tuple(
            (lin.name, choice[fused])
            for fused in fused_groups(spec, format)
            if fused[0] == OUTER or choice[fused] != default
            for lin in members_of(spec, fused)
        ),
        format,
    )


def file_bytes(spec: ModelSpec, recipe: Recipe, dtype_of: DtypeOf, beside: Beside = NOTHING) -> int:
    """Bytes of all files, headers included."""
    return stored_files(spec, recipe, dtype_of, beside).file_bytes


def group_costs(
    spec: ModelSpec, table: Sensitivity, fused: FusedGroup, dtype_of: DtypeOf, format: str = "gptq"
) -> dict[Scheme | None, int]:
    """Bytes of a fused group's tensors and of their entries in the header, by scheme; never too few.

    Entries are counted as the last layer's, whose names are longest: so that equal shapes cost the same in all layers.
    """
    members, form = members_of(spec, fused), get_format(format)
    costs: dict[Scheme | None, int] = {}
    if form.whole_file:  # entries of a header are as long for one type as for another
        for scheme in _held(spec, table, fused, format):
            tensors = (t for lin in members for t in form.linear_tensors(scheme, lin, dtype_of))
            sizes = (BlockTensor(t.name, t.dtype, t.shape).nbytes for t in tensors)
            costs[scheme] = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        return costs
    whole = sum(t.nbytes for t in spec.layer_tensors(fused[0], "F32"))
    longer = len(str(spec.num_hidden_layers - 1)) - len(str(fused[0]))
    for scheme in _held(spec, table, fused, format):
        total = 0
        for tensor in (t for lin in members for t in form.linear_tensors(scheme, lin, dtype_of)):
            entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [whole, whole]}
            total += tensor.nbytes + len(json.dumps({tensor.name: entry}, separators=(",", ":"))) - 1 + longer
        costs[scheme] = total
    return costs


def fixed_bytes(spec: ModelSpec, dtype_of: DtypeOf, format: str = "gptq", beside: Beside = NOTHING) -> int:
    """Bytes that no choice changes: embedding, norms, head, and headers without the linears' entries; never too few.

    A layer's file is counted as if its norms alone were in it, with offsets of the longest kind.
    """
    if get_format(format).whole_file:
        none = Sensitivity("", "", {fused: {} for fused in fused_groups(spec, format)})
        chosen = (group_costs(spec, none, fused, dtype_of, format)[None] for fused in fused_groups(spec, format))
        whole = stored_files(spec, Recipe(None, (), format), dtype_of, beside)
        # smaller tensors make no more files; but they may be cut elsewhere, and each header is filled up
        spare = ALIGNMENT * len(whole.names) if len(whole.names) > 1 else 0
        return whole.file_bytes - sum(chosen) + spare
    files = stored_files(spec, Recipe(None), dtype_of).parts
    total = shard_file_bytes(files[0]) + shard_file_bytes(files[-1])
    for layer in range(spec.num_hidden_layers):
        owned = {lin.name for lin in spec.layer_linears(layer)}
        rest = [t for t in files[layer + 1] if t.name.rpartition(".")[0] not in owned]
        digits = len(str(sum(t.nbytes for t in spec.layer_tensors(layer, "F32"))))
        total += shard_file_bytes(rest) + 2 * digits * len(rest) + 7
    return total


def _held(spec: ModelSpec, table: Sensitivity, fused: FusedGroup, format: str) -> list[Scheme | None]:
    """Options of a fused group: the table's schemes that the format offers in mixtures, and 16 bit."""
    offered = set(schemes_for(spec, fused, get_format(format)))
    return [*(scheme for scheme in table.kl[fused] if scheme in offered), None]


def _solved(
    table: Sensitivity, costs: Mapping[FusedGroup, Mapping[Scheme | None, int]], budget: int, *, exact: bool = True
) -> tuple[Choice, float]:
    """The choice of least loss whose cost is within the budget, which the cheapest is, and a bound of any such loss."""
    options: list[Sequence[tuple[int, float]]] = [
        [(cost, table.loss(fused, scheme)) for scheme, cost in row.items()] for fused, row in costs.items()
    ]
    solution = solve(options, budget, exact=exact)
    assert solution is not None
    chosen = zip(costs.items(), solution.chosen, strict=True)
    return {fused: list(row)[k] for (fused, row), k in chosen}, solution.bound


_STEP = 0.001  # of the target: how finely it is searched


def choose_for_rig(
    case: Case, table: Sensitivity, dtype_of: DtypeOf, format: str = "gptq", beside: Beside = NOTHING
) -> Budgeted:
    """The recipe for the most bytes of weights that the rig holds beside KV cache and working memory.

    `case` has the 16-bit weights. HonestNo when they fit as they are, and when not even the smallest recipe does.
    """
    spec = case.spec
    asked = f"{case.hardware.label}, {format_tokens(case.work.context)} context, {case.engine.label}"

    dtype = dtype_of if get_format(format).whole_file else "BF16"  # such a file's tensors stay as they are

    def under(recipe: Recipe) -> Case:
        return replace(case, weights=recipe_weights(spec, recipe, dtype=dtype))

    def held(recipe: Recipe) -> bool:
        return bool(case.engine.how_held(under(recipe)))

    def choose(target_bytes: int, exact: bool = True) -> Budgeted:
        return choose_for_bytes(spec, table, target_bytes, dtype_of, format, beside=beside, exact=exact)

    smallest, whole = reachable_bytes(spec, table, dtype_of, format, beside)
    if case.engine.how_held(case):
        raise HonestNo(
            f"{spec.name}: its 16-bit weights ({format_gb(whole)}) fit {asked}: there is nothing to quantize",
            hint="give a --target-size to quantize anyway",
        )
    least = choose(smallest, exact=False).recipe
    if not held(least):
        hint = "a shorter --context, or another rig: qwenq plan MODEL --recommend"
        if flag := least_utilization(under(least)):
            size = f"{math.ceil(smallest / 1e7) / 100:.2f}GB"
            hint = f"served with {flag} it would: --target-size {size} instead of --fit; or {hint}"
        raise HonestNo(
            f"{spec.name}: even the smallest recipe ({format_gb(smallest)}) does not fit {asked}", hint=hint
        )
    low, high = smallest, whole - 1
    while high - low > _STEP * low:
        middle = (low + high) // 2
        recipe = choose(middle, exact=False).recipe
        low, high = (middle, high) if held(recipe) else (low, middle)
    while low > smallest:  # the best recipe of a size may be spread less evenly than the quick one
        found = choose(low)
        if held(found.recipe):
            return found
        low = max(smallest, round(low * (1 - 2 * _STEP)))
    return choose(smallest)


def widened(spec: ModelSpec, ranks: int, uniform: Recipe | None) -> ModelSpec:
    """The model with its FFN padded so that no group straddles `ranks` GPUs; PlanError when that cannot help.

    `uniform` is a recipe of one scheme; None for a mixture, which may have groups of every size that is offered.
    """
    down = o = uniform.default.group_size if uniform and uniform.default else -1
    if uniform is None:
        down, o = max(GROUP_SIZES), min(GROUP_SIZES)
    wide = replace(spec, intermediate_size=padded_width(spec.intermediate_size, down, ranks))
    groups = {stage.name: (down if widens_with_ffn(stage) else o,) for stage in cut_by_input(spec)}
    if reasons := tensor_parallel_reasons(wide, groups, ranks):
        raise PlanError(f"--pad-for-tp {ranks}: {reasons[0]}", hint="padding the FFN cannot change that")
    return wide


def widened_to(spec: ModelSpec, block: int) -> ModelSpec:
    """The model with its FFN padded to whole blocks of `block`; PlanError where that buys nothing."""
    if spec.intermediate_size % block == 0:
        raise PlanError(
            f"--pad-for-tp: the FFN of {spec.intermediate_size} already consists of whole blocks of {block}",
            hint="leave it out: llama.cpp splits between rows, and padding gains nothing here",
        )
    return replace(spec, intermediate_size=-(-spec.intermediate_size // block) * block)


def cut_by(spec: ModelSpec, table: Sensitivity, ranks: int) -> Sensitivity:
    """The table without schemes whose groups would straddle `ranks` GPUs."""
    widths = {stage.name: spec.size(stage.inputs) // ranks for stage in cut_by_input(spec)}
    kl = {
        fused: {s: kl for s, kl in row.items() if s is None or widths.get(fused[1], 0) % s.group_size == 0}
        for fused, row in table.kl.items()
    }
    return replace(table, kl=kl)


def sized_recipe(spec: ModelSpec, target_bytes: int, dtype_of: DtypeOf, ranks: int | None = None) -> Recipe:
    """The recipe of `quantize --target-size` before it has measured the model, `spec` widened for `ranks` GPUs."""
    table = prior(spec)
    if ranks is not None:
        table = cut_by(spec, table, ranks)
    return choose_for_bytes(spec, table, target_bytes, dtype_of).recipe
