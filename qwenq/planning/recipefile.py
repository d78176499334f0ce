"""Recipes as files: TOML, one line a layer, made to be read and edited."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

from qwenq.errors import PlanError
from qwenq.formats.base import Recipe, Scheme, get_format, label_of, parse_scheme
from qwenq.model.spec import ModelSpec
from qwenq.planning.budget import Budgeted, Choice, recipe_of
from qwenq.planning.sensitivity import FusedGroup, members_of

VERSION = 1
RECIPE_NAME = "qwenq-recipe.toml"
_WIDTH = 18  # of a quoted scheme and its comma


def encode_recipe(spec: ModelSpec, found: Budgeted) -> str:
    """The recipe as a file's text."""
    lines = [
        f"# A qwenq recipe: the scheme of each unit.{_fused(spec)}",
        "# Edit the schemes, then: qwenq quantize MODEL -o OUT --recipe THIS_FILE",
        "# Schemes: 4-bit g128, g64 or g32, 8-bit likewise, 16-bit; in compressed-tensors 4-bit g128 asym, ... too.",
        f"version = {VERSION}",
        f"model = {_quoted(spec.name)}",
        f"target = {_quoted(found.target)}",
        f"file_bytes = {found.file_bytes}",
        f"bits_per_linear_weight = {found.bits_per_linear_weight:.4f}",
        f"predicted_kl = {found.predicted_kl:.6g}  # nats a token; sensitivities: {found.sensitivity}",
        "",
        "[layer]",
    ]
    for layer in range(spec.num_hidden_layers):
        cells = []
        for stage in spec.architecture.stages:
            last = stage is spec.architecture.stages[-1]
            label = f'"{label_of(found.choice[layer, stage.name])}"' + ("" if last else ",")
            cells.append(f"{stage.name} = {label:<{0 if last else _WIDTH}}")
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
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}", hint="qwenq quantize MODEL --target-size 47GB --dry-run "
                        "--save-recipe FILE writes one") from None  # fmt: skip
    except UnicodeDecodeError:
        raise PlanError(f"{path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{path}: {error}", hint="the file is TOML; one line a layer under [layer]") from None
    if found.get("version") != VERSION:
        raise PlanError(f"{path}: version is {found.get('version')!r}, wanted {VERSION}")
    layers = found.get("layer")
    if not isinstance(layers, dict):
        raise PlanError(f"{path}: no [layer] table", hint="one line a layer, e.g. " + _example(spec))
    wanted = [str(layer) for layer in range(spec.num_hidden_layers)]
    for key in layers:
        if key not in wanted:
            raise PlanError(
                f"{path}{_line(text, key)}: layer {key!r}, {spec.name or 'the model'} has {len(wanted)} layers "
                f"(0 to {len(wanted) - 1})"
            )
    choice: dict[FusedGroup, Scheme | None] = {}
    stages = [stage.name for stage in spec.architecture.stages]
    for layer, key in enumerate(wanted):
        where = f"{path}{_line(text, key)}, layer {key}"
        row = layers.get(key)
        if not isinstance(row, dict) or set(row) != set(stages):
            got = "missing" if row is None else f"has {', '.join(row)}" if isinstance(row, dict) else "is no table"
            raise PlanError(f"{where}: {got}, wanted {', '.join(stages)}", hint="e.g. " + _example(spec))
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
    try:
        if not isinstance(label, str):
            raise PlanError(f"{label!r} is no scheme", hint="schemes are text, for instance '4-bit g128'")
        scheme = parse_scheme(label)
        if scheme is not None:
            if not get_format(format).mixes_in(scheme):
                raise PlanError(
                    f"{scheme.label} is not offered in mixed {format} checkpoints",
                    hint="groups of 128, 64 or 32, or per channel; 4 bits with zero points in compressed-tensors only",
                )
            for lin in members_of(spec, fused):
                scheme.check(lin)
    except PlanError as error:
        raise PlanError(f"{where}: {error.message}", hint=error.hint) from None
    return scheme


def _line(text: str, key: str) -> str:
    """`, line 14` of a layer's row, or nothing when it is written in another way."""
    pattern = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
    rows = [n for n, line in enumerate(text.splitlines(), 1) if pattern.match(line)]
    return f", line {rows[0]}" if rows else ""


def _quoted(text: str) -> str:
    return '"' + re.sub(r'["\\\x00-\x1f\x7f]', "_", text) + '"'


def saved_recipe(spec: ModelSpec, path: Path) -> Recipe:
    """The recipe of `quantize --recipe`."""
    return recipe_of(spec, read_recipe(path, spec))
