"""The base's weights as far as figures need them: what a module's delta is measured against."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loramgr.adapter import Adapter, LowRank, Rows, Shift, Update
from loramgr.checkpoints.binding import BoundUpdate
from loramgr.errors import IntegrityError
from loramgr.tensorfile import TensorView
from loramgr.workspace.matching import bind_to
from loramgr.workspace.sources import OpenBase

if TYPE_CHECKING:
    import torch

__all__ = ["Weight", "Weights", "oriented", "without_own_table"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of the base as a matrix (out, in), None for one that the base lacks.

    With `transposed` the base stores it, and every tensor that takes its place, as (in, out). `shape` is that of the
    stored tensor, None where there is none.
    """

    tensor: torch.Tensor | None
    transposed: bool
    shape: tuple[int, ...] | None = None


class Weights:
    """Finds the weight behind an update of any of the given adapters; reads it when asked, and proves its bytes.

    Raises IncompatibleError where an adapter does not fit the base.
    """

    def __init__(self, base: OpenBase, adapters: Sequence[Adapter]) -> None:
        self._base = base
        self._bound: dict[int, BoundUpdate] = {}
        for adapter in adapters:
            bound = {each.name: each for each in bind_to(adapter, base).updates}
            self._bound |= {id(update): bound[name] for name, update in adapter.updates.items() if name in bound}

    def kind(self, update: Update) -> str:
        """Return what the update is on the base, as `BoundUpdate` says it."""
        return self._bound[id(update)].kind

    def weight(self, updates: Sequence[Update | None]) -> Weight:
        """Return the weight that all of the updates are of; at least one of them is there.

        Raises IntegrityError when its bytes are not those that the base's digest names.
        """
        bound = [self._bound[id(update)] for update in updates if update is not None]
        transposed = any(each.transposed for each in bound)
        name = bound[0].tied_source or bound[0].target
        view = None if bound[0].new else self._base.checkpoint.tensors[name]
        if view is None:
            return Weight(None, transposed)
        return Weight(oriented(self._proved(name, view), transposed=transposed), transposed, view.spec.shape)

    def _proved(self, name: str, view: TensorView) -> torch.Tensor:
        from loramgr.tensors import from_bytes

        data = view.read_bytes()
        if hashlib.sha256(data).hexdigest() != self._base.tensors[name].sha256:
            raise IntegrityError(f"{name}: the base {self._base.source} has changed since it was registered")
        return from_bytes(data, view.spec)


def oriented(tensor: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Return a parameter as a matrix (out, in): kernels flattened, a vector as one row."""
    matrix = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)
    return matrix.T if transposed else matrix


def without_own_table(update: Update, weight: Weight) -> Update:
    """Return the update without the table that takes the weight's place, where that is the weight itself."""
    import torch

    if not isinstance(update, LowRank | Shift | Rows) or update.table is None or weight.tensor is None:
        return update
    table = oriented(update.table.load(), transposed=weight.transposed)
    same = table.dtype == weight.tensor.dtype and torch.equal(table, weight.tensor)
    return replace(update, table=None) if same else update
