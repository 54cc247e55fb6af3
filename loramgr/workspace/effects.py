"""An adapter's update as the algebra takes it: in two factors alone, or as what it makes of a weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loramgr.adapter import LowRank, Opaque, Replacement, Rows, Shift, Update
from loramgr.errors import IncompatibleError
from loramgr.workspace.applied import Additive, Rebuilding, applied, delta_of
from loramgr.workspace.deltas import product_of
from loramgr.workspace.weights import oriented

if TYPE_CHECKING:
    import torch

    from loramgr.algebra.effects import Effect, Whole
    from loramgr.algebra.lowrank import Product

__all__ = ["effect_of", "product_alone", "whole_rows"]


def product_alone(update: Update) -> Product:
    """Return the delta of a low-rank update, or of a bias's shift as one row; what else an update brings left aside.

    Raises IncompatibleError for factors with NaN or infinite values, and for updates that have no delta of their own.
    """
    from loramgr.algebra.lowrank import Product

    match update:
        case LowRank():
            return product_of(replace(update, magnitude=None, table=None))
        case Shift():
            vector = update.vector.load().reshape(1, -1)
            return Product.of(vector.new_ones((1, 1)), vector, update.scaling)
    raise IncompatibleError(f"{next(update.views()).spec.name} takes a parameter's place and is no delta")


def effect_of(
    update: Update, weight: torch.Tensor | None, transposed: bool, shape: tuple[int, ...] | None = None
) -> Effect:
    """Return what the update makes of a weight (out, in); None for an update that leaves nothing of it.

    With `transposed` the tensors that take its place are stored as (in, out). `shape` is that of the stored tensor,
    None where nobody knows it. Raises IncompatibleError for an update whose effect only the base tells.
    """
    from loramgr.algebra.effects import Added, Decomposed, Dense, Whole

    if isinstance(update, Replacement | Opaque):
        return Whole(oriented(update.tensor.load(), transposed=transposed))
    if isinstance(update, Additive):
        return Dense(oriented(delta_of(update, shape), transposed=False))
    if isinstance(update, Rebuilding):
        return _rebuilt(update, weight, transposed, shape)
    table = None if update.table is None else oriented(update.table.load(), transposed=transposed)
    if isinstance(update, Rows):
        return _with_rows(update, weight if table is None else table, transposed)
    product = product_alone(update)
    if isinstance(update, Shift) or update.magnitude is None:
        return Added(product, table)
    return Decomposed(product, update.magnitude.load().flatten(), table)


def _rebuilt(update: Rebuilding, weight: torch.Tensor | None, transposed: bool, shape: tuple[int, ...] | None) -> Whole:
    from loramgr.algebra.effects import Whole

    if weight is None:
        raise IncompatibleError(f"{next(update.views()).spec.name}: what it does depends on the base's weights")
    stored = weight.T if transposed else weight
    result = applied(update, stored if shape is None else stored.reshape(shape), transposed=transposed)
    return Whole(oriented(result, transposed=transposed))


def whole_rows(update: Rows) -> Whole:
    """Return the trained rows as a matrix of their own."""
    from loramgr.algebra.effects import Whole

    return Whole(update.rows.load())


def _with_rows(update: Rows, start: torch.Tensor | None, transposed: bool) -> Whole:
    import torch

    from loramgr.algebra.effects import Whole

    if start is None:
        raise IncompatibleError(f"{update.rows.spec.name}: the other rows are those of the base")
    rows = update.rows.load()
    stored = (start.T if transposed else start).to(torch.promote_types(start.dtype, rows.dtype), copy=True)
    stored[list(update.indices)] = rows.to(stored.dtype)
    return Whole(stored.T if transposed else stored)
