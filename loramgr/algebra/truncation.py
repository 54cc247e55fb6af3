"""The best factors of lower rank of a product, in the dtype they are kept in, with the error that they have there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramgr.algebra.casting import rounded
from loramgr.algebra.lowrank import Decomposition, Product, decomposed, shared
from loramgr.algebra.spectrum import binary_scale, frobenius_norm

__all__ = ["Truncation", "rank_of_energy", "truncated"]


@dataclass(frozen=True, slots=True)
class Truncation:
    """left (m, r) and right (r, n) as they are kept, on the CPU; `norm` of the product, `error` of the difference."""

    left: torch.Tensor
    right: torch.Tensor
    norm: float
    error: float


def rank_of_energy(values: torch.Tensor, energy: float) -> int:
    """Return how many of the singular values, largest first, keep that share of the sum of their squares.

    At least 1; with all of the energy those that are more than the rounding of the first one.
    """
    if energy == 1:
        rounding = len(values) * torch.finfo(torch.float64).eps
        return max(1, int((values > values[:1] * rounding).sum()))
    scaled = values / binary_scale(values)  # squares stay in the range of float64
    left = scaled.square().flip(0).cumsum(0).flip(0)  # what is lost when the first 0, 1, … values are kept
    return max(1, int((left > (1 - energy) * left[:1]).sum()))


def truncated(product: Product, rank: int, dtype: torch.dtype, known: Decomposition | None = None) -> Truncation:
    """Return the product at that rank or below: the optimal truncation (Eckart & Young 1936), rounded to the dtype.

    `known` is the product's decomposition where it is there already. The error counts the rounding, too.
    """
    known = decomposed(product) if known is None else known
    lower = known.truncated(rank)
    left, right = rounded(lower.left, dtype), rounded(lower.right, dtype)
    cores = shared([product, Product.of(left, right)]).cores
    return Truncation(
        left.cpu().contiguous(),
        right.cpu().contiguous(),
        frobenius_norm(known.values),
        frobenius_norm(cores[0] - cores[1]),
    )
