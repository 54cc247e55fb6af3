"""Exact values of single merged weights, for the few whose rounding float64 leaves open.

Every float is a dyadic rational, so sums and products are exact in `fractions.Fraction`; the one irrational number,
DoRA's norm, is enclosed between rationals that are refined until both ends round alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import isqrt

import torch

from loramgr.algebra.rounding import round_fraction
from loramgr.algebra.terms import DecomposedTerm, LowRankTerm, ReplacedTerm, Term

__all__ = ["Witness"]

_FIRST_BITS = 192
_LAST_BITS = 1 << 14


class Witness:
    """Knows one weight (m, n) and its terms, and rounds any merged entry exactly."""

    def __init__(self, weight: torch.Tensor, terms: Sequence[Term]) -> None:
        self._weight = weight
        self._terms = terms
        self._norm_squared = lru_cache(maxsize=4096)(self._exact_norm_squared)

    def round(self, row: int, column: int, dtype: torch.dtype) -> float:
        """Return the correctly rounded merged value of one entry."""
        bits = _FIRST_BITS
        while True:
            low, high = self._enclosure(row, column, bits)
            rounded = round_fraction(low, dtype)
            # An irrational sum never sits on a midpoint, so refinement ends; the limit guards against a defect here.
            if low == high == 0 and self._weight[row, column] == 0:
                return float(self._weight[row, column])  # nothing was added: a weight of -0 keeps its sign
            if low == high or rounded == round_fraction(high, dtype) or bits >= _LAST_BITS:
                return rounded
            bits *= 2

    def _enclosure(self, row: int, column: int, bits: int) -> tuple[Fraction, Fraction]:
        base = Fraction(self._weight[row, column].item())
        low = high = base
        for index, term in enumerate(self._terms):
            match term:
                case LowRankTerm():
                    value = Fraction(term.weight) * Fraction(term.scaling) * _dot(term, row, column)
                    low, high = low + value, high + value
                case ReplacedTerm():
                    value = Fraction(term.weight) * (Fraction(term.tensor[row, column].item()) - base)
                    low, high = low + value, high + value
                case DecomposedTerm():
                    ends = self._decomposed(index, row, column, bits)
                    low, high = low + min(ends), high + max(ends)
        return low, high

    def _decomposed(self, index: int, row: int, column: int, bits: int) -> tuple[Fraction, Fraction]:
        term = self._terms[index]
        assert isinstance(term, DecomposedTerm)
        base = Fraction(self._weight[row, column].item())
        scaled = Fraction(term.magnitude[row].item()) * self._direction(term, row, column)
        roots = _root(self._norm_squared(index, row), bits)
        weight = Fraction(term.weight)
        return weight * (scaled / roots[0] - base), weight * (scaled / roots[1] - base)

    def _direction(self, term: DecomposedTerm, row: int, column: int) -> Fraction:
        start = self._weight if term.start is None else term.start
        return Fraction(start[row, column].item()) + Fraction(term.scaling) * _dot(term, row, column)

    def _exact_norm_squared(self, index: int, row: int) -> Fraction:
        term = self._terms[index]
        assert isinstance(term, DecomposedTerm)
        columns = self._weight.shape[1]
        return sum((self._direction(term, row, column) ** 2 for column in range(columns)), Fraction(0))


def _dot(term: LowRankTerm | DecomposedTerm, row: int, column: int) -> Fraction:
    pairs = zip(term.left[row].tolist(), term.right[:, column].tolist(), strict=True)
    return sum((Fraction(left) * Fraction(right) for left, right in pairs), Fraction(0))


def _root(square: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Enclose a square root between two rationals whose relative distance is about 2^-bits; equal when it is exact."""
    shift = max(0, 2 * bits + square.denominator.bit_length() - square.numerator.bit_length())
    shift += shift % 2
    scaled, remainder = divmod(square.numerator << shift, square.denominator)
    root = isqrt(scaled)
    unit = Fraction(1, 1 << (shift // 2))
    exact = remainder == 0 and root * root == scaled
    return root * unit, (root if exact else root + 1) * unit
