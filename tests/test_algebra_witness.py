"""The witness: single entries in rational arithmetic, square roots included."""

from __future__ import annotations

from fractions import Fraction
from math import isnan

import pytest
import torch
from rationals import DTYPES, bits, entry

from loramgr.algebra.terms import DecomposedTerm, LowRankTerm, ReplacedTerm, Term
from loramgr.algebra.witness import Witness

GENERATOR = torch.Generator().manual_seed(11)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def decomposed(weight: float, start: torch.Tensor | None = None) -> DecomposedTerm:
    return DecomposedTerm(normal(3, 2), normal(2, 4), 16 / 3, normal(3), weight, start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_term(dtype: torch.dtype) -> None:
    weight = normal(3, 4)
    low = LowRankTerm(normal(3, 2), normal(2, 4), 16 / 3, 0.7)
    mixtures: list[list[Term]] = [
        [],
        [low],
        [ReplacedTerm(normal(3, 4), -0.3), low],
        [decomposed(1.0)],
        [low, decomposed(0.7), decomposed(-0.3, normal(3, 4)), ReplacedTerm(normal(3, 4).half(), 0.5)],
    ]
    for terms in mixtures:
        witness = Witness(weight, terms)
        for row, column in ((0, 0), (1, 3), (2, 1)):
            rounded = torch.tensor([witness.round(row, column, dtype)], dtype=torch.float64).to(dtype)
            assert bits(rounded) == [entry(weight, terms, dtype, row, column)]


def directed(row: list[float], magnitude: float, weight: float) -> DecomposedTerm:
    start = torch.tensor([row], dtype=torch.float64)
    return DecomposedTerm(torch.zeros(1, 1), torch.zeros(1, 2), 1.0, torch.tensor([magnitude]).double(), weight, start)


@pytest.mark.parametrize(
    ("terms", "added"),
    [
        # A norm of 5 is rational; so is a sum of multiples of √2 that cancel, here 1/√2 + 1/(3√2) - 4/(3√2).
        ([directed([3.0, 4.0], 5.0, 1.0)], Fraction(3)),
        (
            [directed([1.0, 1.0], 3.0, 1.0), directed([3.0, 3.0], 1.0, 1.0), directed([0.5, 0.5], 4.0, -1.0)],
            Fraction(0),
        ),
        ([directed([1.0, 1.0], 1.0, 0.5), directed([1.0, 7.0], 5.0, -0.5)], Fraction(0)),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_rational_sum_of_roots_is_a_tie_where_it_is_one(
    terms: list[DecomposedTerm], added: Fraction, sign: int
) -> None:
    own = sum(Fraction(term.weight) for term in terms)
    tie = Fraction(4097, 4096) * sign
    # W·(1 - Σw) + added is a float32 number and halfway between two of bfloat16 or float16 when W is chosen so.
    weight = torch.tensor([[float(tie), 0.0]], dtype=torch.float64)
    witness = Witness(weight, terms)
    expected = Fraction(float(tie)) * (1 - own) + (3 if added else 0)
    assert witness.round(0, 0, torch.float64) == float(expected)


def test_cancelling_roots_leave_a_zero_its_sign() -> None:
    terms = [directed([1.0, 1.0], 1.0, 0.25), directed([1.0, 1.0], 1.0, -0.25)]
    for zero in (0.0, -0.0):
        witness = Witness(torch.tensor([[zero, 1 + 2.0**-24]], dtype=torch.float64), terms)
        assert str(witness.round(0, 0, torch.float32)) == str(zero)
        assert witness.round(0, 1, torch.float32) == 1.0


def test_a_norm_of_zero_gives_nan() -> None:
    assert isnan(Witness(torch.ones(1, 2), [directed([0.0, 0.0], 1.0, 1.0)]).round(0, 0, torch.float32))
