"""Devices before they compute: which matmuls they do well, and whether their copies can be trusted.

CPUs without AVX-512 (desktop ones: AMD's before Zen 4, Intel's Core) have no bfloat16 matmuls worth the name: from two
rows on torch multiplies there in scalar code, 4 to 5 times slower than in float32 (reports/LOG.md). GPUs before compute
capability 8.0 emulate them: a V100 does 9.6 TFLOP/s in bfloat16, 14 in float32 (lablup/mlxcel#1654; not measured here).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from qwenq.errors import RunError


def on_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """`tensor` there and in this dtype; converted on the side of the copy where it is the smaller one."""
    if dtype.itemsize > tensor.dtype.itemsize:
        return tensor.to(device).to(dtype)
    return tensor.to(dtype).to(device)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply `x` in: its own, but float32 for bfloat16 on a device that is slow at it."""
    if x.dtype == torch.bfloat16 and not multiplies_bfloat16(x.device):
        return torch.float32
    return x.dtype


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are as fast as float32 ones at least: by oneDNN on a CPU, by tensor cores on a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type != "cpu" or _cpu_multiplies_bfloat16()


@cache
def _cpu_multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiply_into(y_MO: Tensor, x_MI: Tensor, w_IO: Tensor) -> None:
    """y = x w, both in the dtype of x, rounded to that of y."""
    if y_MO.dtype == x_MI.dtype:
        torch.mm(x_MI, w_IO, out=y_MO)
    else:
        y_MO.copy_(torch.mm(x_MI, w_IO))


def check_gpus(devices: Sequence[torch.device]) -> None:
    """RunError when a GPU is older than this torch's kernels, or copies between two of them arrive damaged.

    Peer-to-peer copies go wrong silently under some drivers and IOMMU settings (pytorch#96600, llama.cpp#3772).
    """
    gpus = list(dict.fromkeys(device for device in devices if device.type == "cuda"))
    for gpu in gpus:
        major, minor = torch.cuda.get_device_capability(gpu)
        built_for = [int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
        oldest = min(built_for, default=0)
        if 10 * major + minor < oldest:
            raise RunError(
                f"{gpu} {torch.cuda.get_device_name(gpu)}: compute capability {major}.{minor}, "
                f"this build of torch needs at least {oldest / 10:.1f}",
                hint="leave it out with CUDA_VISIBLE_DEVICES, or install torch for an older CUDA (cu126)",
            )
    for source, target in zip(gpus, gpus[1:] + gpus[:1], strict=True):
        sent = torch.arange(1 << 16, device=source)
        if not torch.equal(sent.to(target).cpu(), sent.cpu()):
            raise RunError(
                f"copies from {source} to {target} arrive damaged",
                hint="a newer driver, or turning the IOMMU off, fixes it; CUDA_VISIBLE_DEVICES=0 uses one GPU",
            )


def without_cudnn_attention() -> None:
    """Have torch prefer its flash kernel: on Hopper it would take cuDNN's, which plans anew for every length of keys.

    Each token has one key more than the last: 23 to 37 ms per token on an H100 by others' figures, none measured
    here, and plans are never let go (aten/src/ATen/native/cudnn/MHA.cpp).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
