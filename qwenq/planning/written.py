"""What `qwenq quantize` would write, for the command itself and for the planner: its recipe and its FFN width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwenq.errors import PlanError
from qwenq.formats.base import GROUP_SIZES, Recipe
from qwenq.model.spec import ModelSpec
from qwenq.planning.budget import DtypeOf, choose_for_bytes, recipe_of
from qwenq.planning.recipefile import read_recipe
from qwenq.planning.sensitivity import Sensitivity, prior
from qwenq.planning.tensor_parallel import padded_width, tensor_parallel_reasons


def widened(spec: ModelSpec, ranks: int, uniform: Recipe | None) -> ModelSpec:
    """The model with its FFN padded so that no group straddles `ranks` GPUs; PlanError when that cannot help.

    `uniform` is a recipe of one scheme; None for a mixture, which may have groups of every size that is offered.
    """
    down = o = uniform.default.group_size if uniform and uniform.default else -1
    if uniform is None:
        down, o = max(GROUP_SIZES), min(GROUP_SIZES)
    wide = replace(spec, intermediate_size=padded_width(spec.intermediate_size, down, ranks))
    if reasons := tensor_parallel_reasons(wide, {"down": (down,), "o": (o,)}, ranks):
        raise PlanError(f"--pad-for-tp {ranks}: {reasons[0]}", hint="padding the FFN cannot change that")
    return wide


def cut_by(spec: ModelSpec, table: Sensitivity, ranks: int) -> Sensitivity:
    """The table without schemes whose groups would straddle `ranks` GPUs."""
    widths = {"o": spec.q_size // ranks, "down": spec.intermediate_size // ranks}
    kl = {
        unit: {s: kl for s, kl in row.items() if s is None or widths.get(unit[1], 0) % s.group_size == 0}
        for unit, row in table.kl.items()
    }
    return replace(table, kl=kl)


def sized_recipe(spec: ModelSpec, target_bytes: int, dtype_of: DtypeOf, ranks: int | None = None) -> Recipe:
    """The recipe of `quantize --target-size` before it has measured the model, `spec` widened for `ranks` GPUs."""
    table = prior(spec)
    if ranks is not None:
        table = cut_by(spec, table, ranks)
    return choose_for_bytes(spec, table, target_bytes, dtype_of).recipe


def saved_recipe(spec: ModelSpec, path: Path) -> Recipe:
    """The recipe of `quantize --recipe`."""
    return recipe_of(spec, read_recipe(path, spec))
