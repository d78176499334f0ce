"""A grid that no format here has, made to be solved by a loop that knows nothing of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.solver.grid import Grid, IntegerGrid, Parameters, float16_scale, move


@dataclass(frozen=True)
class SuperBlockGrid(Grid):
    """(code - 8) * d * s: d a float16 of 8 x 32 columns, s a 6-bit code (-32 to 31) of 32: d [1, O], s [8, O]."""

    group_size: int = 256
    stored_dtypes = (torch.float16, torch.int8)

    def widths(self, columns: int) -> tuple[int, ...]:
        return 256, 32

    def fit(self, w_KO: Tensor, importance_K: Tensor | None = None) -> Parameters:
        inner = IntegerGrid(4, 32)
        parts = zip(w_KO.split(32), [None] * 8 if importance_K is None else importance_K.split(32), strict=True)
        scale_SO = torch.cat([inner.fit(w, importance)[0] for w, importance in parts])
        d_1O = float16_scale(scale_SO.abs().amax(0, keepdim=True) / 31)
        return d_1O, self._six_bits(scale_SO / d_1O)

    def _six_bits(self, value: Tensor) -> Tensor:
        code = value.round().clamp(-32, 31)
        return torch.where(code == 0, 1.0, code)  # a scale of nothing holds no weight

    def _scale(self, parameters: Parameters, columns: int) -> Tensor:
        d_NO, s_SO = (p.float() for p in parameters)
        return (d_NO.repeat_interleave(len(s_SO) // len(d_NO), 0) * s_SO).repeat_interleave(columns // len(s_SO), 0)

    def round(self, w_KO: Tensor, parameters: Parameters) -> Tensor:
        return (w_KO / self._scale(parameters, len(w_KO))).round().clamp(-8, 7) + 8

    def dequantize(self, codes_KO: Tensor, parameters: Parameters) -> Tensor:
        return (codes_KO.float() - 8) * self._scale(parameters, len(codes_KO))

    def refit(
        self, parameters: Parameters, codes_KO: Tensor, h_KK: Tensor, error_KO: Tensor, slope_KO: Tensor
    ) -> tuple[Parameters, Tensor]:
        """Each sub-group's code in turn, where that lowers the error."""
        d_1O, s_SO = parameters
        s_SO = s_SO.clone()
        for sub in range(8):
            unit_KO = torch.zeros_like(error_KO)
            unit_KO[32 * sub : 32 * sub + 32] = codes_KO[32 * sub : 32 * sub + 32] - 8
            gain_O, norm_O = (unit_KO * slope_KO).sum(0), (unit_KO * (h_KK @ unit_KO)).sum(0)
            wanted_O = self._six_bits(s_SO[sub] + (gain_O / norm_O / d_1O[0]).nan_to_num(0.0))
            step_O = (wanted_O - s_SO[sub]) * d_1O[0]
            better_O = step_O * step_O * norm_O < 2 * step_O * gain_O
            move(unit_KO * torch.where(better_O, step_O, 0.0), h_KK, error_KO, slope_KO)
            s_SO[sub] = torch.where(better_O, wanted_O, s_SO[sub])
        return (d_1O, s_SO), self.dequantize(codes_KO, (d_1O, s_SO))
