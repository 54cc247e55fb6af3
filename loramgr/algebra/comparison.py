"""How far two deltas are from each other, from their factors alone: distances, ranks, and the spaces they act in.

Both are written in one pair of orthonormal bases by a QR of the joint factors, and everything is told from the small
cores there. In float64 and without Gram matrices, so that the difference of two deltas that nearly cancel keeps its
digits. The figures of (b, a) are those of (a, b), bit for bit, with the sides exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loramgr.algebra.lowrank import Product, cosine
from loramgr.algebra.spectrum import frobenius_norm
from loramgr.errors import IncompatibleError

__all__ = ["Comparison", "Distances", "Spaces", "Tally", "compared", "numerical_rank", "relative"]


@dataclass(frozen=True, slots=True)
class Distances:
    """Frobenius norms of a, b and a − b, and the cosine of the angle between a and b as vectors, None where one is 0.

    A distance of exactly 0 has the cosine 1.
    """

    norm_a: float
    norm_b: float
    distance: float
    cosine: float | None

    @property
    def relative_distance(self) -> float | None:
        """The distance over the norm of a; see `relative`."""
        return relative(self.distance, self.norm_a)

    def mirrored(self) -> Distances:
        """Return the figures of (b, a)."""
        return Distances(self.norm_b, self.norm_a, self.distance, self.cosine)


@dataclass(frozen=True, slots=True)
class Spaces:
    """How far two deltas act in the same space: that of their outputs (left singular vectors) or inputs (right ones).

    `similarities` is (i, j), φ(i, j) = ‖U_iᵀ V_j‖²_F / min(i, j) of the first i vectors of the one and the first j of
    the other: the paper's normalised subspace similarity (Hu et al. 2021, arXiv 2106.09685, §7.2 and appendix G),
    taken of the deltas, since the singular vectors of lora_A alone depend on how a delta is split into its factors.
    `angles` are the principal angles of the whole spaces in radians, smallest first, as many as the smaller one has
    dimensions.
    """

    similarities: torch.Tensor
    angles: torch.Tensor

    @classmethod
    def of(cls, first: torch.Tensor, second: torch.Tensor) -> Spaces:
        """Compare orthonormal bases (p, i) and (p, j), the most important vectors first."""
        overlap = first.T @ second
        counts = [torch.arange(1, size + 1, dtype=overlap.dtype, device=overlap.device) for size in overlap.shape]
        fewest = torch.minimum(counts[0][:, None], counts[1])
        similarities = (overlap.square().cumsum(0).cumsum(1) / fewest).clamp(max=1.0)
        return cls(similarities, _angles(first, second, overlap))

    @property
    def similarity(self) -> float | None:
        """Return φ of the whole spaces: 0 where orthogonal, 1 where one holds the other, None where one is empty."""
        return float(self.similarities[-1, -1]) if self.similarities.numel() else None

    def mirrored(self) -> Spaces:
        """Return the spaces the other way round."""
        return Spaces(self.similarities.T, self.angles)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two deltas beside each other: their distances, singular values with the largest first, and spaces.

    The values of a, b and a − b are as many as the bases allow; those beyond the numerical rank are rounding.
    """

    distances: Distances
    values_a: torch.Tensor
    values_b: torch.Tensor
    values_difference: torch.Tensor
    rank_a: int
    rank_b: int
    inputs: Spaces
    outputs: Spaces

    def mirrored(self) -> Comparison:
        """Return the comparison of (b, a)."""
        return Comparison(
            self.distances.mirrored(),
            self.values_b,
            self.values_a,
            self.values_difference,
            self.rank_b,
            self.rank_a,
            self.inputs.mirrored(),
            self.outputs.mirrored(),
        )


def relative(distance: float, norm: float) -> float | None:
    """Return a distance relative to the norm of what it is measured from.

    0 for no distance; None from zero, and from a norm so small that the quotient exceeds float64.
    """
    if distance == 0:
        return 0.0
    quotient = distance / norm if norm else math.inf
    return quotient if math.isfinite(quotient) else None


def numerical_rank(values: torch.Tensor, shape: tuple[int, int]) -> int:
    """Return how many singular values, the largest first, stand out of the rounding of float64.

    These are those above max(m, n) · 2⁻⁵² times the largest, for a matrix of shape (m, n).
    """
    if not len(values):
        return 0
    return int((values > values[0] * max(shape) * torch.finfo(torch.float64).eps).sum())


def compared(a: Product, b: Product) -> Comparison:
    """Compare two deltas in O((m + n)·r²), r the sum of their ranks.

    Raises IncompatibleError for different shapes, and where the figures exceed float64.
    """
    if a.shape != b.shape:
        raise IncompatibleError(f"deltas of shapes {a.shape} and {b.shape} cannot be compared")
    return _compared(b, a).mirrored() if _comes_later(a, b) else _compared(a, b)


def _compared(a: Product, b: Product) -> Comparison:
    cores = _cores(a, b)
    if not all(bool(core.isfinite().all()) for core in cores):
        raise IncompatibleError("the deltas exceed the range of float64")
    of_a, of_b, difference = cores
    left_a, values_a, right_a = torch.linalg.svd(of_a, full_matrices=False)
    left_b, values_b, right_b = torch.linalg.svd(of_b, full_matrices=False)
    rank_a, rank_b = numerical_rank(values_a, a.shape), numerical_rank(values_b, b.shape)
    distances = _distances(of_a, of_b, difference)
    return Comparison(
        distances,
        values_a[: a.rank],
        values_b[: b.rank],
        torch.linalg.svdvals(difference),
        rank_a,
        rank_b,
        _spaces(right_a[:rank_a].T, right_b[:rank_b].T, distances),
        _spaces(left_a[:, :rank_a], left_b[:, :rank_b], distances),
    )


def _spaces(first: torch.Tensor, second: torch.Tensor, distances: Distances) -> Spaces:
    """Compare two bases; those of equal deltas exactly, without the rounding of the vectors."""
    if distances.distance:
        return Spaces.of(first, second)
    ranks = first.shape[1], second.shape[1]
    return Spaces(first.new_ones(ranks), first.new_zeros(min(ranks)))


class Tally:
    """Adds up the distances of two matrices, or of many, from their pieces; the order of the pieces is part of it."""

    def __init__(self) -> None:
        self._norm_a = self._norm_b = self._distance = self._product = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor, difference: torch.Tensor) -> None:
        """Take a piece of a, of b and of a − b, float64 of one shape."""
        self._include(frobenius_norm(a), frobenius_norm(b), frobenius_norm(difference), _inner(a, b))

    def include(self, part: Distances) -> None:
        """Take the figures of another part of a and b as a whole."""
        product = 0.0 if part.cosine is None else part.cosine * part.norm_a * part.norm_b
        self._include(part.norm_a, part.norm_b, part.distance, product)

    def _include(self, norm_a: float, norm_b: float, distance: float, product: float) -> None:
        self._norm_a, self._norm_b = math.hypot(self._norm_a, norm_a), math.hypot(self._norm_b, norm_b)
        self._distance = math.hypot(self._distance, distance)
        self._product += product

    def distances(self) -> Distances:
        """Return the figures of everything so far."""
        norm_a, norm_b = self._norm_a, self._norm_b
        return Distances(norm_a, norm_b, self._distance, _cosine(self._product, norm_a, norm_b, self._distance))


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def _cosine(product: float, norm_a: float, norm_b: float, distance: float) -> float | None:
    return 1.0 if distance == 0 and norm_a else cosine(product, norm_a, norm_b)


def _distances(a: torch.Tensor, b: torch.Tensor, difference: torch.Tensor) -> Distances:
    norm_a, norm_b, distance = frobenius_norm(a), frobenius_norm(b), frobenius_norm(difference)
    if 0.0 in (norm_a, norm_b):
        return Distances(norm_a, norm_b, distance, None)
    # of the matrices with norm 1: the product of tiny ones would vanish
    return Distances(norm_a, norm_b, distance, _cosine(_inner(a / norm_a, b / norm_b), 1.0, 1.0, distance))


def _angles(first: torch.Tensor, second: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """Return principal angles by their cosines and sines: a cosine alone cannot tell those below 1e-8 from 0.

    Björck & Golub, "Numerical methods for computing angles between linear subspaces" (1973).
    """
    if first.shape[1] < second.shape[1]:
        first, second, overlap = second, first, overlap.T
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(second - first @ overlap).flip(0).clamp(max=1.0)
    return torch.where(cosines.square() < 0.5, cosines.arccos(), sines.arcsin())


def _comes_later(a: Product, b: Product) -> bool:
    """Order two products by something that only they decide, so that both orders compute the same."""
    if a.rank != b.rank:
        return a.rank < b.rank
    # one row tells nearly all of them apart
    for first, second in ((a.left[:1], b.left[:1]), (a.left, b.left), (a.right, b.right)):
        difference = (first - second).reshape(-1)
        if difference.numel() and (largest := float(difference[difference.abs().argmax()])):
            return largest < 0
    return False


def _cores(a: Product, b: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a, b and a − b in one pair of orthonormal bases that span the columns and the rows of both.

    Factors that are near each other are subtracted before they are rotated: that is exact, and afterwards the rounding
    of the rotation would be as large as 1e-16 of the factors and not of their difference.
    """
    if not _are_near(a, b):
        left_a, left_b = _rotated(a.left, b.left)
        right_a, right_b = _rotated(a.right.T, b.right.T)
        of_a, of_b = left_a @ right_a.T, left_b @ right_b.T
        return of_a, of_b, of_a - of_b
    # a − b = (L_a − L_b) R_a + L_b (R_a − R_b)
    left_step, left_b = _rotated(a.left - b.left, b.left)
    right_a, right_step = _rotated(a.right.T, (a.right - b.right).T)
    difference = left_step @ right_a.T + left_b @ right_step.T
    return (left_step + left_b) @ right_a.T, left_b @ (right_a - right_step).T, difference


def _rotated(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two sets of columns (m, i) and (m, j) in an orthonormal basis of all of them, (p, i) and (p, j)."""
    # side by side in the order of columns, in which LAPACK works
    joint = torch.cat([first.T, second.T]).T
    whole: torch.Tensor = torch.linalg.qr(joint, mode="r").R
    return whole[:, : first.shape[1]], whole[:, first.shape[1] :]


def _are_near(a: Product, b: Product) -> bool:
    """Say whether every column of the left factors, and every row of the right ones, is near its counterpart."""
    if a.rank != b.rank:
        return False
    pairs = ((a.left, b.left), (a.right.T, b.right.T))
    return all(bool((_columns(x - y) <= torch.minimum(_columns(x), _columns(y)) / 4).all()) for x, y in pairs)


def _columns(matrix: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(matrix, dim=0)
    return norms
