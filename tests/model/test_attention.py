"""Attention by blocks of rows against torch's own kernel in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from qwenq.model import attention
from qwenq.model.attention import BLOCKED_KEYS, causal_attention
from qwenq.runtime.cache import attend


def some(heads: int, shared: int, tokens: int, keys: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, key and value of two windows, laid out as transformers does: heads inside tokens."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((tokens, heads), (keys, shared), (keys, shared))
    return tuple(torch.randn(2, n, h, 16, generator=generator).to(dtype).transpose(1, 2) for n, h in sizes)


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    bias = causal_lower_right(query.shape[2], key.shape[2])
    q, k, v = query.double(), key.double(), value.double()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("tokens", "keys"), [(2, 2), (63, 63), (64, 64), (65, 65), (200, 200), (70, 300)])
def test_by_blocks_is_exact_attention(heads: int, shared: int, tokens: int, keys: int) -> None:
    q, k, v = some(heads, shared, tokens, keys, torch.float32)
    with torch.inference_mode():
        got = causal_attention(q, k, v, 0.3)
    assert got.is_contiguous() and got.shape == (2, tokens, heads, 16)
    torch.testing.assert_close(got.double(), exact(q, k, v, 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_any_height_of_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs without a flash kernel take as many rows as keep the scores small."""
    monkeypatch.setattr(attention, "BLOCK_ROWS", rows)
    q, k, v = some(6, 2, 70, 90, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(
            causal_attention(q, k, v, 0.3).double(), exact(q, k, v, 0.3), rtol=1e-5, atol=1e-5
        )


def test_bfloat16_is_as_good_as_its_inputs() -> None:
    q, k, v = some(6, 2, 200, 200, torch.bfloat16)
    with torch.inference_mode():
        got = causal_attention(q, k, v, 0.25)
    wanted = exact(q, k, v, 0.25)
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted).norm() < 0.004 * wanted.norm()


def test_large_key_biases_are_not_blurred() -> None:
    """Scores in the hundreds, as Qwen2.5's key biases make them: a bfloat16 score would be off by one there."""
    q, k, v = some(2, 1, 100, 100, torch.bfloat16)
    q, k = q + 8, k + 64
    with torch.inference_mode():
        got = causal_attention(q, k, v, 0.25)
    wanted = exact(q, k, v, 0.25)
    assert (got.double() - wanted).norm() < 0.01 * wanted.norm()


def test_torchs_own_kernel_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, and beyond BLOCKED_KEYS, it is torch's kernel; the figures are the same."""

    def never(*_: object) -> torch.Tensor:
        raise AssertionError("by blocks")

    monkeypatch.setattr(attention, "_by_blocks", never)
    q, k, v = some(4, 2, 50, 90, torch.float32)
    query = q.detach().requires_grad_(True)
    out = causal_attention(query, k, v, 0.25)
    (gradient,) = torch.autograd.grad(out.square().sum(), query)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    torch.testing.assert_close(out.double(), exact(q, k, v, 0.25), rtol=1e-5, atol=1e-5)
    q, k, v = some(2, 1, 40, BLOCKED_KEYS + 1, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(causal_attention(q, k, v, 0.25).double(), exact(q, k, v, 0.25), rtol=1e-5, atol=1e-5)


def test_one_token_whose_output_is_laid_out_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for GPUs return other strides than CPU ones, in float32 with heads behind tokens."""
    query, key, value = torch.randn(1, 8, 1, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    wanted, _ = attend(torch.nn.Module(), query, key, value, None, 0.25)
    usual = torch.nn.functional.scaled_dot_product_attention

    def laid_out_otherwise(*args: Any, **named: Any) -> torch.Tensor:
        return usual(*args, **named).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", laid_out_otherwise)
    assert torch.equal(attend(torch.nn.Module(), query, key, value, None, 0.25)[0], wanted)
