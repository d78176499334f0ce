"""What the weights may cost on a rig: the largest recipe that the planner places there with its context."""

from __future__ import annotations

from qwenq.errors import HonestNo
from qwenq.formats.base import Recipe
from qwenq.model.spec import ModelSpec
from qwenq.planning.budget import Budgeted, DtypeOf, choose_for_bytes, reachable_bytes
from qwenq.planning.engines import Engine
from qwenq.planning.plan import how_held
from qwenq.planning.rig import Rig
from qwenq.planning.sensitivity import Sensitivity
from qwenq.planning.terms import Workload
from qwenq.planning.weights import recipe_weights
from qwenq.units import format_gb, format_tokens

_STEP = 0.001  # of the target: how finely it is searched


def choose_for_rig(
    spec: ModelSpec,
    table: Sensitivity,
    rig: Rig,
    engine: Engine,
    work: Workload,
    dtype_of: DtypeOf,
    format: str = "gptq",
) -> Budgeted:
    """The recipe for the most bytes of weights that `rig` holds beside KV cache and working memory.

    HonestNo when not even the smallest recipe fits, and when the 16-bit model fits as it is.
    """
    asked = f"{rig.label}, {format_tokens(work.context)} context, {engine.label}"

    def held(recipe: Recipe) -> bool:
        return bool(how_held(spec, recipe_weights(spec, recipe), rig, engine, work))

    smallest, whole = reachable_bytes(spec, table, dtype_of, format)
    if held(Recipe(None)):
        raise HonestNo(
            f"{spec.name}: its 16-bit weights ({format_gb(whole)}) fit {asked}: there is nothing to quantize",
            hint="name a size with --target-size to quantize all the same",
        )
    if not held(choose_for_bytes(spec, table, smallest, dtype_of, format, exact=False).recipe):
        raise HonestNo(
            f"{spec.name}: even the smallest recipe ({format_gb(smallest)}) does not fit {asked}",
            hint="a shorter --context, or another rig: qwenq plan MODEL --recommend",
        )
    low, high = smallest, whole - 1
    while high - low > _STEP * low:
        middle = (low + high) // 2
        recipe = choose_for_bytes(spec, table, middle, dtype_of, format, exact=False).recipe
        low, high = (middle, high) if held(recipe) else (low, middle)
    while low > smallest:  # the best recipe of a size may be spread less evenly than the quick one
        found = choose_for_bytes(spec, table, low, dtype_of, format)
        if held(found.recipe):
            return found
        low = max(smallest, round(low * (1 - 2 * _STEP)))
    return choose_for_bytes(spec, table, smallest, dtype_of, format)
