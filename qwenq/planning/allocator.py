"""What torch's CUDA caching allocator hands out for tensors that are loaded and never freed: more than their bytes.

Rules of c10/cuda/CUDACachingAllocator.cpp: sizes round up to 512 bytes; up to 1 MiB come from a pool of small blocks;
larger ones take the best-fitting free block, else a new segment of 20 MiB (below 10 MiB) or of whole 2 MiB; a block is
split only when more than 1 MiB would be left, otherwise all of it counts as allocated.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

MIB = 1 << 20


def allocated_bytes(sizes: Iterable[int]) -> int:
    """`torch.cuda.memory_allocated` after tensors of these sizes, in this order, on an empty GPU."""
    return sum(allocated_blocks(sizes))


def allocated_blocks(sizes: Iterable[int]) -> Iterator[int]:
    """Bytes counted for each tensor."""
    free: list[int] = []
    for size in sizes:
        wanted = -(-size // 512) * 512
        if wanted > MIB:
            fit = bisect_left(free, wanted)
            if fit < len(free):
                block = free.pop(fit)
            else:
                block = 20 * MIB if wanted < 10 * MIB else -(-wanted // (2 * MIB)) * (2 * MIB)
            if block - wanted > MIB:
                insort(free, block - wanted)
            else:
                wanted = block
        yield wanted
