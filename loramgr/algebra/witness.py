"""Exact values of single merged weights, for the few whose rounding float64 leaves open.

Every float is a dyadic rational, so sums and products are exact in `fractions.Fraction`. DoRA's norms are square roots
of rationals: those that are rational multiples of each other are collected into one, which makes the sum of what is
left irrational (roots of different square classes are linearly independent over the rationals; Besicovitch 1940). An
irrational number is no midpoint, so enclosing it ever more closely ends with two bounds that round alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isqrt, nan

import torch

from loramgr.algebra.rounding import round_fraction
from loramgr.algebra.terms import AddedTerm, DecomposedTerm, LowRankTerm, ReplacedTerm, Term

__all__ = ["Witness"]

_FIRST_BITS = 192


class Witness:
    """Knows one weight (m, n) and its terms, and rounds any merged entry exactly; what it reads must be finite."""

    def __init__(self, weight: torch.Tensor, terms: Sequence[Term]) -> None:
        self._weight = weight
        self._terms = terms
        self._norms: dict[tuple[int, int], Fraction] = {}

    def round(self, row: int, column: int, dtype: torch.dtype) -> float:
        """Return the correctly rounded merged value of one entry; NaN where a row's norm is zero."""
        norms = [self._norm_squared(index, row) for index in self._decomposed()]
        if 0 in norms:
            return nan
        rational, roots = self._exact(row, column)
        if not roots:
            if rational == self._weight[row, column].item() == 0:
                return float(self._weight[row, column])  # nothing was added: a weight of -0 keeps its sign
            return round_fraction(rational, dtype)
        bits = _FIRST_BITS
        while (low := round_fraction(rational + _enclosed(roots, bits, upper=False), dtype)) != round_fraction(
            rational + _enclosed(roots, bits, upper=True), dtype
        ):
            bits *= 2
        return low

    def _decomposed(self) -> list[int]:
        return [index for index, term in enumerate(self._terms) if isinstance(term, DecomposedTerm)]

    def _exact(self, row: int, column: int) -> tuple[Fraction, dict[Fraction, Fraction]]:
        """Return the entry as a rational and the coefficients c of an irrational Σ c/√s by s."""
        base = Fraction(self._weight[row, column].item())
        rational, roots = base, dict[Fraction, Fraction]()
        for index, term in enumerate(self._terms):
            weight = Fraction(term.weight)
            match term:
                case LowRankTerm():
                    rational += weight * Fraction(term.scaling) * _dot(term, row, column)
                case ReplacedTerm():
                    rational += weight * (Fraction(term.tensor[row, column].item()) - base)
                case AddedTerm():
                    rational += weight * Fraction(term.tensor[row, column].item())
                case DecomposedTerm():
                    rational -= weight * base
                    scaled = weight * Fraction(term.magnitude[row].item()) * self._direction(term, row, column)
                    _collect(roots, self._norm_squared(index, row), scaled)
        rational += roots.pop(Fraction(1), Fraction(0))
        return rational, {square: coefficient for square, coefficient in roots.items() if coefficient}

    def _direction(self, term: DecomposedTerm, row: int, column: int) -> Fraction:
        start = self._weight if term.start is None else term.start
        return Fraction(start[row, column].item()) + Fraction(term.scaling) * _dot(term, row, column)

    def _norm_squared(self, index: int, row: int) -> Fraction:
        """Return what `_exact_norm_squared` does, computed once: the entries of a row share it."""
        if (index, row) not in self._norms:
            self._norms[index, row] = self._exact_norm_squared(index, row)
        return self._norms[index, row]

    def _exact_norm_squared(self, index: int, row: int) -> Fraction:
        term = self._terms[index]
        assert isinstance(term, DecomposedTerm)
        columns = self._weight.shape[1]
        return sum((self._direction(term, row, column) ** 2 for column in range(columns)), Fraction(0))


def _dot(term: LowRankTerm | DecomposedTerm, row: int, column: int) -> Fraction:
    pairs = zip(term.left[row].tolist(), term.right[:, column].tolist(), strict=True)
    return sum((Fraction(left) * Fraction(right) for left, right in pairs), Fraction(0))


def _collect(roots: dict[Fraction, Fraction], square: Fraction, coefficient: Fraction) -> None:
    """Add coefficient/√square to the sum, under 1 or under a square s of the sum when √(square·s) is rational."""
    for other in (Fraction(1), *roots):
        joint = _rational_root(square * other)
        if joint is not None:
            roots[other] = roots.get(other, Fraction(0)) + coefficient * joint / square
            return
    roots[square] = coefficient


def _rational_root(square: Fraction) -> Fraction | None:
    root = Fraction(isqrt(square.numerator), isqrt(square.denominator))
    return root if root * root == square else None


def _enclosed(roots: dict[Fraction, Fraction], bits: int, *, upper: bool) -> Fraction:
    """Return a bound of Σ c/√s, each addend to a relative 2^-bits."""
    total = Fraction(0)
    for square, coefficient in roots.items():
        low, high = _root(square, bits)
        total += coefficient / (low if (coefficient > 0) == upper else high)
    return total


def _root(square: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Enclose a positive square root between two positive rationals whose relative distance is about 2^-bits."""
    shift = max(0, 2 * bits + square.denominator.bit_length() - square.numerator.bit_length())
    shift += shift % 2
    root = isqrt((square.numerator << shift) // square.denominator)
    unit = Fraction(1, 1 << (shift // 2))
    return root * unit, (root + 1) * unit
