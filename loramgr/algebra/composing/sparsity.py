"""Which entries of a delta stay, and what they are multiplied with, before deltas are combined entry by entry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramgr.algebra.composing.tiles import kth_largest, tiles

__all__ = ["Matrix", "Sparsifier", "by_magnitude", "magprune", "randomly", "randomly_keeping_l1", "seed_of"]

Rows = Callable[[slice], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One adapter's delta of one module, made row by row, and what random choices about it depend on.

    `density` is the share of entries that stay, above 0 and at most 1; `epsilon` the width of DELLA's probabilities;
    `key` names seed, module and the adapter's place.
    """

    shape: tuple[int, int]
    rows: Rows
    density: float
    epsilon: float
    key: str

    def uniform(self, tile: slice) -> torch.Tensor:
        """Return a number in [0, 1) for every entry of a block of rows, the same ones on every device."""
        size = (tile.stop - tile.start, self.shape[1])
        return torch.rand(size, generator=torch.Generator().manual_seed(seed_of(f"{self.key}\0{tile.start}")))


Sparsifier = Callable[[Matrix], Rows]


def seed_of(text: str) -> int:
    """Return a number of 63 bits that stands for the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def by_magnitude(matrix: Matrix) -> Rows:
    """Keep the ⌊density · entries⌋ of largest magnitude, at least one; those that equal the smallest kept one too."""
    if matrix.density == 1:
        return matrix.rows
    kept = max(1, int(matrix.density * matrix.shape[0] * matrix.shape[1]))
    threshold = kth_largest(matrix.shape, matrix.rows, kept)

    def rows(tile: slice) -> torch.Tensor:
        block = matrix.rows(tile)
        return torch.where(block.abs() >= threshold, block, 0.0)

    return rows


def randomly(matrix: Matrix) -> Rows:
    """Keep each entry with the probability `density` and divide it by that, so that its expectation stays (DARE)."""

    def rows(tile: slice) -> torch.Tensor:
        block = matrix.rows(tile)
        kept = (matrix.uniform(tile) < matrix.density).to(block.device)
        return torch.where(kept, block / matrix.density, 0.0)

    return rows


def randomly_keeping_l1(matrix: Matrix) -> Rows:
    """Keep each entry with the probability `density` and scale them so that the sum of magnitudes stays (mergekit)."""

    def masked(tile: slice) -> torch.Tensor:
        block = matrix.rows(tile)
        return torch.where((matrix.uniform(tile) < matrix.density).to(block.device), block, 0.0)

    before = sum(float(matrix.rows(tile).abs().sum()) for tile in tiles(matrix.shape))
    after = sum(float(masked(tile).abs().sum()) for tile in tiles(matrix.shape))
    scale = before / after if after else 1.0
    return lambda tile: masked(tile) * scale


def magprune(matrix: Matrix) -> Rows:
    """Keep entries with a probability that rises with their rank in the row, and divide by it (DELLA's MAGPRUNE).

    The probabilities are spread evenly over `epsilon` around the density; the spread is narrower where they would
    leave [density / 2, 1].
    """
    width = min(matrix.epsilon, 2 * (1 - matrix.density), matrix.density)
    columns = matrix.shape[1]
    steps = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns - 0.5
    probabilities = matrix.density + width * steps

    def rows(tile: slice) -> torch.Tensor:
        block = matrix.rows(tile)
        order = block.abs().argsort(dim=1, stable=True)
        kept = torch.empty_like(block).scatter_(1, order, probabilities.to(block.device).expand_as(block))
        return torch.where(matrix.uniform(tile).to(block.device) < kept, block / kept, 0.0)

    return rows
