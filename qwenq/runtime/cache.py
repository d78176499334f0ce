"""Attention over a key-value cache that is allocated once, without ever building a mask (shapes: model.attention)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenq.model.attention import causal_attention
from qwenq.model.devices import product_dtype, without_cudnn_attention

ATTENTION = "qwenq"
FP8 = torch.float8_e4m3fn


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Causal attention of the last T of S positions, as transformers' attention interface wants it: [B, T, H, D]."""
    batch, heads, tokens, width = query.shape
    if tokens > 1:
        return causal_attention(query, key, value, scaling), None
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], width)  # heads that share keys: rows of a product
    dtype = product_dtype(query)
    out = F.scaled_dot_product_attention(rows.to(dtype), key.to(dtype), value.to(dtype), scale=scaling)
    return out.reshape(batch, heads, 1, width).transpose(1, 2).to(query.dtype).contiguous(), None


def register() -> None:
    """Make `attend` known to transformers; an implementation without a mask function gets no mask."""
    from transformers import AttentionInterface

    without_cudnn_attention()
    AttentionInterface.register(ATTENTION, attend)


class KvCache:
    """Keys and values of one sequence, `capacity` tokens of `heads` heads for each layer, on the device it computes on.

    float8 and float16 are stored clamped to their range, without scales, and read back in the activations' dtype.
    Dropping tokens (`crop`) costs nothing. All is made at once: a GPU's allocator then lays it side by side. Made
    between activations it would settle in what those left free, one tensor to a block, and the rest of each block would
    be lost: 6.5 GiB for the 72B at 32k.
    """

    def __init__(
        self, devices: Sequence[torch.device], capacity: int, heads: int, width: int, dtype: torch.dtype
    ) -> None:
        self.capacity = capacity
        shape = 1, heads, capacity, width
        self._stored = [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for device in devices
        ]
        self._lengths = [0] * len(devices)

    def update(self, key: Tensor, value: Tensor, layer: int, *unused: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Append key and value [B, N, T, D] of a layer and return all there are."""
        start = self._lengths[layer]
        stop = start + key.shape[2]
        if stop > self.capacity:
            raise ValueError(f"{stop} tokens in a cache of {self.capacity}")
        stored = self._stored[layer]
        for kept, new in zip(stored, (key, value), strict=True):
            limit = torch.finfo(kept.dtype).max
            if kept.dtype == FP8:
                kept[:, :, start:stop] = new.clamp(-limit, limit)
                continue
            kept[:, :, start:stop] = new
            if kept.dtype == torch.float16:  # clamped where it lies: bfloat16 has no number as near to the limit
                kept[:, :, start:stop].clamp_(-limit, limit)
        self._lengths[layer] = stop
        keys, values = (kept[:, :, :stop] for kept in stored)
        return (keys, values) if keys.dtype == key.dtype else (keys.to(key.dtype), values.to(key.dtype))

    def make_room(self) -> None:
        """Count a token that is written straight into `stored`; ValueError when the cache is full."""
        if self._lengths[0] == self.capacity:
            raise ValueError(f"{self.capacity + 1} tokens in a cache of {self.capacity}")
        self._lengths = [length + 1 for length in self._lengths]

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, N, capacity, D] each, filled or not."""
        return self._stored[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens in the cache; transformers asks for it by this name."""
        return self._lengths[layer]

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        self._lengths = [min(tokens, length) for length in self._lengths]
