"""Balls: the exact result of every operation lies inside."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from math import isfinite, isqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rationals import DTYPES, FEWER, tensors

from loramgr.algebra.balls import Ball, root_of_squares

OPERATIONS = [operator.add, operator.sub, operator.mul, operator.truediv]
BALLS = st.builds(
    Ball,
    st.sampled_from(DTYPES).flatmap(lambda dtype: tensors((4,), dtype)).map(torch.Tensor.double),
    tensors((1,), torch.float64).map(lambda radius: radius.abs() * 2.0**-40),
    st.sampled_from([0.0, 2.0**-50]),
)


def ends(ball: Ball, index: int) -> list[Fraction]:
    """Return the middle and both ends of a ball's entry."""
    value = Fraction(ball.value.flatten()[index].item())
    reach = Fraction(ball.radius.expand_as(ball.value).flatten()[index].item()) + Fraction(ball.relative) * abs(value)
    return [value, value - reach, value + reach]


def covers(ball: Ball, index: int, exact: Fraction) -> bool:
    value, error = ball.value.flatten()[index].item(), ball.error().expand_as(ball.value).flatten()[index].item()
    if not (isfinite(value) and isfinite(error)):
        return not isfinite(error) or not isfinite(value)
    return abs(Fraction(value) - exact) <= Fraction(error)


@pytest.mark.parametrize("operation", OPERATIONS)
@FEWER
@given(left=BALLS, right=BALLS)
def test_the_exact_result_lies_inside(operation: Callable[[object, object], object], left: Ball, right: Ball) -> None:
    result = operation(left, right)
    assert isinstance(result, Ball)
    for index in range(4):
        for a in ends(left, index):
            for b in ends(right, index):
                if operation is not operator.truediv or b:
                    exact = operation(a, b)
                    assert isinstance(exact, Fraction)
                    assert covers(result, index, exact)


def test_a_divisor_that_may_be_zero_gives_no_bound() -> None:
    one = Ball.exactly(torch.ones(3))
    divisor = Ball(torch.tensor([0.0, 1e-9, 1.0]).double(), torch.tensor([0.0, 1e-8, 1e-8]).double())
    assert (one / divisor).radius.isfinite().tolist() == [False, False, True]


@given(
    st.sampled_from(DTYPES).flatmap(lambda dtype: tensors((2, 70), dtype)).map(torch.Tensor.double),
    st.sampled_from([0.0, 2.0**-45]),
)
def test_the_norm_lies_inside(values: torch.Tensor, relative: float) -> None:
    ball = root_of_squares(Ball(values, torch.zeros(2, 1).double(), relative))
    for row in range(2):
        square = sum((Fraction(each) ** 2 for each in values[row].tolist()), Fraction(0))
        root = Fraction(isqrt(int(square * 2**5000)), 2**2500)
        for share in (1 - Fraction(relative), 1, 1 + Fraction(relative)):
            assert covers(ball, row, root * share)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300, float("inf"), float("nan")])
def test_a_norm_whose_squares_leave_float64_has_no_bound(scale: float) -> None:
    assert root_of_squares(Ball.exactly(torch.ones(1, 5).double() * scale)).radius.tolist() == [[float("inf")]]


def test_at_picks_single_entries() -> None:
    ball = Ball(torch.arange(6.0).view(2, 3), torch.tensor([[0.5], [0.25]]), 2.0**-50)
    picked = ball.at(torch.tensor([1, 0]), torch.tensor([2, 1]))
    assert (picked.value.tolist(), picked.radius.tolist(), picked.relative) == ([5.0, 1.0], [0.25, 0.5], 2.0**-50)
