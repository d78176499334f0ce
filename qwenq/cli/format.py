"""`--format` and what it asks of `--bits`, `--group-size` and symmetry."""

from __future__ import annotations

from typing import Annotated

import typer

from qwenq.errors import UsageError
from qwenq.formats.base import BNB_FORMATS, FORMATS, INT8_ROWS, NF4, Recipe, Scheme, check_scheme

Format = Annotated[
    str, typer.Option("--format", help="gptq, awq (4-bit), compressed-tensors, bnb-nf4 or bnb-int8 (no calibration).")
]
Asymmetric = Annotated[
    bool | None,
    typer.Option(
        "--asymmetric/--symmetric",
        help="With or without zero points of each group's own. Default: asymmetric for awq, else symmetric (vLLM).",
    ),
]


def uniform_recipe(format: str, bits: int | None, group_size: int | None, asymmetric: bool | None) -> Recipe:
    """The recipe of one scheme that the options name; UsageError when the format cannot hold it."""
    check_format(format)
    if format in BNB_FORMATS:
        fixed = NF4 if format == "bnb-nf4" else INT8_ROWS
        given = (("--bits", bits, fixed.bits), ("--group-size", group_size, fixed.group_size),
                 ("--asymmetric", asymmetric, False))  # fmt: skip
        for option, value, only in given:
            if value is not None and value != only:
                raise UsageError(f"--format {format} is {fixed.label}: {option} is no choice", hint="leave it out")
        return Recipe(fixed, format=format)
    asymmetric = format == "awq" if asymmetric is None else asymmetric
    scheme = Scheme(4 if bits is None else bits, 128 if group_size is None else group_size, not asymmetric)
    check_scheme(format, scheme)
    return Recipe(scheme, format=format)


def check_format(format: str) -> str:
    """The format; UsageError for one that there is not."""
    if format not in FORMATS:
        raise UsageError(f"--format {format}: wanted one of {', '.join(FORMATS)}")
    return format


def pick_method(format: str, method: str | None) -> str:
    """How to solve: gptq unless told otherwise; bitsandbytes formats are always rounded."""
    if method not in (None, "gptq", "rtn"):
        raise UsageError(f"--method {method}: wanted gptq or rtn")
    if format in BNB_FORMATS:
        if method == "gptq":
            raise UsageError(f"--format {format} rounds by bitsandbytes' own functions", hint="leave --method out")
        return "rtn"
    return method or "gptq"
