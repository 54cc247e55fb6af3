"""Stacked low-rank terms: the product within its bound, and factors that keep every bit."""

from __future__ import annotations

from fractions import Fraction
from math import isfinite, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rationals import DTYPES, tensors

from loramgr.algebra.stack import Stack
from loramgr.algebra.terms import LowRankTerm, ReplacedTerm

TERMS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.integers(0, 3).flatmap(
        lambda rank: st.builds(
            LowRankTerm,
            tensors((2, rank), dtype),
            tensors((rank, 3), dtype),
            st.sampled_from([2.0, 16 / 3, 16 / sqrt(3), 1e-310]),
            st.sampled_from([1.0, 0.7, -0.3]),
        )
    )
)


def exact(term: LowRankTerm, row: int, column: int) -> Fraction:
    pairs = zip(term.left[row].tolist(), term.right[:, column].tolist(), strict=True)
    total = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
    return Fraction(term.scaling) * Fraction(term.weight) * total


@given(tensors((2, 3), torch.float64), st.lists(TERMS, max_size=3))
def test_the_sum_lies_within_its_bound(start: torch.Tensor, terms: list[LowRankTerm]) -> None:
    stack = Stack.of([*terms, ReplacedTerm(start)], start)
    ball = stack.added(start.clone(), slice(0, 2))
    errors = ball.error().expand(2, 3)
    for row in range(2):
        for column in range(3):
            value, error = ball.value[row, column].item(), errors[row, column].item()
            if isfinite(value) and isfinite(error):
                wanted = Fraction(start[row, column].item()) + sum(exact(term, row, column) for term in terms)
                assert abs(Fraction(value) - wanted) <= Fraction(error)


@given(st.lists(TERMS, max_size=3))
def test_gathered_factors_keep_every_bit(terms: list[LowRankTerm]) -> None:
    stack = Stack(terms, torch.zeros(2, 3))
    left, right = stack.gather(torch.tensor([1]), torch.tensor([2]))
    if not (bool(left.isfinite().all()) and bool(right.isfinite().all())):
        return
    products = [Fraction(a) * Fraction(b) for a, b in zip(left[0].tolist(), right[0].tolist(), strict=True)]
    off = abs(sum(products, Fraction(0)) - sum(exact(term, 1, 2) for term in terms))
    assert off <= (0 if stack.exact_factors else sum(map(abs, products)) / 2**104)


@pytest.mark.parametrize(
    ("scaling", "weight", "expected"), [(2.0, 0.7, True), (16 / 3, 0.7, False), (16 / 3, 1.0, True)]
)
def test_factors_are_exact_when_the_coefficient_is(scaling: float, weight: float, expected: bool) -> None:
    stack = Stack([LowRankTerm(torch.ones(1, 1), torch.ones(1, 1), scaling, weight)], torch.zeros(1, 1))
    assert stack.exact_factors is expected


def test_only_zero_rows_and_columns_are_untouched() -> None:
    left = torch.tensor([[0.0, 0.0], [1e-300, 0.0]], dtype=torch.float64)
    right = torch.tensor([[0.0, 1e-300], [0.0, 1.0]], dtype=torch.float64)
    stack = Stack([LowRankTerm(left, right, 1e-300)], torch.zeros(2, 2))
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).T
    assert stack.untouched(*places).tolist() == [True, True, True, False]
