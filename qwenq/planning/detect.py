"""The GPUs of this machine, as the NVIDIA driver (NVML) tells them: names, total and free memory."""

from __future__ import annotations

import os

from qwenq.errors import PlanError
from qwenq.planning.rig import Gpu, Rig, find_gpu
from qwenq.units import GIB


def detect_rig() -> Rig:
    """This machine's GPUs with the memory free right now; PlanError without NVML, a driver or a GPU."""
    try:
        import pynvml
    except ImportError:
        raise PlanError("--detect needs nvidia-ml-py", hint="pip install 'qwenq[detect]'") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise PlanError(
            f"no NVIDIA driver answers ({error})", hint='name the rig instead, for instance --gpu "2x RTX 3090"'
        ) from None
    try:
        gpus, free = [], []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(known_gpu(str(pynvml.nvmlDeviceGetName(handle)), int(memory.total)))
            free.append(int(memory.free))
    except pynvml.NVMLError as error:
        raise PlanError(f"the NVIDIA driver failed: {error}") from None
    finally:
        pynvml.nvmlShutdown()
    if not gpus:
        raise PlanError("the NVIDIA driver sees no GPU", hint="name the rig with --gpu")
    return Rig(tuple(gpus), free_bytes=tuple(free))


def sees_gpu() -> bool:
    """Whether the driver tells of a GPU that CUDA_VISIBLE_DEVICES leaves; False too where nothing can ask it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        return bool(detect_rig().gpus)
    except PlanError:
        return False


def known_gpu(name: str, total: int) -> Gpu:
    """The catalogue's GPU of this name, else one whose figures are unknown but for its memory."""
    try:
        return find_gpu(name)
    except PlanError:
        return Gpu(name, "nvidia", total / GIB, total / GIB, None, None, None, "", None, None, "", "NVML")
