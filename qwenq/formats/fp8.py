"""FP8 by blocks, as publishers store it: sized, neither read nor written here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwenq.formats.base import SIZED, SizedOnly, block_columns
from qwenq.io.safetensors import tensor_bytes
from qwenq.model.spec import LinearSpec


class Fp8(SizedOnly):
    """A byte a weight, and a float32 scale for each block of 128 x 128."""

    method = "fp8"
    bits = 8
    group_size = 128
    published = ("FP8",)

    def linear_bytes(self, lin: LinearSpec) -> Iterator[int]:
        yield lin.parameters
        yield tensor_bytes("F32", (-(-lin.out_features // 128), -(-lin.in_features // 128)))

    def stated(self, config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        return [8], block_columns(config.get("weight_block_size"))


SIZED[Fp8.method] = Fp8()
