"""Matrices that are kept as two thin factors: sums, norms, angles and truncation, without ever building one.

With a QR of both factors, L R = Q_L (R_L R_Rᵀ) Q_Rᵀ: what holds for the small core R_L R_Rᵀ (singular values, norms,
inner products with others in the same bases) holds for the matrix, since the bases are orthonormal. In float64; Gram
matrices would lose half of the digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramgr.errors import IncompatibleError, UsageError

__all__ = ["Decomposition", "Product", "Shared", "cosine", "decomposed", "shared", "summed"]


@dataclass(frozen=True, slots=True)
class Product:
    """The matrix left @ right with left (m, r) and right (r, n), both float64 on one device; the rank r may be 0.

    Its entries have to be finite: a decomposition of what is not would raise LinAlgError or never end.
    """

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of(
        cls, left: torch.Tensor, right: torch.Tensor, scaling: float = 1.0, device: str | torch.device = "cpu"
    ) -> Product:
        """Return scaling · left @ right of factors of any float dtype, the scaling folded into the left one."""
        return cls(left.to(device, torch.float64) * scaling, right.to(device, torch.float64))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, n) of the matrix."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """The number r of columns of `left`, which the matrix's own rank is at most."""
        return self.left.shape[1]

    def scaled(self, factor: float) -> Product:
        """Return the matrix times a number."""
        return Product(self.left * factor, self.right)

    def transposed(self) -> Product:
        """Return the transposed matrix."""
        return Product(self.right.T, self.left.T)

    def rows(self, rows: slice) -> torch.Tensor:
        """Return some rows of the matrix, dense."""
        return self.left[rows] @ self.right


@dataclass(frozen=True, slots=True)
class Shared:
    """Matrices of one shape in one pair of orthonormal bases: matrix i is left @ cores[i] @ right.

    `left` is (m, p) and `right` (q, n), both with p, q at most the sum of the ranks; the cores are (p, q).
    """

    left: torch.Tensor
    right: torch.Tensor
    cores: tuple[torch.Tensor, ...]

    def product(self, core: torch.Tensor) -> Product:
        """Return the matrix of a core in these bases, which may be any function of the cores."""
        return Product(self.left @ core, self.right)


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A singular value decomposition: left (m, k) and right (k, n) orthonormal, values (k,) with the largest first.

    k is at most the rank of the product and both of its sides.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def truncated(self, rank: int) -> Product:
        """Return the best approximation of at most this rank (Eckart & Young 1936), the values shared evenly."""
        roots = self.values[:rank].sqrt()
        return Product(self.left[:, :rank] * roots, roots[:, None] * self.right[:rank])

    def dropped(self, rank: int) -> float:
        """Return the Frobenius norm of what `truncated` leaves out."""
        return float(self.values[rank:].norm())


def summed(products: Sequence[Product]) -> Product:
    """Return the exact sum: the factors side by side, its rank the sum of the ranks.

    Raises UsageError without products and IncompatibleError for matrices of different shapes.
    """
    _check_shapes(products)
    return Product(torch.cat([each.left for each in products], 1), torch.cat([each.right for each in products]))


def shared(products: Sequence[Product]) -> Shared:
    """Return the matrices in bases that span all of their columns and rows; raises as `summed`.

    This loses nothing: every core has the singular values of its matrix, and sums and inner products of the cores are
    those of the matrices (the core space of Panariello et al. 2025, arXiv 2509.17786, by QR in place of SVD).
    """
    whole = summed(products)
    left, right = torch.linalg.qr(whole.left), torch.linalg.qr(whole.right.T)
    ranks = [each.rank for each in products]
    parts = zip(left.R.split(ranks, 1), right.R.split(ranks, 1), strict=True)
    return Shared(left.Q, right.Q.T, tuple(upper @ lower.T for upper, lower in parts))


def decomposed(product: Product) -> Decomposition:
    """Return the singular value decomposition of the matrix, in O((m + n)·r² + r³)."""
    bases = shared([product])
    left, values, right = torch.linalg.svd(bases.cores[0], full_matrices=False)
    return Decomposition(bases.left @ left, values, right @ bases.right)


def cosine(inner: float, first: float, second: float) -> float | None:
    """Return the cosine of an angle from the inner product and the two norms; None where one of them is zero."""
    return None if first == 0 or second == 0 else max(-1.0, min(1.0, inner / first / second))


def _check_shapes(products: Sequence[Product]) -> None:
    if not products:
        raise UsageError("a sum of adapters needs at least one adapter")
    if len({each.shape for each in products}) > 1:
        raise IncompatibleError(f"deltas of shapes {products[0].shape} and others have no sum")
