"""KL that each fused group loses by each scheme: a measured table as it is saved, and the prior used without one."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwenq.errors import PlanError
from qwenq.formats.base import ASYMMETRIC, SYMMETRIC, Format, Scheme, get_format, label_of, parse_scheme
from qwenq.io.json import read_object
from qwenq.model.architectures import known_kinds, known_stages
from qwenq.model.spec import LinearSpec, ModelSpec

VERSION = 1
_MAX_BYTES = 10_000_000  # 1,000 decoder layers have 2 MB
_LAYER = re.compile(r"[0-9]{1,4}")
SENSITIVITY_NAME = "qwenq-sensitivity.json"  # in a checkpoint: the table its recipe was chosen by
FusedGroup = tuple[int, str]  # layer, name of a stage: linears that engines fuse; or one linear's kind, where none do
OUTER = -1  # the layer of embedding and head
_OUTER_NAME = "outer"
ROTATED = "rotated"  # in the provenance of a table: measured on the rotated model
TIED_HEAD = "tied_head"  # in the provenance of a table: how an embedding that is the head too was measured

# Prior: KL in nats per token when one fused group alone is 4-bit g128, for a model of PRIOR_LAYERS layers, and more for
# the ends of the network. Rounded from a table measured on the demo's model (reports/budget.md); a large model loses
# less, but for choosing only proportions matter.
PRIOR_KL = {"qkv": 2.0e-3, "o": 0.4e-3, "gate_up": 2.5e-3, "down": 1.6e-3}
PRIOR_OTHER_KL = 1.6e-3  # of a stage that is none of these
PRIOR_OUTER_KL = 2.0e-3  # of embedding and of head
PRIOR_LAYERS = 30
PRIOR_ENDS = {"first": 2.0, "last": 2.0}
PRIOR_GROUP = {128: 1.0, 64: 0.85, 32: 0.70, -1: 1.6}
PRIOR_8_BIT = (15 / 255) ** 2  # the error's energy falls with the square of the step


@dataclass(frozen=True)
class Sensitivity:
    """KL (nats per token) that each fused group causes alone, by scheme; what stays in 16 bit causes none."""

    model: str
    fingerprint: str  # of the source's files; empty for a prior, which is of no model in particular
    kl: Mapping[FusedGroup, Mapping[Scheme | None, float]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        return bool(self.fingerprint)

    @property
    def source(self) -> str:
        """The source of the predicted figures, for display."""
        return "measured" if self.measured else "a prior by kind and depth, not measured on this model"

    def loss(self, fused: FusedGroup, scheme: Scheme | None) -> float:
        """KL of one fused group under a scheme; PlanError when the table lacks it."""
        if scheme is None:
            return 0.0
        try:
            return self.kl[fused][scheme]
        except KeyError:
            raise PlanError(
                f"the sensitivity table has no {scheme.label} for layer {fused[0]}, {fused[1]}",
                hint="measure it again: qwenq sensitivity MODEL",
            ) from None

    def covering(self, spec: ModelSpec, choice: Mapping[FusedGroup, Scheme | None]) -> Sensitivity:
        """The same table with schemes of `choice` that it lacks filled in, by the prior's proportions to those it has.

        For predicting an edited recipe only: one group a row, or asymmetric grids.
        """
        kl = {fused: dict(row) for fused, row in self.kl.items()}
        for fused, scheme in choice.items():
            if scheme is not None and scheme not in kl[fused]:
                known = next(iter(self.kl[fused]), None)
                if known is None:  # no group divides it, so that the table offers nothing
                    kl[fused][scheme] = prior_kl(spec, fused) * prior_noise(scheme)
                else:
                    kl[fused][scheme] = self.kl[fused][known] * prior_noise(scheme) / prior_noise(known)
        return replace(self, kl=kl)

    def check(self, spec: ModelSpec, fingerprint: str = "", format: str = "gptq", rotated: bool = False) -> None:
        """PlanError unless the table is of this model (of these files when their fingerprint is known) and a format,
        and of the model as it is quantized, rotated or not.
        """
        if self.measured and fingerprint and fingerprint != self.fingerprint:
            raise PlanError(
                f"the sensitivity table was measured on {self.model or 'another model'} "
                f"(fingerprint {self.fingerprint[:12]}), this model is {spec.name} ({fingerprint[:12]})",
                hint="measure this one: qwenq sensitivity MODEL",
            )
        again = f"measure it again: qwenq sensitivity MODEL --format {format}{' --rotate' if rotated else ''}"
        wanted = set(fused_groups(spec, format))
        if set(self.kl) != wanted:
            layers = len({layer for layer, _ in self.kl if layer != OUTER})
            if layers == spec.num_hidden_layers:
                raise PlanError(
                    f"the sensitivity table was measured for formats other than {format}",
                    hint=again,
                )
            raise PlanError(
                f"the sensitivity table is of {self.model or 'another model'} with {layers} layers, "
                f"{spec.name or 'this model'} has {spec.num_hidden_layers}",
                hint="measure this one: qwenq sensitivity MODEL",
            )
        if self.measured and rotated != (self.provenance.get(ROTATED) is True):
            state = "before" if rotated else "after"
            raise PlanError(f"the sensitivity table is of the model {state} it is rotated", hint=again)
        if self.measured and tied_head(spec, format) and TIED_HEAD not in self.provenance:
            raise PlanError(
                "the sensitivity table is from before a tied head was solved, and overestimates its loss",
                hint=again,
            )

    def to_json(self) -> dict[str, Any]:
        rows = {
            f"{_OUTER_NAME if layer == OUTER else layer}.{fused}": {label_of(scheme): kl for scheme, kl in row.items()}
            for (layer, fused), row in self.kl.items()
        }
        return {
            "kind": "qwenq sensitivity",
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
            "kl_nats_per_token": rows,
        }


def fused_groups(spec: ModelSpec, format: str = "gptq") -> Iterator[FusedGroup]:
    """The units a scheme is chosen for: every fused group, layer by layer, in execution order.

    In a format that holds embedding and head too, nothing is fused: these, then every linear.
    """
    if get_format(format).outer:
        yield from ((OUTER, lin.stage) for lin in spec.outer_linears)
        yield from ((lin.layer, lin.kind) for lin in spec.linears)
        return
    for layer in range(spec.num_hidden_layers):
        for stage in spec.architecture.stages:
            yield layer, stage.name


def tied_head(spec: ModelSpec, format: str) -> bool:
    """Whether the format quantizes an embedding that is the head too."""
    return spec.tie_word_embeddings and get_format(format).outer


def members_of(spec: ModelSpec, fused: FusedGroup) -> tuple[LinearSpec, ...]:
    """The linears of one fused group."""
    layer, name = fused
    if layer == OUTER:
        return tuple(lin for lin in spec.outer_linears if lin.stage == name)
    if any(name == stage.name for stage in spec.architecture.stages):
        return spec.stage_linears(layer, name)
    return tuple(lin for lin in spec.layer_linears(layer) if lin.kind == name)


def options_of(asymmetric: bool) -> tuple[Scheme, ...]:
    """Schemes that tables are of: 4 bits with zero points only if asked for."""
    return SYMMETRIC + ASYMMETRIC if asymmetric else SYMMETRIC


def schemes_for(
    spec: ModelSpec, fused: FusedGroup, form: Format, options: Sequence[Scheme] | None = None
) -> tuple[Scheme, ...]:
    """Those of `options`, or of the format's, that every member of a fused group divides into."""
    first, *others = (form.offered(lin, options) for lin in members_of(spec, fused))
    return tuple(scheme for scheme in first if all(scheme in found for found in others))


def solved_as(scheme: Scheme) -> Scheme:
    """The scheme that a measurement solves errors of: 8-bit integers follow from those in 4."""
    return replace(scheme, bits=4) if scheme.codes == "int" else scheme


def solved_schemes(spec: ModelSpec, format: str, asymmetric: bool = False) -> int:
    """Schemes that a measurement solves errors of, at most, of one linear."""
    form = get_format(format)
    options = None if form.outer else options_of(asymmetric)
    offered = [schemes_for(spec, fused, form, options) for fused in fused_groups(spec, format) if fused[0] == 0]
    return max(len(set(map(solved_as, schemes))) for schemes in offered)


def prior_noise(scheme: Scheme) -> float:
    """Energy of the rounding error relative to 4-bit g128, as a rule of thumb."""
    if (known := scheme.meaning.noise(scheme)) is not None:
        return known
    wide = PRIOR_GROUP.get(scheme.group_size, 1.0)
    return wide * (PRIOR_8_BIT if scheme.bits == 8 else 1.0) * (1.0 if scheme.sym else 0.95)


def prior_kl(spec: ModelSpec, fused: FusedGroup) -> float:
    """KL guessed for one fused group alone at 4-bit g128."""
    layer, kind = fused
    if layer == OUTER:
        return PRIOR_OUTER_KL
    layers, shared = spec.num_hidden_layers, 1
    for stage in spec.architecture.stages:
        if any(linear.kind == kind for linear in stage.linears):
            kind, shared = stage.name, len(stage.linears)
    depth = layer / max(layers - 1, 1)
    ends = PRIOR_ENDS["first"] * math.exp(-layer / 2) + PRIOR_ENDS["last"] * math.exp((depth - 1) * 10)
    return PRIOR_KL.get(kind, PRIOR_OTHER_KL) / shared * PRIOR_LAYERS / layers * (1 + round(ends, 1))


def prior(spec: ModelSpec, format: str = "gptq", *, asymmetric: bool = False) -> Sensitivity:
    """Sensitivities guessed from kind and depth, for planning without weights."""
    form, kl = get_format(format), dict[FusedGroup, dict[Scheme | None, float]]()
    for fused in fused_groups(spec, format):
        schemes = schemes_for(spec, fused, form, None if form.outer else options_of(asymmetric))
        kl[fused] = {scheme: prior_kl(spec, fused) * prior_noise(scheme) for scheme in schemes}
    return Sensitivity(spec.name, "", kl)


def read_sensitivity(path: Path) -> Sensitivity:
    """A table that `qwenq sensitivity` wrote; PlanError naming the entry that is not right."""
    if not os.path.lexists(path):
        raise PlanError(f"{path}: no such file", hint="write one with qwenq sensitivity MODEL -o FILE")
    found = read_object(path, limit=_MAX_BYTES)
    if found.get("kind") != "qwenq sensitivity" or found.get("version") != VERSION:
        raise PlanError(
            f"{path}: kind {str(found.get('kind'))[:40]!r}, version {str(found.get('version'))[:20]}, "
            f"wanted 'qwenq sensitivity', version {VERSION}",
            hint="write one with qwenq sensitivity MODEL -o FILE",
        )
    rows, fingerprint = found.get("kl_nats_per_token"), found.get("fingerprint")
    if not isinstance(rows, Mapping) or not isinstance(fingerprint, str) or not fingerprint:
        raise PlanError(f"{path}: it lacks kl_nats_per_token or fingerprint", hint="the file is damaged")
    kl: dict[FusedGroup, dict[Scheme | None, float]] = {}
    for key, row in rows.items():
        layer, _, fused = key.partition(".")
        known = fused in (*known_stages(), *known_kinds()) if _LAYER.fullmatch(layer) else layer == _OUTER_NAME
        if not known or not isinstance(row, Mapping):
            raise PlanError(f"{path}: {key[:40]!r} is not a fused group", hint="the file is damaged")
        entries: dict[Scheme | None, float] = {}
        for label, value in row.items():
            good = isinstance(value, int | float) and not isinstance(value, bool)
            if not good or not 0 <= value < math.inf:
                raise PlanError(
                    f"{path}: {key}, {label[:40]}: {str(value)[:40]} is not a KL", hint="the file is damaged"
                )
            scheme = parse_scheme(label)
            if scheme is None:
                raise PlanError(f"{path}: {key}: 16-bit is not a scheme to measure", hint="the file is damaged")
            entries[scheme] = float(value)
        if not entries:
            raise PlanError(f"{path}: {key} has no scheme", hint="the file is damaged")
        kl[OUTER if layer == _OUTER_NAME else int(layer), fused] = entries
    provenance = found.get("provenance")
    model = str(found.get("model", ""))[:200]
    return Sensitivity(model, fingerprint, kl, provenance if isinstance(provenance, Mapping) else {})


def encode_sensitivity(table: Sensitivity) -> bytes:
    """The file's bytes: one fused group a line."""
    shown = table.to_json()
    rows = shown.pop("kl_nats_per_token")
    head = json.dumps(shown, indent=2, ensure_ascii=False)
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    return f'{head[:-2]},\n  "kl_nats_per_token": {{\n{lines}\n  }}\n}}\n'.encode()
