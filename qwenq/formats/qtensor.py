"""A quantized weight before it is packed and after it is unpacked: codes, scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.formats.base import Scheme


@dataclass(frozen=True)
class QTensor:
    """One quantized linear, unpacked; `scales_OG` may be negative, symmetric `zeros_OG` is scheme.zero everywhere."""

    codes_OI: Tensor  # uint8 [out, in]
    scales_OG: Tensor  # float16 [out, groups]; float32 or bfloat16 when read from a checkpoint that stores them so
    zeros_OG: Tensor  # uint8 [out, groups]
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in]: scale * (code - zero), computed in float32, then rounded to `dtype`."""
        rows, columns = self.codes_OI.shape
        groups = self.scales_OG.shape[1]
        w_OGK = self.codes_OI.view(rows, groups, columns // groups).float()
        w_OGK.sub_(self.zeros_OG[:, :, None]).mul_(self.scales_OG.float()[:, :, None])
        return w_OGK.view(rows, columns).to(dtype)
