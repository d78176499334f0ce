"""In which dtype a device multiplies matrices well, for activations of a given dtype.

CPUs without AVX-512 (desktop ones: AMD's before Zen 4, Intel's Core) have no bfloat16 products worth the name: from
two rows on torch multiplies there in scalar code, 4 to 5 times slower than in float32 (reports/LOG.md).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply `x` in: its own, but float32 for 16-bit values on a CPU without instructions for them."""
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not cpu_multiplies_bfloat16()
    return torch.float32 if slow else x.dtype


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN, which torch asks for bfloat16 products, has kernels for this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiply_into(y_MO: Tensor, x_MI: Tensor, w_IO: Tensor) -> None:
    """y = x w, both in the dtype of x, rounded to that of y."""
    if y_MO.dtype == x_MI.dtype:
        torch.mm(x_MI, w_IO, out=y_MO)
    else:
        y_MO.copy_(torch.mm(x_MI, w_IO))
