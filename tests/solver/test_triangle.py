"""Half of a Hessian in a flat tensor, against the whole."""

from __future__ import annotations

import pytest
import torch

from qwenq.solver.triangle import Triangle


def whole(flat: torch.Tensor, triangle: Triangle) -> torch.Tensor:
    upper_II = triangle.square(flat).triu()
    return upper_II + upper_II.triu(1).T


@pytest.mark.parametrize("width", [6, 256, 257, 600, 5000])
def test_it_holds_every_value_above_the_diagonal(width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    triangle, x_TI = Triangle(width), torch.randn(24, width, generator=generator)
    flat = torch.zeros(triangle.size)
    triangle.add_products(flat, x_TI[:7])
    triangle.add_products(flat, x_TI[7:].reshape(1, 17, width))
    wanted_II = x_TI.double().T @ x_TI.double()
    torch.testing.assert_close(whole(flat, triangle).double(), wanted_II, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(triangle.diagonal(flat), triangle.square(flat).diagonal())
    assert width**2 / 2 < triangle.size <= width**2
    assert width < 5000 or triangle.size < 0.54 * width**2


def test_products_of_bfloat16_inputs_are_rounded_once_and_added_in_float32() -> None:
    generator = torch.Generator().manual_seed(4)
    triangle, x_TI = Triangle(600), torch.randn(512, 600, generator=generator).bfloat16()
    flat = torch.zeros(triangle.size)
    for part_TI in x_TI.split(64):
        triangle.add_products(flat, part_TI)
    once = sum((part_TI.double().T @ part_TI.double()).abs() for part_TI in x_TI.split(64))
    wrong_II = (whole(flat, triangle).double() - x_TI.double().T @ x_TI.double()).abs()
    assert bool((wrong_II <= 2**-8 * once).all())
    counted = torch.zeros(triangle.size)
    for _ in range(600):  # bfloat16 cannot count beyond 256
        triangle.add_products(counted, torch.ones(1, 600, dtype=torch.bfloat16))
    assert bool((counted == 600).all())


def test_float32_products_are_added_without_a_matrix_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`addmm_` alone, as memory is predicted; matmuls of float32 inputs end here."""
    triangle, x_TI = Triangle(300), torch.randn(9, 300, generator=torch.Generator().manual_seed(5))
    flat = torch.zeros(triangle.size)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", None)
        triangle.add_products(flat, x_TI)
    torch.testing.assert_close(triangle.diagonal(flat), x_TI.square().sum(0))


def test_it_multiplies_as_the_whole_matrix_does() -> None:
    generator = torch.Generator().manual_seed(2)
    triangle, x_TI = Triangle(600), torch.randn(64, 600, generator=generator)
    flat = torch.zeros(triangle.size)
    triangle.add_products(flat, x_TI)
    w_IO, from_IO = torch.randn(600, 5, generator=generator), torch.randn(600, 5, generator=generator)
    wanted_IO = from_IO.double() - x_TI.double().T @ x_TI.double() @ w_IO.double()
    triangle.subtract_product(flat, w_IO, from_IO)
    torch.testing.assert_close(from_IO.double(), wanted_IO, rtol=1e-4, atol=1e-2)


def test_divided_inputs_divide_rows_and_columns() -> None:
    generator = torch.Generator().manual_seed(3)
    triangle, x_TI = Triangle(300), torch.randn(9, 300, generator=generator)
    scales_I = torch.rand(300, generator=generator) + 0.5
    flat, divided = torch.zeros(triangle.size), torch.zeros(triangle.size)
    triangle.add_products(flat, x_TI)
    triangle.add_products(divided, x_TI / scales_I)
    triangle.divide(flat, scales_I)
    torch.testing.assert_close(flat, divided, rtol=1e-5, atol=1e-5)
