"""Grids: the values that the weights of one group may take, parameters as they are stored, and the search for them.

Shapes: K columns of a group, O rows of the weight, n parameters of a kind in a group. Work tensors are [K, O] and
[n, O], so that work runs along contiguous rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SCALE = 1e-5  # float16 has 7 bits of precision left here and none a little below
MAX_SCALE = 65504.0  # of float16

# Scale candidates as fractions of the one that just reaches the largest weight; each is then refitted, so few do.
SHRINK = tuple(1.1 - 0.05 * i for i in range(13))

Parameters = tuple[Tensor, ...]
ColumnRounder = Callable[[int, Tensor, Tensor, Tensor], None]


def float16_scale(scale: Tensor) -> Tensor:
    """`scale` as it will be stored: rounded to float16, at least MIN_SCALE in size, sign kept; float32."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return scale.abs().clamp_(MIN_SCALE, MAX_SCALE).half().float() * sign


class Grid(ABC):
    """Values that the weights of a group may take: what the solver knows of a format.

    A group is the columns whose parameters are chosen together. Parameters are float32 tensors [n, O] that hold values
    as they will be stored: fp16 scales, 6-bit codes of scales under a super-block's pair, ... Of one tensor, each of
    its n rows belongs to K / n consecutive columns of the group.
    """

    group_size: int  # columns of a group; -1: all of a row's
    stored_dtypes: tuple[torch.dtype, ...]  # of the parameters

    def group_width(self, columns: int) -> int:
        """Columns per group for a weight of `columns` columns."""
        return columns if self.group_size == -1 else self.group_size

    def widths(self, columns: int) -> tuple[int, ...]:
        """Columns that stay together in whatever order columns are rounded, outermost first: group, sub-group, ...

        Each divides the one before. Every parameter belongs to as many columns as one of these says.
        """
        return (self.group_width(columns),)

    @abstractmethod
    def fit(self, w_KO: Tensor, importance_K: Tensor | None = None) -> Parameters:
        """Parameters with a small sum over K of importance * (w - rounded w)**2.

        importance_K: float32 [K]. None: the values just span the weights, which is plain rounding to nearest.
        """

    def fit_within(
        self, parameters: Parameters, sub: int, w_NO: Tensor, importance_N: Tensor
    ) -> tuple[Parameters, Parameters]:
        """Parameters of a group with those of one innermost sub-group (see `widths`) found anew: all, and its alone.

        It is asked when the sub-group's turn comes, of grids that have sub-groups. What all of them share stays.
        """
        count = self.group_size // len(w_NO)
        parts = ((sub * len(p_NO) // count, max(1, len(p_NO) // count), p_NO) for p_NO in parameters)
        return parameters, tuple(p_NO[low : low + size] for low, size, p_NO in parts)

    @abstractmethod
    def round(self, w_KO: Tensor, parameters: Parameters) -> Tensor:
        """Nearest codes, 0 to 255, in float32 [K, O]."""

    @abstractmethod
    def dequantize(self, codes_KO: Tensor, parameters: Parameters) -> Tensor:
        """Values of the codes (float32 or uint8), in float32 [K, O], for one group or any number of them."""

    def column_rounder(self, parameters: Parameters, columns: int) -> ColumnRounder:
        """round(k, value_O, code_O, error_O) for column k of a group: codes nearest to `value_O` go into `code_O`, and
        their values are taken off `error_O`. The loop calls it once for every column of the weight.
        """

        def round_column(k: int, value_O: Tensor, code_O: Tensor, error_O: Tensor) -> None:
            own = tuple(p_NO[k * len(p_NO) // columns][None] for p_NO in parameters)
            code_1O = self.round(value_O[None], own)
            code_O.copy_(code_1O[0])
            error_O.sub_(self.dequantize(code_1O, own)[0])

        return round_column

    def refit(
        self, parameters: Parameters, codes_KO: Tensor, h_KK: Tensor, error_KO: Tensor, slope_KO: Tensor
    ) -> tuple[Parameters, Tensor]:
        """Parameters that fit the codes as they stand better, and the values [K, O] of the codes under them.

        What counts is tr(E H E'), E weights minus values: `error_KO` is E' of this group, h_KK its block of H, and
        `slope_KO` (H E') of its columns, all other columns included. Both are brought up to date in place; see `move`.
        """
        return parameters, self.dequantize(codes_KO, parameters)


def move(change_KO: Tensor, h_KK: Tensor, error_KO: Tensor, slope_KO: Tensor) -> None:
    """Bring error and slope of a group up to date, in place, when its values change by `change_KO`."""
    error_KO.sub_(change_KO)
    slope_KO.sub_(h_KK @ change_KO)


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """scale * (code - zero): a float16 scale and a zero point a group; symmetric grids have zero = 2**(bits - 1).

    Parameters: scale and zero point, [1, O] each.
    """

    bits: int
    group_size: int = 128
    sym: bool = True

    stored_dtypes = (torch.float16, torch.uint8)

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def zero(self) -> int:
        """The code that means 0 in a symmetric grid."""
        return 1 << (self.bits - 1)

    def fit(self, w_KO: Tensor, importance_K: Tensor | None = None) -> Parameters:
        """Scale and zero point, by search when there is an importance.

        Each candidate scale gives codes; the scale that fits those codes best is a quotient of two sums, and what it
        leaves of the error follows from the same sums. So few candidates are needed.
        """
        if importance_K is None:
            return self._span(w_KO)
        return self._symmetric(w_KO, importance_K) if self.sym else self._asymmetric(w_KO, importance_K)

    def _span(self, w_KO: Tensor) -> Parameters:
        """The grid that just spans each row.

        Symmetric: the largest weight becomes code 2**bits - 1 or its mirror image, as common tools do.
        """
        if self.sym:
            scale_O = float16_scale(w_KO.abs().amax(0) / (self.zero - 0.5))
            return scale_O[None], torch.full_like(scale_O, self.zero)[None]
        low_O, high_O = w_KO.amin(0).clamp_(max=0), w_KO.amax(0).clamp_(min=0)
        scale_O = float16_scale((high_O - low_O) / (self.levels - 1))
        return scale_O[None], (-low_O / scale_O).round_().clamp_(0, self.levels - 1)[None]

    def _symmetric(self, w_KO: Tensor, importance_K: Tensor) -> Parameters:
        """A symmetric grid reaches one step further down than up: the scale takes the sign that turns this end towards
        the longer tail.
        """
        low_O, high_O = w_KO.amin(0), w_KO.amax(0)
        weighted_KO = w_KO * importance_K[:, None]
        sign_O = torch.where(high_O > -low_O, -1.0, 1.0)
        full_O = torch.maximum(high_O, -low_O).clamp_(min=MIN_SCALE) / self.zero * sign_O
        best_O, scale_O = torch.full_like(full_O, -1.0), full_O.clone()
        for shrink in SHRINK:
            q_KO = (w_KO * (1 / (full_O * shrink))).round_().clamp_(-self.zero, self.zero - 1)
            cross_O = (weighted_KO * q_KO).sum(0)
            norm_O = importance_K @ q_KO.square_()
            gain_O = (cross_O * cross_O).div_(norm_O).nan_to_num_(0.0)
            better_O = gain_O > best_O
            best_O = torch.where(better_O, gain_O, best_O)
            scale_O = torch.where(better_O, cross_O.div_(norm_O), scale_O)
        scale_O = torch.where(scale_O.isfinite() & (scale_O != 0), scale_O, full_O)
        return float16_scale(scale_O)[None], torch.full_like(full_O, self.zero)[None]

    def _asymmetric(self, w_KO: Tensor, importance_K: Tensor) -> Parameters:
        low_O, high_O = w_KO.amin(0).clamp_(max=0), w_KO.amax(0).clamp_(min=0)
        weighted_KO = w_KO * importance_K[:, None]
        total_O = importance_K @ (w_KO * w_KO)
        least_O = torch.full_like(low_O, float("inf"))
        (scale_O,), (zero_O,) = self._span(w_KO)
        for shrink in SHRINK:
            step_O = ((high_O - low_O) * (shrink / (self.levels - 1))).clamp_(min=MIN_SCALE)
            offset_O = (-low_O * shrink / step_O).round_().clamp_(0, self.levels - 1)
            q_KO = (w_KO / step_O).round_().add_(offset_O).clamp_(0, self.levels - 1).sub_(offset_O)
            cross_O = (weighted_KO * q_KO).sum(0)
            norm_O = importance_K @ q_KO.square_()
            fitted_O = float16_scale((cross_O / norm_O).nan_to_num_(0.0))
            error_O = total_O - 2 * fitted_O * cross_O + fitted_O * fitted_O * norm_O
            better_O = (error_O < least_O) & (fitted_O > 0)
            least_O = torch.where(better_O, error_O, least_O)
            scale_O = torch.where(better_O, fitted_O, scale_O)
            zero_O = torch.where(better_O, offset_O, zero_O)
        return scale_O[None], zero_O[None]

    def round(self, w_KO: Tensor, parameters: Parameters) -> Tensor:
        scale_1O, zero_1O = parameters
        return (w_KO / scale_1O).round_().add_(zero_1O).clamp_(0, self.levels - 1)

    def dequantize(self, codes_KO: Tensor, parameters: Parameters) -> Tensor:
        scale_GO, zero_GO = parameters
        codes_GKO = codes_KO.unflatten(0, (len(scale_GO), -1))
        zero_G1O = zero_GO[:, None].float()
        w_GKO = codes_GKO - zero_G1O if codes_GKO.is_floating_point() else codes_GKO.float().sub_(zero_G1O)
        return w_GKO.mul_(scale_GO[:, None].float()).flatten(0, 1)

    def column_rounder(self, parameters: Parameters, columns: int) -> ColumnRounder:
        (scale_O,), (zero_O,) = parameters
        inverse_O, top = 1 / scale_O, self.levels - 1

        def round_column(k: int, value_O: Tensor, code_O: Tensor, error_O: Tensor) -> None:
            torch.addcmul(zero_O, value_O, inverse_O, out=code_O)
            code_O.round_().clamp_(0, top)
            error_O.addcmul_(code_O - zero_O, scale_O, value=-1)

        return round_column

    def refit(
        self, parameters: Parameters, codes_KO: Tensor, h_KK: Tensor, error_KO: Tensor, slope_KO: Tensor
    ) -> tuple[Parameters, Tensor]:
        """The scale of least error, its sign kept; the zero point stays."""
        (scale_O,), (zero_O,) = parameters
        unit_KO = codes_KO - zero_O
        spread_KO = h_KK @ unit_KO
        step_O = (unit_KO * slope_KO).sum(0) / (unit_KO * spread_KO).sum(0)
        fitted_O = float16_scale(scale_O + step_O.nan_to_num_(0.0, 0.0, 0.0))
        fitted_O = torch.where((fitted_O < 0) == (scale_O < 0), fitted_O, scale_O)
        change_O = scale_O - fitted_O
        error_KO.addcmul_(unit_KO, change_O)
        slope_KO.addcmul_(spread_KO, change_O)
        return (fitted_O[None], parameters[1]), unit_KO.mul_(fitted_O)


@dataclass(frozen=True)
class QTensor:
    """One quantized linear, unpacked: codes, and the parameters of the grid that they lie on."""

    codes_OI: Tensor  # uint8 [out, in]
    parameters: Parameters  # [out, n] each, n over all groups, in the grid's stored dtypes or those that were read
    grid: Grid
    order_I: Tensor | None = None  # int64 [in]: which column each column was, where they are sorted by group

    @property
    def integers(self) -> IntegerGrid:
        """Its grid, an integer one; TypeError for another."""
        if not isinstance(self.grid, IntegerGrid):
            raise TypeError(f"{type(self.grid).__name__} is not an integer grid")
        return self.grid

    @property
    def scales_OG(self) -> Tensor:
        """Scales of an integer grid, [out, groups]; they may be negative."""
        return self.parameters[0]

    @property
    def zeros_OG(self) -> Tensor:
        """Zero points of an integer grid, uint8 [out, groups]; 2**(bits - 1) everywhere in a symmetric one."""
        return self.parameters[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], computed in float32, then rounded to `dtype`; its columns in their own order."""
        w_OI = self.grid.dequantize(self.codes_OI.T, tuple(p_ON.T for p_ON in self.parameters)).T.to(dtype)
        if self.order_I is None:
            return w_OI
        sorted_OI, w_OI = w_OI, torch.empty_like(w_OI)
        w_OI[:, self.order_I] = sorted_OI
        return w_OI
