"""Hessians while they are summed: half of a symmetric matrix, in one flat tensor that is added to and sent as such.

Torch is not imported: the dry run asks for sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Triangle:
    """Upper triangle of a symmetric matrix [width, width] in block rows, one behind the other in a flat tensor.

    Of a block row the columns left of its diagonal block are left out, which saves almost half of work and memory.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.starts = range(0, width, max(256, -(-width // 16)))

    @property
    def heights(self) -> list[int]:
        """Rows of each block row."""
        return [min(self.starts.step, self.width - start) for start in self.starts]

    @property
    def size(self) -> int:
        """Values."""
        return sum(n * (self.width - start) for n, start in zip(self.heights, self.starts, strict=True))

    def rows(self, flat: Tensor) -> list[tuple[int, Tensor]]:
        """First row of each block row, and its values [rows, columns from there on]."""
        found, at = [], 0
        for n, start in zip(self.heights, self.starts, strict=True):
            found.append((start, flat[at : at + n * (self.width - start)].view(n, -1)))
            at += n * (self.width - start)
        return found

    def add_products(self, flat: Tensor, x_TI: Tensor) -> None:
        """Add x' x for inputs [..., width] to a Hessian, in place.

        Products are float32. Of bfloat16 inputs they are bfloat16 where a device multiplies these fast: summed in
        float32 on a GPU, while a CPU rounds a product of these tokens once to bfloat16, and adds it in float32.
        """
        import torch

        from qwenq.model.devices import product_dtype

        x_TI = x_TI.reshape(-1, self.width)
        narrow = product_dtype(x_TI) == torch.bfloat16
        if not narrow:
            x_TI = x_TI.float()
        for start, block in self.rows(flat):
            own_KT = x_TI[:, start : start + len(block)].T
            if not narrow:
                block.addmm_(own_KT, x_TI[:, start:])
            elif flat.device.type == "cuda":
                block.add_(torch.mm(own_KT, x_TI[:, start:], out_dtype=torch.float32))
            else:
                block.add_(own_KT @ x_TI[:, start:])

    def square(self, flat: Tensor) -> Tensor:
        """The matrix, float32 [width, width]; zeros below the diagonal blocks."""
        h_II = flat.new_zeros(self.width, self.width)
        for start, block in self.rows(flat):
            h_II[start : start + len(block), start:] = block
        return h_II

    def subtract_product(self, flat: Tensor, w_IO: Tensor, from_IO: Tensor) -> None:
        """from -= H w, in place, for the symmetric matrix H."""
        for start, block in self.rows(flat):
            stop = start + len(block)
            from_IO[start:stop].addmm_(block, w_IO[start:], alpha=-1)
            from_IO[stop:].addmm_(block[:, stop - start :].T, w_IO[start:stop], alpha=-1)

    def diagonal(self, flat: Tensor) -> Tensor:
        """A copy of the diagonal [width]."""
        diagonal_I = flat.new_empty(self.width)
        for start, block in self.rows(flat):
            diagonal_I[start : start + len(block)] = block.diagonal()
        return diagonal_I

    def divide(self, flat: Tensor, scales_I: Tensor) -> None:
        """Divide rows and columns by scales, in place: the Hessian of inputs divided by them."""
        for start, block in self.rows(flat):
            block.div_(scales_I[start : start + len(block), None]).div_(scales_I[start:])
