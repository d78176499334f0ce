"""Grids of GGUF's types beside plain integers: minima, unequal levels, and coded scales under a super-block's own.

A super-block is K columns in S sub-groups of N. Its scales (and minima) are small integers times one float16 for all:

    SuperGrid        d * s * u(code)                u: code - zero, or a table of levels
    SuperAffineGrid  (d * s) * code - (dmin * m)    s, m >= 0

Parameters are found alternately: each sub-group's own best, the float16 that they are multiples of, the integers again.
Products are taken in the order in which llama.cpp takes them, so that every value is its value, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qwenq.solver.grid import MAX_SCALE, ColumnRounder, Grid, Parameters, move

SHRINK = (1.1, 1.04, 1.0, 0.96, 0.92, 0.88, 0.84, 0.78, 0.7)  # candidates, fewer than an integer grid's
VALUES_AT_ONCE = 1 << 18  # of a search: what a core's cache holds
ROUNDS = 2  # of super-block scale and sub-groups' integers in turn


def _float16(value: Tensor) -> Tensor:
    """As stored, in float32; tiny ones may become 0, which holds an empty block."""
    return value.nan_to_num(0.0, 0.0, 0.0).clamp_(-MAX_SCALE, MAX_SCALE).half().float()


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where there is no scale."""
    return scale.reciprocal().masked_fill_(scale == 0, 0.0)


def _quotient(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, 0 where that is no number."""
    return (top / bottom).nan_to_num_(0.0, 0.0, 0.0)


def _column(values: Iterable[float], like: Tensor) -> Tensor:
    """Float32 [C, 1, 1]"""
    return torch.tensor(list(values), dtype=torch.float32, device=like.device)[:, None, None]


def _as_found(value: Tensor) -> Tensor:
    return value


def _sums(
    w_SNO: Tensor,
    importance_SN1: Tensor,
    inverse_CSO: Tensor,
    start_CSO: Tensor | None,
    nearest: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums over N of w u, u and u u, [C, S, O] each: u the `nearest` units of (w - start) * inverse.

    Without a start there are no sums of u. `nearest` may overwrite what it is given. On a CPU some sub-groups and
    candidates at a time: many of few weights, whose calls cost more than their arithmetic.
    """
    (candidates, groups, rows), width = inverse_CSO.shape, w_SNO.shape[1]
    wu_CSO, u_CSO, uu_CSO = (torch.empty_like(inverse_CSO) for _ in range(3))
    subs = groups if w_SNO.is_cuda else min(groups, max(1, VALUES_AT_ONCE // (width * rows)))
    at_once = max(1, VALUES_AT_ONCE // (subs * width * rows))
    for low in range(0, groups, subs):
        own = slice(low, low + subs)
        weighted_SNO, p_S1N = w_SNO[own] * importance_SN1[own], importance_SN1[own].mT
        for first in range(0, candidates, at_once):
            part = slice(first, first + at_once), own
            inverse_CS1O = inverse_CSO[part][:, :, None]
            if start_CSO is None:
                unit_CSNO = nearest(w_SNO[own] * inverse_CS1O)
            else:
                unit_CSNO = nearest((w_SNO[own] - start_CSO[part][:, :, None]).mul_(inverse_CS1O))
                u_CSO[part] = (p_S1N @ unit_CSNO)[:, :, 0]
            wu_CSO[part] = (weighted_SNO * unit_CSNO).sum(2)
            uu_CSO[part] = (p_S1N @ unit_CSNO.square_())[:, :, 0]
    return wu_CSO, u_CSO, uu_CSO


def _affine_search(
    w_SNO: Tensor,
    importance_SN1: Tensor,
    top: int,
    *,
    positive: bool,
    stored: Callable[[Tensor], Tensor] = _as_found,
    stored_minimum: Callable[[Tensor], Tensor] = _as_found,
) -> tuple[Tensor, Tensor]:
    """Scale and minimum [S, O] of `scale * code - minimum`, codes 0 to `top`, of least weighted error.

    Each candidate gives codes; scale and minimum of least squares for these codes, and what they leave of the error
    once they are `stored`, follow from a few sums.
    positive: no minimum below 0.
    """
    low_SO, high_SO = w_SNO.amin(1), w_SNO.amax(1)
    if positive:
        low_SO = low_SO.clamp(max=0)
    p_S1, w_SO = importance_SN1.sum(1), (w_SNO * importance_SN1).sum(1)
    span_SO, shrink_C11 = high_SO - low_SO, _column(SHRINK, w_SNO)
    start_CSO = low_SO * shrink_C11
    if not positive:
        start_CSO += (high_SO + low_SO) * ((1 - shrink_C11) / 2)
    inverse_CSO = _inverse(span_SO * (shrink_C11 / top))
    wq_CSO, q_CSO, qq_CSO = _sums(w_SNO, importance_SN1, inverse_CSO, start_CSO, lambda x: x.round_().clamp_(0, top))
    s_CSO = _quotient(p_S1 * wq_CSO - q_CSO * w_SO, p_S1 * qq_CSO - q_CSO * q_CSO)
    if positive:
        s_CSO = torch.where(s_CSO * q_CSO < w_SO, _quotient(wq_CSO, qq_CSO), s_CSO)
    s_CSO = stored(s_CSO)
    m_CSO = (s_CSO * q_CSO - w_SO) / p_S1
    m_CSO = stored_minimum(m_CSO.clamp_(min=0) if positive else m_CSO)
    error_CSO = s_CSO * (s_CSO * qq_CSO - 2 * wq_CSO)  # over what is lost with nothing but zeros
    error_CSO += m_CSO * (m_CSO * p_S1 + 2 * (w_SO - s_CSO * q_CSO))
    error_CSO.masked_fill_(~((error_CSO < torch.inf) & (s_CSO > 0)), torch.inf)
    least_1SO, index_1SO = error_CSO.min(0, keepdim=True)
    found_1SO = least_1SO < torch.inf
    scale_1SO = torch.where(found_1SO, s_CSO.gather(0, index_1SO), span_SO / top)
    return scale_1SO[0], torch.where(found_1SO, m_CSO.gather(0, index_1SO), -low_SO)[0]


@dataclass(frozen=True)
class AffineGrid(Grid):
    """scale * code + minimum, both float16, one of each a group: GGUF's Q4_1 and Q5_1. Parameters: [1, O] each."""

    bits: int
    group_size: int = 32

    stored_dtypes = (torch.float16, torch.float16)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, w_KO: Tensor, importance_K: Tensor | None = None) -> Parameters:
        if importance_K is None:
            low_1O, high_1O = w_KO.amin(0, keepdim=True), w_KO.amax(0, keepdim=True)
            return _float16((high_1O - low_1O) / self.top), _float16(low_1O)
        scale_1O, minimum_1O = _affine_search(w_KO[None], importance_K[None, :, None], self.top, positive=False)
        return _float16(scale_1O), _float16(-minimum_1O)

    def round(self, w_KO: Tensor, parameters: Parameters) -> Tensor:
        scale_1O, minimum_1O = parameters
        return ((w_KO - minimum_1O) * _inverse(scale_1O)).round_().clamp_(0, self.top)

    def dequantize(self, codes_KO: Tensor, parameters: Parameters) -> Tensor:
        scale_GO, minimum_GO = (p_GO.float() for p_GO in parameters)
        codes_GKO = codes_KO.float().unflatten(0, (len(scale_GO), -1))
        return (codes_GKO * scale_GO[:, None]).add_(minimum_GO[:, None]).flatten(0, 1)

    def column_rounder(self, parameters: Parameters, columns: int) -> ColumnRounder:
        (scale_O,), (minimum_O,) = parameters
        return _affine_rounder(scale_O[None], -minimum_O[None], columns, self.top)

    def refit(
        self, parameters: Parameters, codes_KO: Tensor, h_KK: Tensor, error_KO: Tensor, slope_KO: Tensor
    ) -> tuple[Parameters, Tensor]:
        scale_1O, minimum_1O = parameters
        before_KO = self.dequantize(codes_KO, parameters)
        uu_O, u1_O = (h_KK @ codes_KO).mul_(codes_KO).sum(0), h_KK.sum(1) @ codes_KO
        us_O, s_O = (codes_KO * slope_KO).sum(0), slope_KO.sum(0)
        step_O, raise_O = _least_squares(uu_O, u1_O, us_O, s_O, float(h_KK.sum()))
        found = _float16(scale_1O + step_O), _float16(minimum_1O + raise_O)
        after_KO = self.dequantize(codes_KO, found)
        move(after_KO - before_KO, h_KK, error_KO, slope_KO)
        return found, after_KO


def _least_squares(
    uu_O: Tensor, u1_O: Tensor, us_O: Tensor, s_O: Tensor, h_sum: float
) -> tuple[Tensor, Tensor]:
    """How far scale and an added constant [O] of some columns should move: two normal equations a row.

    uu, u1: units' and the constant's products under H; us, s: theirs with the slope; h_sum: the sum of H.
    """
    both_O = uu_O * h_sum - u1_O * u1_O
    return _quotient(us_O * h_sum - s_O * u1_O, both_O), _quotient(s_O * uu_O - us_O * u1_O, both_O)


def _affine_rounder(scale_SO: Tensor, minimum_SO: Tensor, columns: int, top: int) -> ColumnRounder:
    """Rounds to `scale * code - minimum`, one of each for every so many columns."""
    width = columns // len(scale_SO)
    parts = list(zip(scale_SO, minimum_SO, _inverse(scale_SO), strict=True))  # a row of a tensor costs more each time
    product_O = torch.empty_like(scale_SO[0])

    def round_column(k: int, value_O: Tensor, code_O: Tensor, error_O: Tensor) -> None:
        scale_O, minimum_O, inverse_O = parts[k // width]
        torch.add(value_O, minimum_O, out=code_O)
        code_O.mul_(inverse_O).round_().clamp_(0, top)
        error_O.sub_(torch.mul(code_O, scale_O, out=product_O)).add_(minimum_O)

    return round_column


# ---------------------------------------------------------------------- one scale


@cache
def _table(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels, float32, and what lies halfway between neighbours; copied to a device once: a CUDA graph copies nothing
    from the host.
    """
    table = torch.tensor(levels, dtype=torch.float32)
    between = (table[1:] + table[:-1]) / 2
    return table.to(device), between.to(device)


class _Units:
    """Codes as multiples of a scale: integers around a zero point, or a table of levels, which rise."""

    def __init__(self, bits: int, levels: tuple[int, ...]) -> None:
        self.zero, self.top = 1 << (bits - 1), (1 << bits) - 1
        self.even, self.levels = not levels, levels
        self.most = float(max(levels, key=abs)) if levels else -float(self.zero)

    def of(self, codes: Tensor) -> Tensor:
        """Units of codes, float32."""
        if self.even:
            return codes.float() - self.zero
        return _table(self.levels, codes.device)[0][codes.int()]

    def nearest(self, value: Tensor) -> Tensor:
        """Codes, float32, of the units nearest to values in units."""
        if self.even:
            return value.round().add_(self.zero).clamp_(0, self.top)
        return torch.bucketize(value.contiguous(), _table(self.levels, value.device)[1]).float()

    def rounded(self, value: Tensor) -> Tensor:
        """The units nearest to values in units; it may overwrite them."""
        if self.even:
            return value.round_().clamp_(-self.zero, self.top - self.zero)
        return self.of(self.nearest(value))


def _scale_search(
    w_SNO: Tensor, importance_SN1: Tensor, units: _Units, stored: Callable[[Tensor], Tensor] = _as_found
) -> Tensor:
    """Scales [S, O] of least weighted error, as `stored`; the longer end of the units lies towards the longer tail, or
    either end where units are unequal.
    """
    low_SO, high_SO = w_SNO.amin(1), w_SNO.amax(1)
    full_SO = torch.where(high_SO > -low_SO, high_SO, low_SO) / units.most
    shrinks = SHRINK if units.even else (*SHRINK, *(-shrink for shrink in SHRINK))
    inverse_CSO = _inverse(full_SO * _column(shrinks, w_SNO))
    cross_CSO, _, norm_CSO = _sums(w_SNO, importance_SN1, inverse_CSO, None, units.rounded)
    found_CSO = stored(_quotient(cross_CSO, norm_CSO))
    gain_CSO = (found_CSO * (2 * cross_CSO - found_CSO * norm_CSO)).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    best_1SO, index_1SO = gain_CSO.max(0, keepdim=True)
    return torch.where(best_1SO > -torch.inf, found_CSO.gather(0, index_1SO), full_SO)[0]


IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of llama.cpp's IQ4 types


@dataclass(frozen=True)
class TableGrid(Grid):
    """scale * level, a float16 a group and a table of unequal levels: GGUF's IQ4_NL. Parameter: scale [1, O]."""

    group_size: int = 32

    stored_dtypes = (torch.float16,)
    _units = _Units(4, IQ4_LEVELS)

    def fit(self, w_KO: Tensor, importance_K: Tensor | None = None) -> Parameters:
        if importance_K is None:
            return (_float16(w_KO.abs().amax(0, keepdim=True) / self._units.most),)
        return (_float16(_scale_search(w_KO[None], importance_K[None, :, None], self._units)),)

    def round(self, w_KO: Tensor, parameters: Parameters) -> Tensor:
        return self._units.nearest(w_KO * _inverse(parameters[0]))

    def dequantize(self, codes_KO: Tensor, parameters: Parameters) -> Tensor:
        scale_GO = parameters[0].float()
        units_GKO = self._units.of(codes_KO).unflatten(0, (len(scale_GO), -1))
        return (units_GKO * scale_GO[:, None]).flatten(0, 1)

    def column_rounder(self, parameters: Parameters, columns: int) -> ColumnRounder:
        return _unit_rounder(parameters[0], columns, self._units)

    def refit(
        self, parameters: Parameters, codes_KO: Tensor, h_KK: Tensor, error_KO: Tensor, slope_KO: Tensor
    ) -> tuple[Parameters, Tensor]:
        unit_KO = self._units.of(codes_KO)
        spread_KO = h_KK @ unit_KO
        step_O = _quotient((unit_KO * slope_KO).sum(0), (unit_KO * spread_KO).sum(0))
        found_1O = _float16(parameters[0] + step_O)
        change_1O = found_1O - parameters[0]
        error_KO.sub_(unit_KO * change_1O)
        slope_KO.sub_(spread_KO * change_1O)
        return (found_1O,), unit_KO * found_1O


def _unit_rounder(scale_SO: Tensor, columns: int, units: _Units) -> ColumnRounder:
    width = columns // len(scale_SO)
    parts = list(zip(scale_SO, _inverse(scale_SO), strict=True))
    unit_O = torch.empty_like(scale_SO[0])

    def round_evenly(k: int, value_O: Tensor, code_O: Tensor, error_O: Tensor) -> None:
        scale_O, inverse_O = parts[k // width]
        torch.mul(value_O, inverse_O, out=code_O).round_().add_(units.zero).clamp_(0, units.top)
        error_O.addcmul_(torch.sub(code_O, units.zero, out=unit_O), scale_O, value=-1)

    def round_column(k: int, value_O: Tensor, code_O: Tensor, error_O: Tensor) -> None:
        scale_O, inverse_O = parts[k // width]
        code_O.copy_(units.nearest(value_O * inverse_O))
        error_O.addcmul_(units.of(code_O), scale_O, value=-1)

    return round_evenly if units.even else round_column


# ---------------------------------------------------------------------- super-blocks


def _move_in_turn(
    moved: Callable[[int, Tensor, Tensor], Tensor], subs: range, h_KK: Tensor, error_KO: Tensor, slope_KO: Tensor
) -> None:
    """Move the values of sub-groups `subs` one after the other, and bring error and slope of them up to date, in place.

    moved(sub, h_NN, slope_NO): how much the values of a sub-group rise, [N, O], from its block of H and its slope as it
    is by then. Halving recursively makes most of the work matmuls.
    """
    if len(subs) == 1:
        change_NO = moved(subs[0], h_KK, slope_KO)
        error_KO.sub_(change_NO)
        slope_KO.addmm_(h_KK, change_NO, alpha=-1)
        return
    half, columns = len(subs) // 2, len(h_KK) // len(subs) * (len(subs) // 2)
    low, high = slice(columns), slice(columns, None)
    for these, own, other in ((subs[:half], low, high), (subs[half:], high, low)):
        before_NO = error_KO[own].clone()
        _move_in_turn(moved, these, h_KK[own, own], error_KO[own], slope_KO[own])
        slope_KO[other].addmm_(h_KK[other, own], error_KO[own] - before_NO)


@dataclass(frozen=True)
class SuperGrid(Grid):
    """d * s * u(code): d a float16 for all 256 columns [1, O], s an integer for each sub-group [S, O].

    GGUF's Q3_K and Q6_K (u: code - zero), and IQ4_XS (u: a table of levels).
    """

    bits: int
    sub_size: int  # columns of a sub-group
    lowest: int  # of s: -32 or -128; the highest is -1 - lowest
    levels: tuple[int, ...] = ()
    group_size: int = 256

    stored_dtypes = (torch.float16, torch.int8)

    @property
    def _units(self) -> _Units:
        return _Units(self.bits, self.levels)

    def widths(self, columns: int) -> tuple[int, ...]:
        return self.group_size, self.sub_size

    def _coded(self, scale_SO: Tensor, d_1O: Tensor) -> Tensor:
        """The integers nearest to scales; those of what an empty block has are 0."""
        return (scale_SO * _inverse(d_1O)).round_().clamp_(self.lowest, -1 - self.lowest)

    def fit(self, w_KO: Tensor, importance_K: Tensor | None = None) -> Parameters:
        units, w_SNO = self._units, w_KO.unflatten(0, (-1, self.sub_size))
        if importance_K is None:
            low_SO, high_SO = w_SNO.amin(1), w_SNO.amax(1)
            scale_SO = torch.where(high_SO > -low_SO, high_SO, low_SO) / units.most
            d_1O = self._super(scale_SO)
            return d_1O, self._coded(scale_SO, d_1O)
        p_SN1 = importance_K.view(-1, self.sub_size, 1)
        scale_SO = _scale_search(w_SNO, p_SN1, units)
        d_1O = self._super(scale_SO)
        s_SO = self._coded(scale_SO, d_1O)
        for _ in range(ROUNDS):
            inverse_1SO = _inverse(d_1O * s_SO)[None]
            (cross_SO,), _, (norm_SO,) = _sums(w_SNO, p_SN1, inverse_1SO, None, units.rounded)
            d_1O = _float16(_quotient((s_SO * cross_SO).sum(0, True), (s_SO * s_SO * norm_SO).sum(0, True)))
            s_SO = self._coded(_quotient(cross_SO, norm_SO), d_1O)
        return d_1O, s_SO

    def fit_within(
        self, parameters: Parameters, sub: int, w_NO: Tensor, importance_N: Tensor
    ) -> tuple[Parameters, Parameters]:
        d_1O, s_SO = parameters
        scale_1O = _scale_search(
            w_NO[None], importance_N[None, :, None], self._units, lambda x: self._coded(x, d_1O).mul_(d_1O)
        )
        s_1O = self._coded(scale_1O, d_1O)
        s_SO[sub] = s_1O[0]
        return (d_1O, s_SO), (d_1O, s_1O)

    def _super(self, scale_SO: Tensor) -> Tensor:
        """The largest scale is the lowest integer times d."""
        return _float16(scale_SO.gather(0, scale_SO.abs().argmax(0, keepdim=True)) / self.lowest)

    def _scale(self, parameters: Parameters) -> Tensor:
        """d * s of every sub-group, [S, O]."""
        d_GO, s_SO = (p_NO.float() for p_NO in parameters)
        return (d_GO[:, None] * s_SO.unflatten(0, (len(d_GO), -1))).flatten(0, 1)

    def round(self, w_KO: Tensor, parameters: Parameters) -> Tensor:
        scale_SO = self._scale(parameters)
        w_SNO = w_KO.unflatten(0, (len(scale_SO), -1))
        return self._units.nearest(w_SNO * _inverse(scale_SO)[:, None]).flatten(0, 1)

    def dequantize(self, codes_KO: Tensor, parameters: Parameters) -> Tensor:
        scale_SO = self._scale(parameters)
        units_SNO = self._units.of(codes_KO).unflatten(0, (len(scale_SO), -1))
        return (units_SNO * scale_SO[:, None]).flatten(0, 1)

    def column_rounder(self, parameters: Parameters, columns: int) -> ColumnRounder:
        return _unit_rounder(self._scale(parameters), columns, self._units)

    def refit(
        self, parameters: Parameters, codes_KO: Tensor, h_KK: Tensor, error_KO: Tensor, slope_KO: Tensor
    ) -> tuple[Parameters, Tensor]:
        """Each sub-group's integer in turn, then the super-block's scale, where that lowers the error."""
        d_1O, s_SO = parameters[0], parameters[1].clone()
        unit_SNO = self._units.of(codes_KO).unflatten(0, (-1, self.sub_size))

        def moved(sub: int, h_NN: Tensor, slope_NO: Tensor) -> Tensor:
            unit_NO = unit_SNO[sub]
            gain_O, norm_O = (unit_NO * slope_NO).sum(0), (h_NN @ unit_NO).mul_(unit_NO).sum(0)
            wanted_O = self._coded(s_SO[sub] * d_1O[0] + _quotient(gain_O, norm_O), d_1O)[0]
            change_O = (wanted_O - s_SO[sub]) * d_1O[0]
            change_O = torch.where(change_O * (change_O * norm_O - 2 * gain_O) < 0, change_O, 0.0)
            s_SO[sub] = torch.where(change_O == 0, s_SO[sub], wanted_O)
            return unit_NO * change_O

        _move_in_turn(moved, range(len(s_SO)), h_KK, error_KO, slope_KO)
        all_KO = (unit_SNO * s_SO[:, None]).flatten(0, 1)
        whole_KO = h_KK @ all_KO
        gain_O, norm_O = (all_KO * slope_KO).sum(0), (all_KO * whole_KO).sum(0)
        change_1O = _float16(d_1O + _quotient(gain_O, norm_O)) - d_1O
        change_1O = torch.where(change_1O * (change_1O * norm_O - 2 * gain_O) < 0, change_1O, 0.0)
        error_KO.addcmul_(all_KO, change_1O, value=-1)
        slope_KO.addcmul_(whole_KO, change_1O, value=-1)
        found = d_1O + change_1O, s_SO
        return found, self.dequantize(codes_KO, found)


@dataclass(frozen=True)
class SuperAffineGrid(Grid):
    """(d * s) * code - (dmin * m): d, dmin a float16 each for all 256 columns [1, O], s, m for each sub-group [S, O].

    GGUF's Q2_K, Q4_K and Q5_K.
    """

    bits: int
    sub_size: int
    most: int  # of s and m: 15 or 63
    group_size: int = 256

    stored_dtypes = (torch.float16, torch.float16, torch.uint8, torch.uint8)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def widths(self, columns: int) -> tuple[int, ...]:
        return self.group_size, self.sub_size

    def _coded(self, value_SO: Tensor, d_1O: Tensor) -> Tensor:
        return (value_SO * _inverse(d_1O)).round_().clamp_(0, self.most)

    def fit(self, w_KO: Tensor, importance_K: Tensor | None = None) -> Parameters:
        w_SNO = w_KO.unflatten(0, (-1, self.sub_size))
        if importance_K is None:
            minimum_SO = -w_SNO.amin(1).clamp(max=0)
            scale_SO = (w_SNO.amax(1) + minimum_SO).clamp_(min=0) / self.top
        else:
            p_SN1 = importance_K.view(-1, self.sub_size, 1)
            scale_SO, minimum_SO = _affine_search(w_SNO, p_SN1, self.top, positive=True)
        d_1O, dmin_1O = (_float16(x_SO.amax(0, keepdim=True) / self.most) for x_SO in (scale_SO, minimum_SO))
        s_SO, m_SO = self._coded(scale_SO, d_1O), self._coded(minimum_SO, dmin_1O)
        if importance_K is None:
            return d_1O, dmin_1O, s_SO, m_SO
        w_SO, p_S1 = (p_SN1 * w_SNO).sum(1), p_SN1.sum(1)
        for _ in range(ROUNDS):
            inverse_1SO, start_1SO = _inverse(d_1O * s_SO)[None], -(dmin_1O * m_SO)[None]
            sums = _sums(w_SNO, p_SN1, inverse_1SO, start_1SO, lambda x: x.round_().clamp_(0, self.top))
            (wq_SO,), (q_SO,), (qq_SO,) = sums
            # least squares over the whole super-block: (d, dmin) of the integers as they are
            ss_1O, sm_1O, mm_1O = (
                (a * b).sum(0, True) for a, b in ((s_SO * s_SO, qq_SO), (s_SO * m_SO, q_SO), (m_SO * m_SO, p_S1))
            )
            sw_1O, mw_1O = (s_SO * wq_SO).sum(0, True), (m_SO * w_SO).sum(0, True)
            both_1O = ss_1O * mm_1O - sm_1O * sm_1O
            found_1O = _quotient(mm_1O * sw_1O - sm_1O * mw_1O, both_1O)
            lower_1O = _quotient(sm_1O * sw_1O - ss_1O * mw_1O, both_1O)
            good_1O = (found_1O > 0) & (lower_1O > 0)
            d_1O = torch.where(good_1O, _float16(found_1O), d_1O)
            dmin_1O = torch.where(good_1O, _float16(lower_1O), dmin_1O)
            # then each sub-group's own: its scale, and its minimum for the scale that it got
            free_SO = _quotient(p_S1 * wq_SO - q_SO * w_SO, p_S1 * qq_SO - q_SO * q_SO)
            s_SO = torch.where(free_SO > 0, self._coded(free_SO, d_1O), s_SO)
            m_SO = self._coded(_quotient(d_1O * s_SO * q_SO - w_SO, p_S1.expand_as(w_SO)), dmin_1O)
        return d_1O, dmin_1O, s_SO, m_SO

    def fit_within(
        self, parameters: Parameters, sub: int, w_NO: Tensor, importance_N: Tensor
    ) -> tuple[Parameters, Parameters]:
        d_1O, dmin_1O, s_SO, m_SO = parameters
        scale_1O, minimum_1O = _affine_search(
            w_NO[None],
            importance_N[None, :, None],
            self.top,
            positive=True,
            stored=lambda x: self._coded(x, d_1O).mul_(d_1O),
            stored_minimum=lambda x: self._coded(x, dmin_1O).mul_(dmin_1O),
        )
        s_1O, m_1O = self._coded(scale_1O, d_1O), self._coded(minimum_1O, dmin_1O)
        s_SO[sub], m_SO[sub] = s_1O[0], m_1O[0]
        return (d_1O, dmin_1O, s_SO, m_SO), (d_1O, dmin_1O, s_1O, m_1O)

    def _scales(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """d * s and dmin * m of every sub-group, [S, O] each."""
        d_GO, dmin_GO, s_SO, m_SO = (p_NO.float() for p_NO in parameters)
        scale_SO, minimum_SO = (
            (x_GO[:, None] * c_SO.unflatten(0, (len(x_GO), -1))).flatten(0, 1)
            for x_GO, c_SO in ((d_GO, s_SO), (dmin_GO, m_SO))
        )
        return scale_SO, minimum_SO

    def _nearest(self, w_SNO: Tensor, scale_SO: Tensor, minimum_SO: Tensor) -> Tensor:
        return ((w_SNO + minimum_SO[:, None]) * _inverse(scale_SO)[:, None]).round_().clamp_(0, self.top)

    def round(self, w_KO: Tensor, parameters: Parameters) -> Tensor:
        scale_SO, minimum_SO = self._scales(parameters)
        return self._nearest(w_KO.unflatten(0, (len(scale_SO), -1)), scale_SO, minimum_SO).flatten(0, 1)

    def dequantize(self, codes_KO: Tensor, parameters: Parameters) -> Tensor:
        scale_SO, minimum_SO = self._scales(parameters)
        codes_SNO = codes_KO.float().unflatten(0, (len(scale_SO), -1))
        return (codes_SNO * scale_SO[:, None]).sub_(minimum_SO[:, None]).flatten(0, 1)

    def column_rounder(self, parameters: Parameters, columns: int) -> ColumnRounder:
        scale_SO, minimum_SO = self._scales(parameters)
        return _affine_rounder(scale_SO, minimum_SO, columns, self.top)

    def refit(
        self, parameters: Parameters, codes_KO: Tensor, h_KK: Tensor, error_KO: Tensor, slope_KO: Tensor
    ) -> tuple[Parameters, Tensor]:
        """Scale and minimum of each sub-group in turn, where that lowers the error."""
        d_1O, dmin_1O = parameters[:2]
        s_SO, m_SO = (p_SO.clone() for p_SO in parameters[2:])
        codes_SNO = codes_KO.unflatten(0, (-1, self.sub_size))

        def moved(sub: int, h_NN: Tensor, slope_NO: Tensor) -> Tensor:
            code_NO, total = codes_SNO[sub], float(h_NN.sum())
            uu_O, u1_O = (h_NN @ code_NO).mul_(code_NO).sum(0), h_NN.sum(1) @ code_NO
            us_O, slope_O = (code_NO * slope_NO).sum(0), slope_NO.sum(0)
            step_O, _ = _least_squares(uu_O, u1_O, us_O, slope_O, total)
            wanted_O = self._coded(s_SO[sub] * d_1O[0] + step_O, d_1O)[0]
            change_O = (wanted_O - s_SO[sub]) * d_1O[0]
            # the constant of least error once the scale has moved by so much
            raise_O = (slope_O - change_O * u1_O) / total
            lowest_O = self._coded(m_SO[sub] * dmin_1O[0] - raise_O, dmin_1O)[0]
            shift_O = (m_SO[sub] - lowest_O) * dmin_1O[0]
            grown_O = change_O * (change_O * uu_O + 2 * shift_O * u1_O - 2 * us_O)
            grown_O += shift_O * (shift_O * total - 2 * slope_O)
            better_O = grown_O < 0
            change_O, shift_O = torch.where(better_O, change_O, 0.0), torch.where(better_O, shift_O, 0.0)
            s_SO[sub] = torch.where(better_O, wanted_O, s_SO[sub])
            m_SO[sub] = torch.where(better_O, lowest_O, m_SO[sub])
            return torch.addcmul(shift_O, code_NO, change_O)

        _move_in_turn(moved, range(len(s_SO)), h_KK, error_KO, slope_KO)
        found = d_1O, dmin_1O, s_SO, m_SO
        return found, self.dequantize(codes_KO, found)
