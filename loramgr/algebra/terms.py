"""What adapters add to one weight: E(W) = apply(W) - W, in W's own (rows, columns) layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["AddedTerm", "DecomposedTerm", "LowRankTerm", "ReplacedTerm", "Term", "transposed"]


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """weight · scaling · left @ right, with left (m, r) and right (r, n) in any float dtype."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class DecomposedTerm:
    """weight · (magnitude · V / ‖V‖ - W) with V = start + scaling · left @ right and one norm per row.

    DoRA (Liu et al. 2024, arXiv 2402.09353). `magnitude` is (m,); `start` is W, or the table that takes its place,
    (m, n), None for W. Where the norm runs over columns, give everything `transposed`.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    magnitude: torch.Tensor
    weight: float = 1.0
    start: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ReplacedTerm:
    """weight · (tensor - W), with the tensor (m, n) in any float dtype."""

    tensor: torch.Tensor
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class AddedTerm:
    """weight · tensor, with the tensor (m, n) in any float dtype."""

    tensor: torch.Tensor
    weight: float = 1.0


Term = LowRankTerm | DecomposedTerm | ReplacedTerm | AddedTerm


def transposed(term: Term) -> Term:
    """Return the term that adds to Wᵀ what the term adds to W; DecomposedTerm is given in its transposed layout."""
    match term:
        case LowRankTerm():
            return replace(term, left=term.right.T, right=term.left.T)
        case ReplacedTerm() | AddedTerm():
            return replace(term, tensor=term.tensor.T)
        case DecomposedTerm():
            return term
