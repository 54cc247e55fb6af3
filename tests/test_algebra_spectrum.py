"""Singular values from the factors, against those of the matrix itself."""

from __future__ import annotations

from math import isclose, sqrt

import pytest
import torch

from loramgr.algebra.spectrum import effective_rank, frobenius_norm, singular_values


@pytest.mark.parametrize(("rows", "columns", "rank"), [(30, 20, 4), (5, 40, 8), (40, 5, 8), (1, 7, 1), (6, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_singular_values_are_those_of_the_delta(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    lora_A = torch.randn(rank, columns, generator=generator).to(dtype)
    lora_B = torch.randn(rows, rank, generator=generator).to(dtype)
    values = singular_values(lora_A, lora_B, -2.5)
    expected = torch.linalg.svdvals(-2.5 * lora_B.double() @ lora_A.double())[: len(values)]
    assert values.dtype == torch.float64
    assert len(values) == min(rank, rows, columns)
    assert torch.allclose(values, expected, rtol=1e-12, atol=1e-12)
    assert isclose(frobenius_norm(values), float((2.5 * lora_B.double() @ lora_A.double()).norm()), rel_tol=1e-12)


@pytest.mark.parametrize("factor", [0.0, 1e-200, 1.0, 1e200, 1e308])
def test_a_norm_whose_squares_leave_float64(factor: float) -> None:
    assert isclose(frobenius_norm(torch.tensor([3.0, 4.0]).double() * (factor / 10)), factor / 2, rel_tol=1e-12)
    assert frobenius_norm(torch.zeros(0).double()) == 0


def test_small_singular_values_keep_their_digits() -> None:
    left, _ = torch.linalg.qr(torch.randn(50, 2, generator=torch.Generator().manual_seed(1)).double())
    values = singular_values(torch.diag(torch.tensor([1.0, 1e-9]).double()), left, 1.0)
    assert isclose(values[1].item(), 1e-9, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.0], 0.0), ([3.0], 1.0), ([2.0, 2.0, 2.0], 3.0), ([1.0, 0.0], 1.0), ([3.0, 1.0], 4 / 3**0.75)],
)
def test_effective_rank(values: list[float], expected: float) -> None:
    assert isclose(effective_rank(torch.tensor(values).double()), expected, rel_tol=1e-12)


def test_frobenius_norm() -> None:
    assert isclose(frobenius_norm(torch.tensor([3.0, 4.0, 1.0]).double()), sqrt(26))
