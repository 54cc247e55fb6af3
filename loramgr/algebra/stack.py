"""All low-rank terms of a merge as one product, at the three precisions that the exact merge works in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramgr.algebra.balls import Ball
from loramgr.algebra.compensated import split_product
from loramgr.algebra.terms import LowRankTerm, Term

__all__ = ["Stack", "inner"]


class Stack:
    """Low-rank terms stacked into factors (m, R) and (R, n), with scaling and weight folded into the left one.

    `left`, `right` are float64, `left32`, `right32` their float32 copies; `radius32` (m, 1) bounds the error of the
    float32 product in every entry of a row.
    """

    def __init__(self, terms: Sequence[LowRankTerm], weight: torch.Tensor) -> None:
        rows, columns = weight.shape
        left = [weight.new_zeros((rows, 0), dtype=torch.float64)]
        right = [weight.new_zeros((0, columns), dtype=torch.float64)]
        left += [term.left.double() * (term.scaling * term.weight) for term in terms]
        right += [term.right.double() for term in terms]
        self.left, self.right = torch.cat(left, dim=1), torch.cat(right)
        self.left32, self.right32 = self.left.float(), self.right.float()
        self.radius32 = self._bound_single()
        self._terms = terms
        self._parts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._exact_factors = True

    @classmethod
    def of(cls, terms: Sequence[Term], weight: torch.Tensor) -> Stack:
        """Stack the low-rank ones among the terms."""
        return cls([term for term in terms if isinstance(term, LowRankTerm)], weight)

    def _bound_single(self) -> torch.Tensor:
        if not self.right.numel():
            return self.left.new_zeros((self.left.shape[0], 1), dtype=torch.float32)
        # γ(R + 4) of float32: R + 1 for the product, the rest for the rounding of both factors and the coefficient
        terms = (self.left.shape[1] + 4) * 2.0**-24
        largest = self.right.norm(dim=0).amax()
        radius: torch.Tensor = self.left.norm(dim=1, keepdim=True) * (largest * (terms / (1 - terms) * 1.001))
        return radius.float()

    def gather(self, rows: slice, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors (k, R') whose row-wise products are the entries (row, column) of the given rows.

        Other than `left`, they hold the coefficients unrounded (as far as `exact_factors` says).
        """
        left, right = self._exact_parts()
        return left[rows][row], right[column]

    @property
    def exact_factors(self) -> bool:
        """Whether the gathered factors are exact, and not only good to 2^-106."""
        self._exact_parts()
        return self._exact_factors

    def _exact_parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._parts is None:
            lefts, rights = [self.left[:, :0]], [self.right[:0]]
            for term in self._terms:
                parts, exact = split_product(term.left, term.scaling, term.weight)
                self._exact_factors &= exact
                lefts += parts
                rights += [term.right.double()] * len(parts)
            self._parts = torch.cat(lefts, dim=1), torch.cat(rights).T.contiguous()
        return self._parts


def inner(left: torch.Tensor, right: torch.Tensor) -> Ball:
    """Return the inner products of the rows of two (k, R) float64 tensors as a (k,) ball.

    The rows of `left` have been rounded twice already.
    """
    terms = (left.shape[1] + 3) * 2.0**-53
    products = left * right
    return Ball(products.sum(dim=1), products.abs().sum(dim=1) * (terms * 1.001))
