"""Causal attention of whole windows: torch's own kernel, or by blocks of query rows where that is worse.

On a CPU a block's scores stay in the cache; torch's kernel takes 1.4 to 1.7 times as long for windows of 512 tokens in
bfloat16 (reports/LOG.md). On a GPU without a flash kernel (compute capability below 8.0, or float32) torch would, where
heads share keys, write out the mask and all scores: 34 GB for a chunk of 2,048 rows at 128k keys of the 72B.

Shapes: query [B, H, T, D]; key and value [B, N, S, D], N heads of keys each serving G = H / N heads of queries. The
queries are those of the last T of S positions.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenq.machine import SCORE_BYTES, Compute
from qwenq.model.devices import product_dtype, without_cudnn_attention

WINDOWS = "qwenq-windows"  # the name under which transformers knows `attend_windows`
BLOCK_ROWS = 64  # of queries whose scores are computed together
BLOCKED_KEYS = 1024  # up to so many blocks are as fast as torch's kernel or faster, whatever the heads; then slower


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling * q k') v with what lies ahead of a query masked: [B, T, H, D], in the dtype of `query`.

    Scores and their softmax are in float32: large key biases, as Qwen2.5 has, make scores that bfloat16 blurs.
    """
    tokens, keys = query.shape[2], key.shape[2]
    if not torch.is_grad_enabled() and (keys <= BLOCKED_KEYS if query.device.type == "cpu" else _writes_scores(query)):
        return _by_blocks(query, key, value, scaling)
    ahead: dict[str, Any] = {"is_causal": True}
    dtype = product_dtype(query)
    if tokens != keys:
        from torch.nn.attention.bias import causal_lower_right  # takes a second to import

        ahead = {"attn_mask": causal_lower_right(tokens, keys)}
    qkv = query.to(dtype), key.to(dtype), value.to(dtype)
    # a lower-right mask asks what the current GPU can do, not the one its query is on
    with torch.cuda.device(query.device) if query.device.type == "cuda" else nullcontext():
        out = F.scaled_dot_product_attention(*qkv, scale=scaling, enable_gqa=True, **ahead)
    return out.transpose(1, 2).to(query.dtype).contiguous()


def _writes_scores(query: Tensor) -> bool:
    """Whether torch's own attention would write out masks and scores: a GPU without a flash kernel for `query`."""
    if query.device.type != "cuda":
        return False
    dtype, capability = str(query.dtype).removeprefix("torch."), torch.cuda.get_device_capability(query.device)
    return not Compute(dtype, "cuda", capability).has_flash


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    batch, heads, tokens, width = query.shape
    shared, before = key.shape[1], key.shape[2] - tokens
    each, dtype = heads // shared, product_dtype(query)
    out = query.new_empty(batch, tokens, heads, width)
    step = BLOCK_ROWS
    if query.device.type != "cpu":  # not below 16 rows: each block reads all the keys
        step = max(16, min(step, SCORE_BYTES // (4 * heads * key.shape[2])))
    ahead_TT = torch.full((step, step), -torch.inf, device=query.device).triu_(1)
    for b in range(batch):
        q_NGTD = (query[b].float() * scaling).view(shared, each, tokens, width)
        k_NDS, v_NSD = key[b].float().transpose(1, 2), value[b].to(dtype)
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            rows, seen = stop - start, before + stop
            q_NRD = q_NGTD[:, :, start:stop].reshape(shared, each * rows, width)
            scores_NRS = torch.bmm(q_NRD, k_NDS[:, :, :seen])
            scores_NRS.view(shared, each, rows, seen)[..., before + start :].add_(ahead_TT[:rows, :rows])
            o_NRD = torch.bmm(torch.softmax(scores_NRS, -1).to(dtype), v_NSD[:, :seen])
            out[b, start:stop] = o_NRD.view(shared, each, rows, width).permute(2, 0, 1, 3).reshape(rows, heads, width)
    return out


def attend_windows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """`causal_attention` as transformers' attention interface wants it."""
    return causal_attention(query, key, value, scaling), None


def register() -> None:
    """Make `attend_windows` known to transformers; an implementation without a mask function gets no mask."""
    from transformers import AttentionInterface

    without_cudnn_attention()
    AttentionInterface.register(WINDOWS, attend_windows)
