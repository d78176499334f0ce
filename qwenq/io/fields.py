"""Objects of JSON from outside, read field by field: a wrong type is an error that names the place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenq.errors import CheckpointError
from qwenq.escaping import shown
from qwenq.results import Interval


@dataclass(frozen=True)
class Fields:
    """An object of outside JSON; every read says what was wanted when it is not there."""

    value: Mapping[str, Any]
    file: str
    where: str

    def sub(self, key: str) -> Fields:
        value = self.value.get(key)
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return Fields(value, self.file, f"{self.where}{key}.")

    def optional_sub(self, key: str) -> Fields | None:
        """None for null; an object otherwise, which may not be left out."""
        return None if self.value.get(key, "") is None else self.sub(key)

    def objects(self, key: str, limit: int) -> list[Fields]:
        value = self.value.get(key)
        if not isinstance(value, list) or len(value) > limit or not all(isinstance(v, Mapping) for v in value):
            raise self._wrong(key, value, f"a list of at most {limit} objects")
        return [Fields(v, self.file, f"{self.where}{key}[{k}].") for k, v in enumerate(value)]

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return shown(value)

    def texts(self, key: str) -> list[str]:
        value = self.value.get(key)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(key, value, "a list of texts")
        return [shown(v, 300) for v in value]

    def whole(self, key: str, below: int = 1 << 62) -> int:
        value = self.value.get(key)
        if type(value) is not int or not 0 <= value < below:
            raise self._wrong(key, value, "a whole number" + (f" below {below}" if below < 1 << 62 else ""))
        return value

    def number(self, key: str) -> float:
        """NaN for null: manifests write figures that are no numbers so."""
        value = self.optional_number(key)
        return math.nan if value is None else value

    def optional_number(self, key: str) -> float | None:
        value = self.value.get(key, "")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self._wrong(key, value, "a number")
        return float(value)

    def interval(self, key: str) -> Interval:
        found = self.sub(key)
        return Interval(found.number("mean"), found.number("low"), found.number("high"))

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: {self.where}{key} is {shown(repr(value), 60)}, wanted {wanted}",
            hint="was it written by this version of qwenq?",
        )
