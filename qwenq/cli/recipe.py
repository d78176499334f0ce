"""Options that decide which bits each unit gets, and recipes on screen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qwenq.cli.format import check_format, uniform_recipe
from qwenq.errors import JobError, PlanError
from qwenq.formats.base import FORMATS, Recipe, get_format, label_of, mixing, names_of
from qwenq.io.durable import file_sha256
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.journal import Journal
from qwenq.planning.budget import Budgeted, choose_for_bits, choose_for_bytes, cut_by, describe_choice, widened
from qwenq.planning.sensitivity import SENSITIVITY_NAME, Sensitivity, prior, read_sensitivity
from qwenq.units import format_gb, parse_size, parse_tokens

TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", help="Best mixed bits whose shard files are at most so large, e.g. 47GB."),
]
BitsPerWeight = Annotated[
    str | None, typer.Option("--bpw", help="Best mixed bits of at most so many stored bits per linear weight, e.g. 5.")
]
Fit = Annotated[
    str | None, typer.Option("--fit", help='Best mixed bits that fit a rig with --context, e.g. "2x RTX 3090".')
]
Context = Annotated[str | None, typer.Option("--context", "-c", help="Tokens --fit leaves room for. Default 8k.")]
FitEngine = Annotated[
    str | None, typer.Option("--engine", help="Engine that --fit plans for: qwenq, transformers, vllm or sglang.")
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe file, perhaps edited.")]
SensitivityFile = Annotated[
    Path | None, typer.Option("--sensitivity", help="A table that `qwenq sensitivity` wrote for this model.")
]
SaveRecipe = Annotated[
    Path | None, typer.Option("--save-recipe", help="With --dry-run: write the recipe there, to edit and give back.")
]
PadForTp = Annotated[
    int | None,
    typer.Option(
        "--pad-for-tp",
        min=1,
        help="Widen the FFN with zeros so that quantization groups never straddle so many GPUs; the function stays.",
    ),
]


@dataclass(frozen=True)
class Wanted:
    """Bits as asked for on the command line: one scheme, a budget, or a recipe file."""

    bits: int | None = None
    group_size: int | None = None
    target_size: str | None = None
    bpw: str | None = None
    fit: str | None = None
    context: str | None = None
    engine: str | None = None
    recipe: Path | None = None
    sensitivity: Path | None = None
    save_recipe: Path | None = None
    format: str = "gptq"
    asymmetric: bool | None = None
    pad_for_tp: int | None = None

    def check_method(self, method: str, table: object) -> None:
        """PlanError where a budget needs measured sensitivities, `table` has none and `method` measures none."""
        if table is None and self.budgeted and method == "rtn":
            raise PlanError("--method rtn measures no sensitivities", hint="give them with --sensitivity FILE")

    def check(self, dry_run: bool) -> None:
        """Usage errors (exit code 2) for options that contradict each other; PlanError for what means nothing."""
        ways = {
            "--target-size": self.target_size, "--bpw": self.bpw, "--fit": self.fit, "--recipe": self.recipe,
        }  # fmt: skip
        given = [name for name, value in ways.items() if value is not None]
        for name, number in (("--bits", self.bits), ("--group-size", self.group_size)):
            if number is not None and given:
                raise typer.BadParameter(f"{name} and {given[0]} exclude each other: one scheme, or the best mixture")
        if len(given) > 1:
            raise typer.BadParameter(f"{' and '.join(given)} exclude each other")
        if self.asymmetric is not None and self.recipe is not None:
            raise typer.BadParameter("--asymmetric and --recipe exclude each other: the recipe says it unit by unit")
        form = get_format(check_format(self.format))
        if self.asymmetric and given and not form.mixes_zero_points:
            wanted = names_of(other for other in FORMATS.values() if other.mixes_zero_points)
            raise typer.BadParameter(
                f"--asymmetric with {given[0]} wants --format {wanted}: no other mixed format's zero points "
                "are read by engines"
            )
        if given and not form.mixes:
            raise typer.BadParameter(f"{given[0]} wants a --format that mixes bits: {names_of(mixing())}")
        for name, value in (("--context", self.context), ("--engine", self.engine)):
            if value is not None and self.fit is None:
                raise typer.BadParameter(f"{name} goes with --fit")
        if self.sensitivity is not None and not given:
            raise typer.BadParameter("--sensitivity goes with --target-size, --bpw, --fit or --recipe")
        if self.save_recipe is not None and not (dry_run and self.mixed):
            raise typer.BadParameter("--save-recipe goes with --dry-run and --target-size, --bpw, --fit or --recipe")
        if self.target_size is not None:
            parse_size(self.target_size)
        if self.bpw is not None:
            _bits(self.bpw)
        if self.fit is not None:
            parse_tokens(self.context or "8k")
        if not self.mixed:
            self.uniform()

    def widened(self, spec: ModelSpec) -> ModelSpec:
        """The model with its FFN padded as asked, so that no group straddles ranks; PlanError when that cannot help."""
        if self.pad_for_tp is None:
            return spec
        return widened(spec, self.pad_for_tp, None if self.mixed else self.uniform())

    @property
    def mixed(self) -> bool:
        return any(value is not None for value in (self.target_size, self.bpw, self.fit, self.recipe))

    @property
    def budgeted(self) -> bool:
        """A budget to optimize for, which needs sensitivities; a recipe file needs none."""
        return self.mixed and self.recipe is None

    def uniform(self) -> Recipe:
        """One scheme for all linears: 4-bit g128 unless said otherwise, or the format's own."""
        return uniform_recipe(self.format, self.bits, self.group_size, self.asymmetric)

    def table(self, spec: ModelSpec, fingerprint: str, unfinished: Path | None = None) -> Sensitivity | None:
        """The table given, or the one that an unfinished job measured; checked to be this model's. None without one.

        An unknown fingerprint is empty.
        """
        path = self.sensitivity
        if path is None and unfinished is not None and self.mixed and (unfinished / SENSITIVITY_NAME).is_file():
            path = unfinished / SENSITIVITY_NAME
            if file_sha256(path) != Journal.load(unfinished).beside.get(SENSITIVITY_NAME):
                raise JobError(
                    f"{path}: damaged, it is not what the journal says was measured",
                    hint="delete it, and it is measured again",
                )
        if path is None:
            return None
        found = read_sensitivity(path)
        try:
            found.check(spec, fingerprint)
        except PlanError as error:
            raise PlanError(f"{path}: {error.message}", hint=error.hint) from None
        if self.asymmetric and self.budgeted and all(s is None or s.sym for row in found.kl.values() for s in row):
            raise PlanError(
                f"{path}: it has no asymmetric schemes", hint="measure them: qwenq sensitivity MODEL --asymmetric"
            )
        return found

    def choose(self, spec: ModelSpec, table: Sensitivity | None, dtype_of: Callable[[str], str]) -> Budgeted:
        """The recipe asked for; sensitivities are the prior's when there is no table. Zero points only if asked for."""
        table = table or prior(spec, asymmetric=bool(self.asymmetric))
        if not self.asymmetric and self.recipe is None:
            kept = {unit: {s: kl for s, kl in row.items() if s is None or s.sym} for unit, row in table.kl.items()}
            table = replace(table, kl=kept)
        if self.pad_for_tp is not None:
            table = cut_by(spec, table, self.pad_for_tp)
        if self.recipe is not None:
            from qwenq.planning.recipefile import read_recipe

            choice = read_recipe(self.recipe, spec, self.format)
            return describe_choice(spec, table.covering(spec, choice), choice, dtype_of, self.format)
        if self.target_size is not None:
            return choose_for_bytes(spec, table, parse_size(self.target_size), dtype_of, self.format)
        if self.bpw is not None:
            return choose_for_bits(spec, table, _bits(self.bpw), dtype_of, self.format)
        from qwenq.planning.budget import choose_for_rig
        from qwenq.planning.case import Case, Workload
        from qwenq.planning.engines.base import engine_names, get_engine
        from qwenq.planning.rig import parse_rig
        from qwenq.planning.weights import recipe_weights

        assert self.fit is not None
        engine = get_engine(self.engine or "qwenq")
        if engine.needs_gguf:
            raise PlanError(
                f"--engine {engine.name} reads GGUF, not what this writes", hint=engine_names(checkpoints=True)
            )
        work = Workload(parse_tokens(self.context or "8k"), 1)
        case = Case(spec, recipe_weights(spec, Recipe(None)), engine, work, parse_rig(self.fit))
        return choose_for_rig(case, table, dtype_of, self.format)


def _bits(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise PlanError(f"--bpw {text[:40]}: not a number of bits", hint="for instance 5.0") from None


def recipe_table(spec: ModelSpec, found: Budgeted) -> Table:
    """One line for each run of layers with equal schemes."""
    title = f"recipe: {format_gb(found.file_bytes)}, {found.bits_per_linear_weight:.3f} bits per linear weight"
    table = Table(title=title)
    table.add_column("layers")
    stages = [stage.name for stage in spec.architecture.stages]
    for stage in stages:
        table.add_column(stage)
    rows = [tuple(label_of(found.choice[layer, stage]) for stage in stages) for layer in range(spec.num_hidden_layers)]
    start = 0
    for layer, row in enumerate(rows):
        if layer + 1 == len(rows) or rows[layer + 1] != row:
            table.add_row(str(start) if start == layer else f"{start}-{layer}", *row)
            start = layer + 1
    return table


def recipe_json(found: Budgeted) -> dict[str, Any]:
    """The recipe, its prediction and its bound."""
    return {
        "target": found.target,
        "predicted_kl": found.predicted_kl,
        "bound_kl": found.bound_kl,
        "sensitivity": found.sensitivity,
        "file_bytes": found.file_bytes,
        "bits_per_linear_weight": found.bits_per_linear_weight,
        "layers": [
            {stage: label_of(scheme) for (_, stage), scheme in row}
            for _, row in itertools.groupby(found.choice.items(), key=lambda item: item[0][0])
        ],
    }


def prediction_line(found: Budgeted) -> str:
    """What the recipe is expected to lose, and how that is known."""
    proof = ""
    if found.bound_kl is not None:
        gap = found.predicted_kl - found.bound_kl
        proof = "; no recipe of this size is predicted to lose less"
        if gap > 1e-9 * found.predicted_kl:
            proof = f"; no recipe of this size is predicted to lose less than {found.bound_kl:.5f}"
    return f"predicted KL {found.predicted_kl:.5f} nats a token (sensitivities: {found.sensitivity}){proof}"
