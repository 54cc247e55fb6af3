"""What any update does to a weight, dense and by rows: for the updates whose effect is no product of thin factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loramgr.algebra.comparison import Distances, Tally
from loramgr.algebra.lowrank import Product

__all__ = ["Added", "Decomposed", "Dense", "Effect", "Whole", "effect_distance", "effect_distances", "matrix_norm"]

_TILE = 1 << 20  # values of a tile: several of them in float64 fit into a cache


@dataclass(frozen=True, slots=True)
class Whole:
    """The tensor takes the weight's place; a matrix in any dtype."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the weight becomes."""
        return tuple(self.tensor.shape)

    def rows(self, rows: slice, weight: torch.Tensor | None) -> torch.Tensor:
        """Return rows of what the weight becomes."""
        return self.tensor[rows].double()


@dataclass(frozen=True, slots=True)
class Added:
    """The weight, or the table in its place unless that is None, becomes the sum of it and the product."""

    product: Product
    table: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the weight becomes."""
        return self.product.shape

    def rows(self, rows: slice, weight: torch.Tensor | None) -> torch.Tensor:
        """Return rows of what the weight becomes; of the product alone, without weight and table."""
        own = weight if self.table is None else self.table
        added = self.product.rows(rows)
        return added if own is None else own[rows].double() + added


@dataclass(frozen=True, slots=True)
class Dense:
    """The weight becomes the sum of it and the matrix, in float64."""

    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the weight becomes."""
        return tuple(self.matrix.shape)

    def rows(self, rows: slice, weight: torch.Tensor | None) -> torch.Tensor:
        """Return rows of what the weight becomes; of the matrix alone, without weight."""
        added = self.matrix[rows].double()
        return added if weight is None else weight[rows].double() + added


@dataclass(frozen=True, slots=True)
class Decomposed:
    """The weight W becomes magnitude · V / ‖V‖, V = W + product (DoRA, arXiv 2402.09353), the norm of every row.

    `magnitude` is (rows,); the table takes W's place first, unless it is None.
    """

    product: Product
    magnitude: torch.Tensor
    table: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the weight becomes."""
        return self.product.shape

    def rows(self, rows: slice, weight: torch.Tensor | None) -> torch.Tensor:
        """Return rows of what the weight becomes; a row of zeros has no direction and becomes NaN."""
        direction = Added(self.product, self.table).rows(rows, weight)
        norms: torch.Tensor = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        return direction * (self.magnitude[rows].double()[:, None] / norms)


Effect = Whole | Added | Dense | Decomposed


def effect_distances(a: Effect | None, b: Effect | None, weight: torch.Tensor) -> Distances:
    """Compare the changes that two updates make to a weight (m, n); None changes nothing.

    A tile at a time in float64, in a fixed order. The figures are NaN where a tensor holds NaN.
    """
    tally = Tally()
    for rows in _tiles(weight.shape):
        own = weight[rows].double()
        before, after = (own if each is None else each.rows(rows, weight) for each in (a, b))
        changes = [_change(each, result, own, rows) for each, result in ((a, before), (b, after))]
        plain = all(each is None or _is_plain(each) for each in (a, b))
        # the weight cancels: exactly between two results, or where it is in neither
        tally.add(changes[0], changes[1], changes[0] - changes[1] if plain else before - after)
    return tally.distances()


def effect_distance(a: Effect, b: Effect) -> float:
    """Return the Frobenius distance of two updates that leave nothing of the weight, and so need none."""
    tally = Tally()
    for rows in _tiles(a.shape):
        before, after = a.rows(rows, None), b.rows(rows, None)
        tally.add(before, after, before - after)
    return tally.distances().distance


def matrix_norm(matrix: torch.Tensor) -> float:
    """Return the Frobenius norm of a matrix in any dtype, in float64 and a tile at a time."""
    return math.hypot(*(float(torch.linalg.vector_norm(matrix[rows].double())) for rows in _tiles(matrix.shape)))


def _change(effect: Effect | None, result: torch.Tensor, weight: torch.Tensor, rows: slice) -> torch.Tensor:
    if isinstance(effect, Added) and effect.table is None:
        return effect.product.rows(rows)
    if isinstance(effect, Dense):
        return effect.matrix[rows].double()
    return result - weight


def _is_plain(effect: Effect) -> bool:
    return isinstance(effect, Dense) or (isinstance(effect, Added) and effect.table is None)


def _tiles(shape: tuple[int, ...]) -> Iterator[slice]:
    height = max(1, _TILE // max(1, shape[1]))
    yield from (slice(start, start + height) for start in range(0, shape[0], height))
