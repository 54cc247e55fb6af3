"""Dense matrices that exist one block of rows at a time: thresholds, the best low-rank factors, distances.

What is done element by element to low-rank deltas has no low rank any more. It is computed in blocks that are made
again in every pass, so that the memory stays that of a few blocks however large the matrix is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from loramgr.algebra.lowrank import Decomposition, Product

__all__ = ["Tiled", "kth_largest", "tiles"]

_TILE = 1 << 20  # elements of a block, 8 MiB in float64
_OVERSAMPLING = 16
_POWERS = 2
_DIGIT = 16


def tiles(shape: tuple[int, int]) -> Iterator[slice]:
    """Yield the blocks of rows of a matrix of this shape; they depend on nothing else, so masks can be repeated."""
    rows = max(1, _TILE // max(1, shape[1]))
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def kth_largest(shape: tuple[int, int], rows: Callable[[slice], torch.Tensor], k: int) -> float:
    """Return the k-th largest magnitude of a matrix whose rows (float64) a function makes; 1 ≤ k ≤ its elements.

    By the digits of the numbers' bits, which order magnitudes: four passes, and counts are all that is kept.
    """
    found = 0
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for tile in tiles(shape):
            bits = rows(tile).abs().contiguous().view(torch.int64).flatten()
            if shift < 64 - _DIGIT:
                bits = bits[bits >> (shift + _DIGIT) == found]
            counts += torch.bincount((bits >> shift) & ((1 << _DIGIT) - 1), minlength=1 << _DIGIT).cpu()
        above = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, k))
        k -= int(above[place - 1]) if place else 0
        found = (found << _DIGIT) | ((1 << _DIGIT) - 1 - place)
    return float(torch.tensor(found, dtype=torch.int64).view(torch.float64))


@dataclass(frozen=True, slots=True)
class Tiled:
    """A dense matrix whose rows (float64, on one device) a function makes, the same ones every time."""

    shape: tuple[int, int]
    device: torch.device
    rows: Callable[[slice], torch.Tensor]

    def best(self, rank: int, seed: int) -> Product:
        """Return factors of at most this rank, by a randomised range finder with two power iterations.

        Its error is that of the best ones of the rank within a few percent (Halko, Martinsson & Tropp 2009, arXiv
        0909.4061), and theirs exactly where rank and oversampling reach the shorter side.
        """
        width = min(rank + _OVERSAMPLING, *self.shape)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(self.shape[1], width, generator=generator, dtype=torch.float64).to(self.device)
        basis = torch.linalg.qr(self._times(start)).Q
        for _ in range(_POWERS):
            basis = torch.linalg.qr(self._times(torch.linalg.qr(self._transposed_times(basis)).Q)).Q
        across = torch.linalg.qr(self._transposed_times(basis))
        left, values, right = torch.linalg.svd(across.R.T, full_matrices=False)
        return Decomposition(basis @ left, values, right @ across.Q.T).truncated(rank)

    def squares(self, stored: Product) -> tuple[float, float]:
        """Return the squared Frobenius norms of the matrix and of its difference to the stored one."""
        whole = distance = 0.0
        for tile in tiles(self.shape):
            block = self.rows(tile)
            whole += float(block.square().sum())
            distance += float((block - stored.rows(tile)).square().sum())
        return whole, distance

    def _times(self, right: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.rows(tile) @ right for tile in tiles(self.shape)])

    def _transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(self.shape[1], left.shape[1], dtype=torch.float64, device=self.device)
        for tile in tiles(self.shape):
            total.addmm_(self.rows(tile).T, left[tile])
        return total
