"""Methods that combine low-rank deltas through their singular vectors; their results have low rank again.

Each takes the deltas of one module, their weights and the density, and never builds a matrix of the deltas' size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramgr.algebra.composing.consensus import agreeing_mean
from loramgr.algebra.composing.sparsity import Matrix, by_magnitude
from loramgr.algebra.lowrank import Decomposition, Product, cosine, decomposed, shared, summed
from loramgr.errors import IncompatibleError, UsageError

__all__ = ["iso", "knots", "linear", "slerp", "tsv"]

_PARALLEL = 1e-7  # of the sine of an angle: below it, slerp is the straight line to the last bit but a few
_WHOLE = slice(0, None)


def linear(products: Sequence[Product], weights: Sequence[float], density: float) -> Product:
    """Return Σ wᵢ·Δᵢ, the factors side by side."""
    return summed([each.scaled(weight) for each, weight in zip(products, weights, strict=True)])


def slerp(products: Sequence[Product], weights: Sequence[float], density: float) -> Product:
    """Return (w₁ + w₂) times the point w₂ / (w₁ + w₂) of the way from Δ₁ to Δ₂ along the arc between them.

    With the angle Ω between the deltas as vectors, that is (sin((1−t)Ω)·Δ₁ + sin(tΩ)·Δ₂) / sin Ω (Shoemake 1985); the
    weighted sum where they are parallel or one is zero. Raises UsageError for more than two deltas or negative weights,
    and IncompatibleError for opposite ones, between which there are many arcs.
    """
    if len(products) > 2:
        raise UsageError(f"slerp is between two adapters, not {len(products)}", "--method linear")
    if min(weights) < 0:
        raise UsageError("slerp goes from one adapter to the other: its weights cannot be negative")
    total = sum(weights)
    if len(products) < 2 or total == 0:
        return linear(products, weights, density)
    first, second = shared(products).cores
    turn = cosine(float((first * second).sum()), float(first.norm()), float(second.norm()))
    if turn is None or first.shape[0] == 0:
        return linear(products, weights, density)
    sine = _sine(first / first.norm(), second / second.norm())
    if sine < _PARALLEL and turn < 0:
        raise IncompatibleError("the two deltas point in opposite directions, and no arc between them is the shortest")
    if sine < _PARALLEL:
        return linear(products, weights, density)
    angle = torch.atan2(torch.tensor(sine).double(), torch.tensor(turn).double())
    shares = [float(torch.sin(weight / total * angle)) / sine * total for weight in weights]
    return linear(products, shares, density)


def _sine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the sine of the angle between two unit vectors, which keeps its digits where the angle is small."""
    sum_, difference = float((first + second).norm()), float((first - second).norm())
    return sum_ * difference / 2


def knots(products: Sequence[Product], weights: Sequence[float], density: float) -> Product:
    """Return U Σ V with [Δ₁ … Δₙ] = U Σ [V₁ … Vₙ] and V the TIES merge of the Vᵢ (Stoica et al. 2024, 2410.19735)."""
    whole = summed(products)
    basis = torch.linalg.qr(whole.left)
    parts = [
        upper @ each.right for upper, each in zip(basis.R.split([p.rank for p in products], 1), products, strict=True)
    ]
    across = torch.linalg.qr(torch.cat(parts, 1).T)
    left, values, right = torch.linalg.svd(across.R.T, full_matrices=False)
    kept = values > _rounding(values, whole.shape[1] * len(products))
    vectors = (right[kept] @ across.Q.T).split(whole.shape[1], 1)
    trimmed = [_trimmed(each, density) for each in vectors]
    return Product(basis.Q @ left[:, kept] * values[kept], agreeing_mean(trimmed, weights))


def _trimmed(vectors: torch.Tensor, density: float) -> torch.Tensor:
    if not vectors.numel():
        return vectors
    shape = (vectors.shape[0], vectors.shape[1])
    return by_magnitude(Matrix(shape, lambda tile: vectors[tile], density, 0.0, ""))(_WHOLE)


def tsv(products: Sequence[Product], weights: Sequence[float], density: float) -> Product:
    """Return U⊥ Σ V⊥ of all tasks' singular triples, U⊥ and V⊥ the nearest orthonormal factors (Gargiulo et al. 2024).

    arXiv 2412.00081; the weights multiply the singular values. Of every task only so many triples count that all fit
    into the shorter side; directions that tasks share exactly are orthogonalised within what they span.
    """
    room = min(products[0].shape) // len(products)
    kept = [_leading(decomposed(each), room) for each in products]
    left = _orthonormal(torch.cat([each.left for each in kept], 1))
    right = _orthonormal(torch.cat([each.right for each in kept]).T).T
    values = torch.cat([each.values * weight for each, weight in zip(kept, weights, strict=True)])
    return Product(left * values, right)


def _leading(whole: Decomposition, count: int) -> Decomposition:
    """Return the singular triples that are not zero, at most so many of them but at least one."""
    rank = int((whole.values > _rounding(whole.values, max(whole.left.shape[0], whole.right.shape[1]))).sum())
    end = min(rank, max(1, count))
    return Decomposition(whole.left[:, :end], whole.values[:end], whole.right[:end])


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Return the polar factor: the nearest matrix with orthonormal columns, on the span of the given ones."""
    left, values, right = torch.linalg.svd(columns, full_matrices=False)
    kept = values > _rounding(values, columns.shape[0])
    polar: torch.Tensor = left[:, kept] @ right[kept]
    return polar


def iso(products: Sequence[Product], weights: Sequence[float], density: float) -> Product:
    """Return the weighted sum with every singular value replaced by their mean (Iso-C, Marczak et al. 2025).

    arXiv 2502.04959. The mean is over those that are not zero. One adapter alone has no other to be balanced with and
    stays as it is.
    """
    if len(products) < 2:
        return linear(products, weights, density)
    whole = linear(products, weights, density)
    parts = _leading(decomposed(whole), whole.rank)
    return Product(parts.left * parts.values.mean(), parts.right) if parts.values.numel() else whole


def _rounding(values: torch.Tensor, side: int) -> float:
    """Return the size below which a singular value is what rounding makes of zero."""
    return float(values.max()) * side * torch.finfo(torch.float64).eps if values.numel() else 0.0
