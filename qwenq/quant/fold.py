"""Channel scales folded into a decoder layer before it is quantized: the same function, rounded to better effect.

Scaling an input channel of a linear by c and its source by 1 / c changes nothing until the weights are rounded; then
the channel's error is divided by c, and its weights take c times the room in their group's grid (AWQ, Lin et al. 2023,
equation 4). Rounding errors are as good as uniform within a group, so their sum over channels, of
E[x**2] / c**2 * sum(c**2 w**2), is least for c**4 = E[x**2] / mean(w**2): no search is needed.

Sources: the norm before q, k, v and before gate, up; v for o (with grouped queries, one scale for all query heads that
share a v channel); up for down. q, k and gate are no sources: rotary embedding, softmax and activation come after them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from qwenq.spec import UNITS, ModelSpec

LIMIT = 32.0  # of a channel's scale, either way
_NORMS = {"qkv": "input_layernorm.weight", "gate_up": "post_attention_layernorm.weight"}
_SOURCES = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}


def channel_scales(weight_power_I: Tensor, moment_I: Tensor, share: Tensor | None = None) -> Tensor:
    """Scales [I], geometric mean 1, from mean squares of the weights and of the inputs by channel.

    share: int64 [I], which channels must have one scale (equal numbers). Dead channels and zero weights get what the
    smallest live ones get, within LIMIT.
    """
    floors = [x.mean().clamp(min=1e-30) * 1e-8 for x in (moment_I, weight_power_I)]
    log_I = (moment_I.float().clamp(min=floors[0]) / weight_power_I.float().clamp(min=floors[1])).log() / 4
    if share is not None:
        number = int(share.max()) + 1
        sums = torch.zeros(number, device=log_I.device).index_add_(0, share, log_I)
        counts = torch.zeros(number, device=log_I.device).index_add_(0, share, torch.ones_like(log_I))
        log_I = (sums / counts)[share]
    return (log_I - log_I.mean()).exp().clamp(1 / LIMIT, LIMIT)


def head_share(spec: ModelSpec) -> Tensor:
    """For each input channel of o_proj, the v_proj channel it comes from: int64 [q_size]."""
    heads = torch.arange(spec.num_attention_heads) // (spec.num_attention_heads // spec.num_key_value_heads)
    return (heads[:, None] * spec.head_dim + torch.arange(spec.head_dim)).reshape(-1)


def fold_layer(
    state: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    spec: ModelSpec,
    units: Collection[str] = tuple(UNITS),
) -> dict[str, Tensor]:
    """Tensors of one decoder layer that folding changes, by relative name; the layer's function stays what it was.

    state: the layer's tensors (`self_attn.q_proj.weight`, `self_attn.v_proj.bias`, `input_layernorm.weight`, ...).
    moments: for each unit of `units`, the mean (or sum) of x**2 over calibration tokens, [in], of its inputs in the
    unfolded layer. Leave a unit out of `units` when it, or the linear it is folded into, stays unquantized.

    Changed: for qkv and gate_up their weights and the norm before them; for o its weight and v's weight and bias; for
    down its weight and up's weight and bias. Weights come back in float32, to be rounded once, by the quantizer; norms
    and biases in their own dtype, as they will be stored: a norm's rounding is made good in the weights behind it.
    """
    new: dict[str, Tensor] = {}

    def latest(name: str) -> Tensor:
        return new[name] if name in new else state[name].float()

    def scale_inputs(unit: str, scales_I: Tensor) -> None:
        for path in UNITS[unit]:
            new[f"{path}.weight"] = latest(f"{path}.weight") * scales_I

    def scales_of(unit: str, share: Tensor | None = None) -> Tensor:
        power_I = torch.cat([latest(f"{path}.weight") for path in UNITS[unit]]).square().mean(0)
        return channel_scales(power_I, moments[unit].to(power_I.device), share)

    for unit, source in _SOURCES.items():
        if unit not in units:
            continue
        share = head_share(spec).to(state[f"{source}.weight"].device) if unit == "o" else None
        scales_I = scales_of(unit, share)
        scale_inputs(unit, scales_I)
        scales_O = scales_I
        if share is not None:
            scales_O = torch.empty(spec.kv_size, device=scales_I.device).index_copy_(0, share, scales_I)
        new[f"{source}.weight"] = latest(f"{source}.weight") / scales_O[:, None]
        bias = f"{source}.bias"
        if bias in state:
            new[bias] = (state[bias].float() / scales_O).to(state[bias].dtype)
    for unit, norm in _NORMS.items():
        if unit not in units:
            continue
        old_I = state[norm].float()
        new[norm] = (old_I / scales_of(unit)).to(state[norm].dtype)
        stored_I = new[norm].float()
        kept_I = (stored_I == 0) | ~stored_I.isfinite()
        new[norm] = torch.where(kept_I, state[norm], new[norm])
        scale_inputs(unit, torch.where(kept_I, torch.ones_like(old_I), old_I / stored_I))
    return new
