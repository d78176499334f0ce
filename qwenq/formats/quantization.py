"""What a checkpoint's `quantization_config` says, whatever tool wrote it: the format, and the scheme of each linear."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from qwenq.errors import CheckpointError, PlanError, UnreadScheme
from qwenq.scheme import Recipe, Scheme
from qwenq.spec import ModelSpec

PACKED_BITS = range(2, 9)  # that one tool or another packs


@dataclass(frozen=True)
class Quantization:
    """How each linear is stored: `rules` in order, the first whose pattern matches the module's name decides."""

    format: str  # one of layout.FORMATS
    default: Scheme | None  # where no rule matches; None leaves the linear in 16 bit
    rules: tuple[tuple[re.Pattern[str], Scheme | None], ...] = ()
    version: str = ""  # gptq: "gptq" stores zero points minus one, "gptq_v2" as they are

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of linear `module`, None where it is left in 16 bit."""
        return next((scheme for pattern, scheme in self.rules if pattern.match(module)), self.default)

    def recipe(self, spec: ModelSpec) -> Recipe:
        """The same, as a recipe over the model's linears; the most frequent scheme stands for a missing default."""
        found = [(lin.name, self.scheme_of(lin.name)) for lin in spec.linears]
        default = self.default
        if default is None:
            default = next(iter(Counter(scheme for _, scheme in found if scheme).most_common(1)), (None, 0))[0]
        return Recipe(default, tuple((name, scheme) for name, scheme in found if scheme != default), self.format)


def read_scheme(bits: Any, group_size: Any, sym: Any, where: str) -> Scheme:
    """A grid's scheme from a config's own values; CheckpointError for what this project cannot read."""
    if type(bits) is not int or type(group_size) is not int:
        raise CheckpointError(f"{where}: bits is {bits!r} and group_size {group_size!r}, wanted whole numbers")
    try:
        return Scheme(bits, group_size, bool(sym))
    except PlanError as error:
        other = bits not in (4, 8) and bits in PACKED_BITS
        raise (UnreadScheme if other else CheckpointError)(f"{where}: {error.message}") from None


def read_names(value: Any, where: str) -> list[str]:
    """A list of texts from a config; None is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{where} is {str(value)[:80]!r}, wanted a list of names")
    return value
