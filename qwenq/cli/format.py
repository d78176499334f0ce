"""`--format` and what it asks of `--bits`, `--group-size` and symmetry."""

from __future__ import annotations

from typing import Annotated

import typer

from qwenq.errors import UsageError
from qwenq.formats.base import FORMATS, Recipe, Scheme, get_format, names_of

CARRY_ZERO_POINTS = names_of(form for form in FORMATS.values() if form.mixes_zero_points)
Format = Annotated[str, typer.Option("--format", help=names_of(FORMATS.values(), notes=True) + ".")]
Asymmetric = Annotated[
    bool | None,
    typer.Option(
        "--asymmetric/--symmetric",
        help="With or without zero points of each group's own. Default: asymmetric for "
        f"{names_of((form for form in FORMATS.values() if form.asymmetric), 'and')}, else symmetric (vLLM).",
    ),
]


def uniform_recipe(format: str, bits: int | None, group_size: int | None, asymmetric: bool | None) -> Recipe:
    """The recipe of one scheme that the options name; UsageError when the format cannot hold it."""
    form = get_format(check_format(format))
    if (fixed := form.fixed) is not None:
        given = (("--bits", bits, fixed.bits), ("--group-size", group_size, fixed.group_size),
                 ("--asymmetric", asymmetric, False))  # fmt: skip
        for option, value, only in given:
            if value is not None and value != only:
                raise UsageError(f"--format {format} is {fixed.label}: {option} is no choice", hint="leave it out")
        return Recipe(fixed, format=format)
    asymmetric = form.asymmetric if asymmetric is None else asymmetric
    scheme = Scheme(4 if bits is None else bits, 128 if group_size is None else group_size, not asymmetric)
    form.check_scheme(scheme)
    return Recipe(scheme, format=format)


def check_format(format: str) -> str:
    """The format; UsageError for one that there is not."""
    if format not in FORMATS:
        raise UsageError(f"--format {format}: wanted one of {', '.join(FORMATS)}")
    return format


def pick_method(format: str, method: str | None) -> str:
    """How to solve: gptq unless told otherwise; some formats are always rounded."""
    if method not in (None, "gptq", "rtn"):
        raise UsageError(f"--method {method}: wanted gptq or rtn")
    form = get_format(check_format(format))
    if not form.solved:
        if method == "gptq":
            raise UsageError(f"--format {format} rounds by {form.method}' own functions", hint="leave --method out")
        return "rtn"
    return method or "gptq"
