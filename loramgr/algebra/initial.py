"""What PiSSA and OLoRA take out of a weight before the training, from the weight alone and in float64.

PiSSA (arXiv 2404.02948) takes the best approximation of rank r, OLoRA (arXiv 2406.01775) the projection onto the first
r columns. PEFT computes both in float32, so that its result is that of W + E with ‖E‖ of some 2⁻²⁴ ‖W‖; the error
says how far that E can move them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["LARGEST_ERROR", "Started", "principal", "projected"]

LARGEST_ERROR = 2.0**-10  # of the weight's spectral norm; a rounding to bfloat16 moves every value by up to 2⁻⁹ of it
_UNIT = 2.0**-24


@dataclass(frozen=True, slots=True)
class Started:
    """The product left @ right that began in a weight, left (out, r) and right (r, in), both float64.

    `error` bounds, to first order, the spectral norm of what the same in float32 differs by, relative to the weight's;
    infinite where float32 does not determine the product.
    """

    left: torch.Tensor
    right: torch.Tensor
    error: float


def principal(weight: torch.Tensor, rank: int) -> Started:
    """Return the best approximation of the rank of a float64 matrix (out, in), its singular values halved.

    With σ the singular values and δ = σᵣ - σᵣ₊₁ an error E turns the singular subspaces by at most 2 ‖E‖ / δ as long
    as 4 ‖E‖ ≤ δ (Wedin 1972), and moves the product by at most 2 ‖E‖ σᵣ / δ. Where the rest is tiny both products are
    near W, and the distance is at most 2 σᵣ₊₁ + 2 ‖E‖ whatever δ is.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    largest = float(values[0])
    if largest == 0:
        return Started(left[:, :rank] * 0, right[:rank] * 0, 0.0)
    noise = _noise(weight) * largest
    last = float(values[rank - 1])
    following = float(values[rank]) if rank < len(values) else 0.0
    gap = last - following
    bound = 2 * noise * last / gap if gap >= 4 * noise else math.inf
    roots = values[:rank].sqrt()
    error = min(bound, 2 * following + 2 * noise) / largest
    return Started(left[:, :rank] * roots, right[:rank] * roots[:, None], error)


def projected(weight: torch.Tensor, rank: int) -> Started:
    """Return the projection of a float64 matrix (out, in) onto the space of its first columns.

    An error E turns that space by at most ‖E‖ / σ, σ the smallest singular value of these columns, and moves the
    product by at most ‖E‖ (1 + ‖W‖ / σ).
    """
    first = weight[:, :rank]
    largest = float(torch.linalg.matrix_norm(weight, 2))
    if largest == 0:
        return Started(torch.zeros_like(first), torch.zeros_like(weight[:rank]), 0.0)
    smallest = float(torch.linalg.svdvals(first)[-1])
    noise = _noise(weight)
    error = noise * (1 + largest / smallest) if smallest >= 4 * noise * largest else math.inf
    left = torch.linalg.qr(first).Q
    return Started(left, left.T @ weight, error)


def _noise(weight: torch.Tensor) -> float:
    """Return the relative backward error of a decomposition in float32: a unit times the root of the size."""
    return _UNIT * math.sqrt(max(weight.shape))
