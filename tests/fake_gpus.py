"""GPUs that are not there: the runtime's own code over torch's fake tensors, every allocation counted.

Under `FakeGpus` a tensor on `cuda:1` has a shape, a dtype and a device but no values. torch checks operators as it does
on real GPUs (shapes, dtypes, devices that do not match), with the meta functions of tinygemm and of the flash kernel,
and each storage goes through a model of torch's caching allocator. What is inside kernels (cuBLAS apart) is not seen,
and neither are values, speed and the CUDA context.

torch calls that need a CUDA build even for fake tensors (indexing with brackets, `copy_`, device numbers) are replaced
by operators that do the same.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import bias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenq import machine
from qwenq.model import layer
from qwenq.planning.engines.torch import CUBLAS_WORKSPACE
from qwenq.planning.memory import context_term
from qwenq.planning.rig import find_gpu
from qwenq.runtime import linear
from qwenq.solver import columns, superblock
from qwenq.units import GIB, MIB

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.mm.out, aten.addmm.default, aten.bmm.default}


@dataclass(eq=False)
class _Block:
    size: int
    pool: str
    before: _Block | None = None
    after: _Block | None = None
    free: bool = False


@dataclass
class Allocator:
    """c10/cuda/CUDACachingAllocator.cpp for one GPU: segments, best fit, splitting, merging; no garbage collection."""

    limit: int = 1 << 62  # bytes it may reserve
    index: int = 0
    allocated: int = 0
    reserved: int = 0
    allocated_peak: int = 0
    reserved_peak: int = 0
    peak_operator: str = ""
    _free: dict[str, list[tuple[int, int, _Block]]] = field(default_factory=lambda: {"small": [], "large": []})

    def take(self, n_bytes: int, operator: str = "") -> _Block:
        size = max(512, -(-n_bytes // 512) * 512)
        pool = "small" if size <= MIB else "large"
        free = self._free[pool]
        at = bisect_left(free, size, key=lambda entry: entry[0])
        if at < len(free):
            block = free.pop(at)[2]
        else:
            segment = 2 * MIB if pool == "small" else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            if self.reserved + segment > self.limit:
                self.empty_cache()  # as torch does before it gives up
            if self.reserved + segment > self.limit:
                raise torch.OutOfMemoryError(
                    f"Tried to allocate {size / MIB:.2f} MiB. GPU {self.index} holds {self.allocated / MIB:.0f} MiB in "
                    f"{self.reserved / MIB:.0f} MiB reserved ({operator})"
                )
            self.reserved += segment
            self.reserved_peak = max(self.reserved_peak, self.reserved)
            block = _Block(segment, pool)
        left = block.size - size
        if left >= 512 if pool == "small" else left > MIB:
            rest = _Block(left, pool, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._put(rest)
        block.free = False
        self.allocated += block.size
        if self.allocated > self.allocated_peak:
            self.allocated_peak, self.peak_operator = self.allocated, operator
        return block

    def give(self, block: _Block) -> None:
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._free[block.pool].remove((other.size, id(other), other))
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        self._put(block)

    def empty_cache(self) -> None:
        """Give whole free segments back to the driver."""
        for pool, entries in self._free.items():
            whole = [entry for entry in entries if entry[2].before is None and entry[2].after is None]
            self.reserved -= sum(size for size, _, _ in whole)
            self._free[pool] = [entry for entry in entries if entry not in whole]

    def forget_peaks(self) -> None:
        self.allocated_peak, self.reserved_peak, self.peak_operator = self.allocated, self.reserved, ""

    def _put(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.pool], (block.size, id(block), block))


class _Allocations(TorchDispatchMode):
    """Every storage on a fake GPU is taken from its allocator and given back when torch lets go of it."""

    def __init__(self, gpus: Sequence[Allocator]) -> None:
        super().__init__()
        self.gpus = gpus
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.with_workspace: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, FakeTensor) and value.fake_device.type == "cuda":
                index = value.fake_device.index or 0
                if func in PRODUCTS and index not in self.with_workspace:
                    self.with_workspace.add(index)
                    self.gpus[index].take(CUBLAS_WORKSPACE)
                storage = value.untyped_storage()
                if storage not in self.known:
                    self.known.add(storage)
                    block = self.gpus[index].take(storage.nbytes(), f"{func} {list(value.shape)}")
                    weakref.finalize(storage, self.gpus[index].give, block)
        return out


class _WithoutCudaBuild(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _index(*args)
        if func is Tensor.__setitem__:
            target, key, value = args
            aten.copy_(_index(target, key), value)
            return None
        if func is Tensor.__invert__:
            return aten.bitwise_not(args[0])
        if func is torch.equal:  # copies arrive
            return True
        if func is torch.tensor and kwargs and kwargs.get("device") is not None:
            plain = func(*args)
            return torch.empty(plain.shape, dtype=plain.dtype, device=kwargs["device"])
        if func in _ANSWERS:
            return _ANSWERS[func]
        if func is Tensor.data_ptr:  # accelerate knows tied tensors by it
            return id(args[0].untyped_storage())
        if func is Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else aten.clone(args[0], memory_format=torch.contiguous_format)
        if func is Tensor.copy_:
            return aten.copy_(*args, **(kwargs or {}))
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], int):
            args = args[0], torch.device("cuda", args[1]), *args[2:]
        if func is torch.device and isinstance(args[0], int):
            args = "cuda", args[0]
        return func(*args, **(kwargs or {}))


# What code that asks a tensor for its value is told: all is finite, symmetric and live, and no factorization fails.
_ANSWERS: dict[Any, Any] = {Tensor.__bool__: True, Tensor.__float__: 1.0, Tensor.__int__: 0, Tensor.item: 1.0}


def _index(value: Tensor, key: Any) -> Tensor:
    keys: tuple[Any, ...] = key if isinstance(key, tuple) else (key,)
    at = next((at for at, k in enumerate(keys) if k is Ellipsis), None)
    if at is not None:
        named = sum(k is not None for k in keys) - 1
        keys = keys[:at] + (slice(None),) * (value.ndim - named) + keys[at + 1 :]
    dim, chosen = 0, list[tuple[int, Tensor]]()
    for k in keys:
        if k is None:
            value, dim = value.unsqueeze(dim), dim + 1
        elif isinstance(k, int):
            value = value.select(dim, k)
        elif isinstance(k, Tensor):
            chosen, dim = [*chosen, (dim, k)], dim + 1
        elif k == slice(None):
            dim += 1
        else:
            assert isinstance(k, slice), f"cannot index with {k!r} here"
            value, dim = aten.slice(value, dim, k.start, k.stop, k.step or 1), dim + 1
    for at, k in chosen:  # booleans: all of them true
        value = value.clone() if k.dtype == torch.bool else value.index_select(at, k.reshape(-1)).unflatten(at, k.shape)
    return value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: str | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` comes to: the flash kernel, or plain products for heads' single rows."""
    assert query.shape[1] == key.shape[1] or enable_gqa, "heads differ without enable_gqa"
    flash = query.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if not flash:
        assert query.shape[1] == key.shape[1] and not is_causal and attn_mask is None, "torch would write out scores"
        return torch.softmax(query @ key.transpose(-1, -2) * scale, -1) @ value
    assert attn_mask in (None, "lower right"), "a mask would leave the flash kernel"
    causal = is_causal or attn_mask is not None
    out: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[0]
    return out


class FakeGpus:
    """`with FakeGpus(["RTX 3090", "RTX 3090"]) as gpus:` torch sees them, with all of their memory free."""

    def __init__(self, names: Sequence[str], capability: tuple[int, int] = (8, 6)) -> None:
        self.gpus = [find_gpu(name) for name in names]
        self.sizes = [round((gpu.usable_gib or gpu.memory_gib) * GIB) for gpu in self.gpus]
        self.allocators = [
            Allocator(size - context_term(gpu.name).n_bytes, index)
            for index, (gpu, size) in enumerate(zip(self.gpus, self.sizes, strict=True))
        ]
        self._capability = capability
        self._stack = ExitStack()

    def __enter__(self) -> FakeGpus:
        enter = self._stack.enter_context
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        sizes = self.sizes

        def of(device: Any = 0) -> int:
            return device if isinstance(device, int) else torch.device(device).index or 0

        cuda = {
            "mem_get_info": lambda device=0: (sizes[of(device)], sizes[of(device)]),
            "device_count": lambda: len(sizes),
            "get_device_name": lambda device=0: self.gpus[of(device)].name,
            "get_arch_list": lambda: ["sm_70", "sm_80"],
            "device": lambda device: nullcontext(),
            "get_device_capability": lambda device=0: self._capability,
            "get_device_properties": lambda device=0: SimpleNamespace(total_memory=sizes[of(device)]),
            "max_memory_allocated": lambda device=0: self.allocators[of(device)].allocated_peak,
            "max_memory_reserved": lambda device=0: self.allocators[of(device)].reserved_peak,
            "synchronize": lambda device=0: None,
            "empty_cache": lambda: [allocator.empty_cache() for allocator in self.allocators],
            "reset_peak_memory_stats": lambda device=0: self.allocators[of(device)].forget_peaks(),
        }  # fmt: skip
        enter(patch.object(fake_tensor, "init_gpu_context", lambda device: None))  # else a driver is looked for
        enter(mode)  # while torch sees no GPU: it then works without a CUDA build
        for name, value in cuda.items():
            enter(patch.object(torch.cuda, name, value))
        enter(patch.object(torch.cuda, "is_available", lambda: True))
        enter(patch.object(columns, "graphed", lambda device: False))  # nothing can be captured
        enter(patch.object(machine, "find_spec", lambda name: None))  # Triton's kernels take no fake tensors
        enter(patch.object(F, "scaled_dot_product_attention", _attention))
        enter(patch.object(bias, "causal_lower_right", lambda tokens, keys: "lower right"))
        # these read values, which fake tensors have not
        enter(patch.object(FakeTensor, "tolist", lambda ids: [0] * ids.numel()))
        enter(patch.object(layer, "scales_by_weight", lambda norm: True))
        enter(patch.object(linear, "_order", lambda rows, columns, device: torch.zeros(
            rows * columns, dtype=torch.int64, device=device)))  # fmt: skip
        enter(patch.object(superblock, "_table", superblock._table.__wrapped__))  # what is kept would stay fake
        enter(_Allocations(self.allocators))
        enter(_WithoutCudaBuild())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
