"""Recipes as files: TOML, one line per layer, made to be read and edited."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

from qwenq.errors import PlanError
from qwenq.escaping import shown
from qwenq.formats.base import Format, Scheme, get_format, label_of, parse_scheme
from qwenq.io.json import read_limited
from qwenq.model.spec import ModelSpec
from qwenq.planning.budget import Budgeted, Choice
from qwenq.planning.sensitivity import OUTER, FusedGroup, fused_groups, members_of

VERSION = 1
_MAX_BYTES = 1_000_000  # a layer has 120
_MAX_LINE = 2000  # characters
_KEY = re.compile(r"""\s*["']?([^"'\s=]{1,40})["']?\s*=""")
RECIPE_NAME = "qwenq-recipe.toml"
_WIDTH = 18  # of a quoted scheme and its comma
_WIDTH_OF_TYPES = 10  # likewise, of GGUF's


def _names(spec: ModelSpec, form: Format, layer: int) -> list[str]:
    """Names of what a scheme is chosen for in one layer, or outside of all."""
    return [name for at, name in fused_groups(spec, form.name) if at == layer]


def encode_recipe(spec: ModelSpec, found: Budgeted) -> str:
    """The recipe as a file's text."""
    form = get_format(found.recipe.format)
    wanted = f" --format {form.name}" if form.outer else ""
    schemes = "4-bit g128, g64 or g32, 8-bit likewise, 16-bit; in compressed-tensors 4-bit g128 asym, ... too"
    if form.outer:
        schemes = ", ".join(scheme.label for scheme in form.options) + ", 16-bit"
    lines = [
        f"# A qwenq recipe: the scheme of each {'tensor' if form.outer else f'fused group.{_fused(spec)}'}",
        f"# Edit the schemes, then: qwenq quantize MODEL -o OUT{wanted} --recipe THIS_FILE",
        f"# Schemes: {schemes}.",
        f"version = {VERSION}",
        f"model = {_quoted(spec.name)}",
        f"target = {_quoted(found.target)}",
        f"file_bytes = {found.file_bytes}",
        f"bits_per_linear_weight = {found.bits_per_linear_weight:.4f}",
        f"predicted_kl = {found.predicted_kl:.6g}  # nats per token; sensitivities: {found.sensitivity}",
        "",
    ]
    if outer := _names(spec, form, OUTER):
        lines += ["[outer]", *(f'{name} = "{label_of(found.choice[OUTER, name])}"' for name in outer), ""]
    lines.append("[layer]")
    width = _WIDTH_OF_TYPES if form.outer else _WIDTH
    for layer in range(spec.num_hidden_layers):
        cells, names = [], _names(spec, form, layer)
        for name in names:
            last = name == names[-1]
            label = f'"{label_of(found.choice[layer, name])}"' + ("" if last else ",")
            cells.append(f"{name} = {label:<{0 if last else width}}")
        lines.append(f"{layer:<3}= {{ {''.join(cells)} }}")
    return "\n".join(lines) + "\n"


def save_recipe(path: Path, spec: ModelSpec, found: Budgeted) -> None:
    """Write a recipe file; PlanError when something is there already or it cannot be written."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(encode_recipe(spec, found))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}", hint="choose another name") from None


def read_recipe(path: Path, spec: ModelSpec, format: str = "gptq") -> Choice:
    """A recipe file for `spec` in a mixed `format`; PlanError naming line, layer and fused group for what cannot be."""
    try:
        text = read_limited(path, _MAX_BYTES, PlanError).decode("utf-8")
        if max(map(len, text.splitlines()), default=0) > _MAX_LINE:  # keys of many parts take tomllib their square
            raise PlanError(f"{path}: a line of more than {_MAX_LINE} characters")
        found = tomllib.loads(text)
    except PlanError as error:
        hint = "qwenq quantize MODEL --target-size 47GB --dry-run --save-recipe FILE writes one"
        raise PlanError(error.message, hint=hint) from None
    except UnicodeDecodeError:
        raise PlanError(f"{path}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # a date that is none, a number of 5,000 digits, lists in lists
        reason = "nested too deep" if isinstance(error, RecursionError) else shown(str(error), 200)
        raise PlanError(f"{path}: {reason}", hint="the file is TOML; one line per layer under [layer]") from None
    if found.get("version") != VERSION:
        raise PlanError(f"{path}: version is {shown(repr(found.get('version')), 40)}, wanted {VERSION}")
    lines = _lines(text)
    layers = found.get("layer")
    if not isinstance(layers, dict):
        raise PlanError(f"{path}: no [layer] table", hint="one line per layer, e.g. " + _example(spec))
    wanted = [str(layer) for layer in range(spec.num_hidden_layers)]
    for key in layers:
        if key not in wanted:
            raise PlanError(
                f"{path}{lines.get(key, '')}: layer {shown(key, 40)!r}, {spec.name or 'the model'} has {len(wanted)} "
                f"layers (0 to {len(wanted) - 1})"
            )
    choice: dict[FusedGroup, Scheme | None] = {}
    form = get_format(format)
    if outer := _names(spec, form, OUTER):
        row, where = found.get("outer"), f"{path}, [outer]"
        if not isinstance(row, dict) or set(row) != set(outer):
            raise PlanError(f"{where}: wanted {' and '.join(outer)}", hint=f'e.g. {outer[0]} = "Q6_K"')
        choice |= {(OUTER, name): _scheme(spec, (OUTER, name), row[name], f"{where}, {name}", format) for name in outer}
    known = {"version", "model", "target", "file_bytes", "bits_per_linear_weight", "predicted_kl", "layer"}
    for key in [key for key in found if key not in known and not (key == "outer" and outer)]:
        hint = "embedding and head stay in 16 bit: leave it out" if key == "outer" else "leave it out"
        raise PlanError(f"{path}: {shown(key, 40)}, which says nothing in a recipe for {format}", hint=hint)
    stages = _names(spec, form, 0)
    for layer, key in enumerate(wanted):
        where = f"{path}{lines.get(key, '')}, layer {key}"
        row = layers.get(key)
        if not isinstance(row, dict) or set(row) != set(stages):
            got = "missing" if row is None else "is no table"
            if isinstance(row, dict):
                got = f"has {shown(', '.join(row), 200)}"
            hint = "--format gguf names each linear" if form.outer else "e.g. " + _example(spec)
            raise PlanError(f"{where}: {got}, wanted {', '.join(stages)}", hint=hint)
        for fused in stages:
            choice[layer, fused] = _scheme(spec, (layer, fused), row[fused], f"{where}, {fused}", format)
    if not any(choice.values()):
        raise PlanError(f"{path}: every fused group stays in 16 bit, so there is nothing to quantize")
    return choice


def _fused(spec: ModelSpec) -> str:
    """` q, k and v share one (qkv), and so do gate and up (gate_up).`"""
    shared: list[str] = []
    for stage in spec.architecture.stages:
        *kinds, last = (linear.kind.removesuffix("_proj") for linear in stage.linears)
        if kinds:
            shared.append(f"{', '.join(kinds)} and {last}{'' if shared else ' share one'} ({stage.name})")
    return f" {', and so do '.join(shared)}." if shared else ""


def _example(spec: ModelSpec) -> str:
    """A line as it may be: `0 = { qkv = "8-bit g32", o = "4-bit g64", gate_up = "4-bit g128", down = "16-bit" }`."""
    labels = ("8-bit g32", "4-bit g64", "4-bit g128", "16-bit")
    pairs = zip(spec.architecture.stages, itertools.cycle(labels))
    cells = ", ".join(f'{stage.name} = "{label}"' for stage, label in pairs)
    return f"0 = {{ {cells} }}"


def _scheme(spec: ModelSpec, fused: FusedGroup, label: Any, where: str, format: str) -> Scheme | None:
    form = get_format(format)
    types = f"one of {', '.join(scheme.label for scheme in form.options)}, 16-bit" if form.outer else ""
    try:
        if not isinstance(label, str):
            hint = "schemes are text, for instance '4-bit g128'"
            raise PlanError(f"{shown(repr(label), 40)} is not a scheme", hint=types or hint)
        scheme = _parsed(label, types)
        if scheme is not None:
            if not form.mixes_in(scheme):
                raise PlanError(
                    f"{scheme.label} is not offered in mixed {format} checkpoints",
                    hint=types
                    or "groups of 128, 64 or 32, or per channel; 4 bits with zero points in compressed-tensors only",
                )
            for lin in members_of(spec, fused):
                scheme.check(lin)
    except PlanError as error:
        raise PlanError(f"{where}: {error.message}", hint=error.hint) from None
    return scheme


def _parsed(label: str, hint: str) -> Scheme | None:
    """The scheme that a label means; PlanError, with `hint` where there is one, for what is none."""
    try:
        return parse_scheme(label)
    except PlanError as error:
        raise PlanError(error.message, hint=hint or error.hint) from None


def _lines(text: str) -> dict[str, str]:
    """`, line 14` of each row by its key, but of those that are written in another way."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := _KEY.match(line):
            found.setdefault(match[1], f", line {number}")
    return found


def _quoted(text: str) -> str:
    return '"' + re.sub(r'["\\\x00-\x1f\x7f]', "_", text) + '"'
