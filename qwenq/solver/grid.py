"""The values a group of weights may take: float16 scales, integer zero points, and the search for good ones.

Shapes: K columns of one group, O rows of the weight; tensors are [K, O], so that work runs along contiguous rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.formats.base import Scheme

MIN_SCALE = 1e-5  # float16 has 7 bits of precision left here and none a little below
MAX_SCALE = 65504.0

# Scale candidates as fractions of the one that just reaches the largest weight; each is then refitted, so few do.
SHRINK = tuple(1.1 - 0.05 * i for i in range(13))


def float16_scale(scale: Tensor) -> Tensor:
    """`scale` as it will be stored: rounded to float16, at least MIN_SCALE in size, sign kept; float32."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return scale.abs().clamp_(MIN_SCALE, MAX_SCALE).half().float() * sign


def code_range(scheme: Scheme) -> tuple[int, int]:
    """Smallest and largest code - zero of a symmetric grid: -8, 7."""
    return -scheme.zero, scheme.zero - 1


def absmax_grid(w_KO: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point [O] (float32) of the grid that just spans each row: plain rounding to nearest.

    Symmetric: the largest weight becomes code 2**bits - 1 or its mirror image, as common tools do.
    """
    if scheme.sym:
        scale_O = float16_scale(w_KO.abs().amax(0) / (scheme.zero - 0.5))
        return scale_O, torch.full_like(scale_O, scheme.zero)
    low_O, high_O = w_KO.amin(0).clamp_(max=0), w_KO.amax(0).clamp_(min=0)
    scale_O = float16_scale((high_O - low_O) / (scheme.levels - 1))
    return scale_O, (-low_O / scale_O).round_().clamp_(0, scheme.levels - 1)


def search_grid(w_KO: Tensor, weight_K: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point [O] (float32) with the least sum over K of weight * (w - rounded w)**2.

    Each candidate scale gives codes; the scale that fits those codes best is a quotient of two sums, and what it
    leaves of the error follows from the same sums. So few candidates are needed. A symmetric grid reaches one step
    further down than up: the scale takes the sign that turns this end towards the longer tail.
    """
    weight_K1 = weight_K[:, None]
    low_O, high_O = w_KO.amin(0), w_KO.amax(0)
    weighted_KO = w_KO * weight_K1
    if scheme.sym:
        low, high = code_range(scheme)
        sign_O = torch.where(high_O > -low_O, -1.0, 1.0)
        full_O = torch.maximum(high_O, -low_O).clamp_(min=MIN_SCALE) / scheme.zero * sign_O
        zero_O = torch.full_like(full_O, scheme.zero)
        best_O, scale_O = torch.full_like(full_O, -1.0), full_O.clone()
        for shrink in SHRINK:
            q_KO = (w_KO * (1 / (full_O * shrink))).round_().clamp_(low, high)
            cross_O = (weighted_KO * q_KO).sum(0)
            norm_O = weight_K @ q_KO.square_()
            gain_O = (cross_O * cross_O).div_(norm_O).nan_to_num_(0.0)
            better_O = gain_O > best_O
            best_O = torch.where(better_O, gain_O, best_O)
            scale_O = torch.where(better_O, cross_O.div_(norm_O), scale_O)
        scale_O = torch.where(scale_O.isfinite() & (scale_O != 0), scale_O, full_O)
        return float16_scale(scale_O), zero_O
    low_O, high_O = low_O.clamp_(max=0), high_O.clamp_(min=0)
    total_O = weight_K @ (w_KO * w_KO)
    least_O = torch.full_like(low_O, float("inf"))
    scale_O, zero_O = absmax_grid(w_KO, scheme)
    for shrink in SHRINK:
        step_O = ((high_O - low_O) * (shrink / (scheme.levels - 1))).clamp_(min=MIN_SCALE)
        offset_O = (-low_O * shrink / step_O).round_().clamp_(0, scheme.levels - 1)
        q_KO = (w_KO / step_O).round_().add_(offset_O).clamp_(0, scheme.levels - 1).sub_(offset_O)
        cross_O = (weighted_KO * q_KO).sum(0)
        norm_O = weight_K @ q_KO.square_()
        fitted_O = float16_scale((cross_O / norm_O).nan_to_num_(0.0))
        error_O = total_O - 2 * fitted_O * cross_O + fitted_O * fitted_O * norm_O
        better_O = (error_O < least_O) & (fitted_O > 0)
        least_O = torch.where(better_O, error_O, least_O)
        scale_O = torch.where(better_O, fitted_O, scale_O)
        zero_O = torch.where(better_O, offset_O, zero_O)
    return scale_O, zero_O


def round_to_grid(w_KO: Tensor, scale_O: Tensor, zero_O: Tensor, scheme: Scheme) -> Tensor:
    """Nearest codes, 0 to 2**bits - 1, in float32 [K, O]."""
    return (w_KO / scale_O).round_().add_(zero_O).clamp_(0, scheme.levels - 1)
