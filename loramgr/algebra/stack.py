"""All low-rank terms of a merge as one product, at the two precisions that the exact merge works in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from loramgr.algebra.balls import SLACK, Ball, U
from loramgr.algebra.compensated import split_product
from loramgr.algebra.terms import LowRankTerm, Term

__all__ = ["SingleStack", "Stack"]

_FLOOR = 2.0**-500
_LARGE = 2.0**500
_U32 = 2.0**-24  # unit roundoff of float32
_SLACK32 = 1.0 + 2.0**-16
_FLOOR32 = 2.0**-115
_WITHIN = 2.0**8


@dataclass(frozen=True, slots=True)
class SingleStack:
    """A stack in float32: what bounds W + left @ right computed in it is rows · columns + relative · |value| + floor.

    `rows` (m,) and `columns` (n,) are float32. The bound covers that the ends value ± bound are computed in it too.
    """

    left: torch.Tensor
    right: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    relative: float
    floor: float


class Stack:
    """Low-rank terms stacked into float64 factors (m, R) and (R, n), scaling and weight folded into the left one."""

    def __init__(self, terms: Sequence[LowRankTerm], weight: torch.Tensor) -> None:
        rows, columns = weight.shape
        empty = weight.new_zeros((rows, 0), dtype=torch.float64)
        bare = torch.cat([empty, *(term.left.double() for term in terms)], dim=1)
        self._left = torch.cat([empty, *(term.left.double() * (term.scaling * term.weight) for term in terms)], dim=1)
        self._right = torch.cat([empty.new_zeros((0, columns)), *(term.right.double() for term in terms)])
        self._terms = terms
        self._moved = (bare != 0).any(dim=1), (self._right != 0).any(dim=0)
        roundings = (bare.shape[1] + 3) * U
        self._relative = roundings / (1 - 2 * roundings) if terms else 0.0
        self._radius = self._bound(bare) if bare.shape[1] else empty.new_zeros((rows, 1))
        self._parts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._exact_factors = True
        self._columns: torch.Tensor | None = None

    @classmethod
    def of(cls, terms: Sequence[Term], weight: torch.Tensor) -> Stack:
        """Stack the low-rank ones among the terms."""
        return cls([term for term in terms if isinstance(term, LowRankTerm)], weight)

    def _bound(self, bare: torch.Tensor) -> torch.Tensor:
        """Return the (m, 1) radius of `added`, derived there.

        Two floors of 2^-500 cover what is lost among subnormals: 2^-1075 for each product, for each entry of the left
        factor (times the right one), and for the coefficient (times the left one, so that is refused beyond 2^500).
        Columns that are not finite show in the value.
        """
        largest = self._right.abs().amax(dim=0)
        largest = torch.where(largest.isfinite(), largest, 0.0).amax()
        size = self._left.abs().sum(dim=1, keepdim=True) * (2 * self._relative) + _FLOOR
        radius = size * (largest + _FLOOR) * SLACK
        return torch.where(bare.abs().sum(dim=1, keepdim=True) < _LARGE, radius, torch.inf)

    @property
    def rank(self) -> int:
        """The sum of the terms' ranks."""
        return self._left.shape[1]

    def added(self, start: torch.Tensor, rows: slice) -> Ball:
        """Return start + left @ right for the given rows; the float64 tensor `start` is overwritten.

        Any order of the k = R + 3 roundings that an addend goes through (two in the left factor) gives an error
        e ≤ γ(k)·(|start| + S) with S = Σ|l·r| (Higham, Accuracy and Stability, §3.5). |start| ≤ |value| + e + S, so
        e ≤ γ/(1 - γ)·(|value| + 2·S), and S is at most the sum of a row of |left| times the largest |right|.
        """
        self.add_to(start, rows)
        return Ball(start, *self.bound(rows))

    def add_to(self, start: torch.Tensor, rows: slice) -> None:
        """Add left @ right for the given rows to a float64 tensor."""
        if self._left.shape[1]:
            start.addmm_(self._left[rows], self._right)

    def bound(self, rows: slice) -> tuple[torch.Tensor, float]:
        """Return what bounds the error of `added` for the given rows: radius (rows, 1), and relative to the value."""
        return self._radius[rows], self._relative

    def entries(self, start: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> Ball:
        """Return start + left @ right for the entries (row, column); all (k,), the bound is that of `added`."""
        if self._columns is None:
            self._columns = self._right.T.contiguous()
        value = start + (self._left[row] * self._columns[column]).sum(dim=1)
        return Ball(value, self._radius[row, 0], self._relative)

    def single(self) -> SingleStack:
        """Return the stack in float32.

        The bound is that of `added` with k = R + 4 roundings of 2^-24: two to bring the factors to float32, the
        product's, R of the sum, and those of float64 in the left factor, together less than one. S is at most the norm
        of the row of left times that of the column of right (Cauchy, Schwarz). Computing the bound and the ends takes
        at most eight more roundings of |value|, and a few of the bound, which the slack covers. What is lost below
        2^-126, all of it in a GPU that flushes subnormals, is for factors below 2^8 less than 2^-118 in each factor and
        2^-126 in each operation: 2^-115 · (R + 4) is more. Rows and columns beyond 2^8 get an infinite bound.
        """
        rank = self._left.shape[1]
        roundings = (rank + 4) * _U32
        relative = roundings / (1 - 2 * roundings) if roundings < 0.25 else inf
        rows = self._left.norm(dim=1) * (2 * relative * _SLACK32)
        columns = self._right.norm(dim=0)
        within = self._left.abs().amax(dim=1) < _WITHIN
        return SingleStack(
            self._left.float(),
            self._right.float().contiguous(),
            torch.where(within, rows, inf).float(),
            torch.where(columns < _WITHIN, columns, inf).float(),
            relative * _SLACK32 + 8 * _U32,
            _FLOOR32 * (rank + 4),
        )

    def untouched(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return where nothing is added for certain, because a row or column of the factors is zero; all (k,)."""
        rows, columns = self._moved
        return ~(rows[row] & columns[column])

    def gather(self, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors (k, R') whose row-wise products are the entries (row, column).

        They hold the coefficients unrounded (as far as `exact_factors` says).
        """
        left, right = self._exact_parts()
        return left[row], right[column]

    @property
    def exact_factors(self) -> bool:
        """Whether the gathered factors are exact, and not only good to 2^-106."""
        self._exact_parts()
        return self._exact_factors

    def _exact_parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._parts is None:
            lefts, rights = [self._left[:, :0]], [self._right[:0]]
            for term in self._terms:
                parts, exact = split_product(term.left, term.scaling, term.weight)
                self._exact_factors &= exact
                lefts += parts
                rights += [term.right.double()] * len(parts)
            self._parts = torch.cat(lefts, dim=1), torch.cat(rights).T.contiguous()
        return self._parts
