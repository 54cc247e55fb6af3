"""Compensated sums: exact where they say so, and open wherever the bound does not decide."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rationals import DTYPES, FEWER, bits, nearest, tensors

from loramgr.algebra.compensated import decide, dot, split_product, two_product, two_sum

VALUES = st.sampled_from(DTYPES).flatmap(lambda dtype: tensors((6,), dtype)).map(torch.Tensor.double)


def finite(*values: torch.Tensor) -> bool:
    return all(bool(each.isfinite()) for each in values)


@given(VALUES, VALUES)
def test_two_sum_loses_nothing(a: torch.Tensor, b: torch.Tensor) -> None:
    for left, right, total, error in zip(a, b, *two_sum(a, b), strict=True):
        if finite(total, error):
            assert Fraction(left.item()) + Fraction(right.item()) == Fraction(total.item()) + Fraction(error.item())


@given(VALUES, VALUES)
def test_two_product_loses_nothing_or_says_so(a: torch.Tensor, b: torch.Tensor) -> None:
    for left, right, product, error in zip(a, b, *two_product(a, b), strict=True):
        exact = Fraction(left.item()) * Fraction(right.item())
        if finite(product, error):
            assert exact == Fraction(product.item()) + Fraction(error.item())
        else:
            assert not 2.0**-899 < abs(exact) < 2.0**899 or max(abs(left), abs(right)) > 2.0**899


@pytest.mark.parametrize(("a", "b"), [(1e-200, 1e-200), (2.0**1000, 2.0**-1000), (1e300, 1e300), (5e-324, 1.5)])
def test_two_product_is_not_finite_beyond_its_range(a: float, b: float) -> None:
    _, error = two_product(torch.tensor(a).double() * 1, torch.tensor([b]).double())
    assert bool(two_product(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))[1].isnan())
    assert error.shape == (1,)


@given(tensors((5,), torch.float32, ["moderate", "integers"]), st.sampled_from([2.0, 16 / 3, 0.7, 16 / 3**0.5]))
def test_split_product_is_exact_or_good_to_106_bits(factor: torch.Tensor, scaling: float) -> None:
    for other in (1.0, -0.3):
        parts, exact = split_product(factor, scaling, other)
        for index, value in enumerate(factor.tolist()):
            wanted = prod(map(Fraction, (value, scaling, other)))
            off = abs(sum((Fraction(part[index].item()) for part in parts), Fraction(0)) - wanted)
            assert off == 0 if exact else off <= abs(wanted) / 2**105


@pytest.mark.parametrize("exact_factors", [True, False])
@given(data=st.data())
def test_dot_lies_within_its_bound(exact_factors: bool, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from(DTYPES))
    addend = data.draw(tensors((3,), dtype)).double()
    left, right = (data.draw(tensors((3, rank), dtype)).double() for _ in range(2))
    if data.draw(st.booleans()) and rank:
        left[:, 0], right[:, 0] = -addend, 1.0
    value, error, bound = dot(addend, left, right, exact_factors)
    for row in range(3):
        if not finite(value[row], error[row], bound[row]):
            continue
        exact = Fraction(addend[row].item())
        exact += sum(Fraction(a) * Fraction(b) for a, b in zip(left[row].tolist(), right[row].tolist(), strict=True))
        near = Fraction(value[row].item()) + Fraction(error[row].item())
        assert abs(exact - near) <= Fraction(bound[row].item())
        assert float(near) == value[row].item()


@pytest.mark.parametrize("dtype", DTYPES)
@FEWER
@given(data=st.data())
def test_what_decide_settles_is_right(dtype: torch.dtype, data: st.DataObject) -> None:
    value = data.draw(tensors((4,), data.draw(st.sampled_from(DTYPES)))).double()
    if data.draw(st.booleans()) and dtype != torch.float64:
        narrow = data.draw(tensors((4,), dtype)).double()
        value = narrow + narrow.abs() * torch.finfo(dtype).eps / 2
    gap = (torch.nextafter(value, torch.tensor(torch.inf).double()) - value).abs()
    gap = torch.minimum(gap, (value - torch.nextafter(value, torch.tensor(-torch.inf).double())).abs())
    share = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, -0.5, 2.0**-40, -0.3]), min_size=4, max_size=4)))
    error = gap * share.double()
    error = torch.where(value + error == value, error, 0.0)
    scale = data.draw(st.sampled_from([0.0, 2.0**-1000, 2.0**-60, 2.0**-3, 1.0, 2.0**30]))
    bound = gap * scale
    result, still = decide(value, error, bound, dtype)
    for index in range(4):
        near = Fraction(value[index].item()) + Fraction(error[index].item())
        for side in (-1, 0, 1):
            exact = near + side * Fraction(bound[index].item())
            if not still[index] and exact != 0:
                assert bits(result[index : index + 1]) == [nearest(exact, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_that_may_be_none_is_left_open(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert bool(decide(zero, zero, zero + 1e-300, dtype)[1])
    assert not bool(decide(zero, zero, zero, dtype)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.7976931348623157e308])
def test_what_is_not_finite_is_left_open(dtype: torch.dtype, value: float) -> None:
    tensor, zero = torch.tensor([value], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    largest = value < torch.inf and dtype == torch.float64
    assert bool(decide(tensor, zero, zero, dtype)[1]) == (not largest)


@pytest.mark.parametrize("fields", [(1.0, 2.0**-53, 2.0**-200), (1.0, -(2.0**-54), 2.0**-200)])
def test_a_float64_tie_is_open_however_small_the_bound(fields: tuple[float, float, float]) -> None:
    value, error, bound = (torch.tensor([each], dtype=torch.float64) for each in fields)
    assert bool(decide(value, error, bound, torch.float64)[1])
