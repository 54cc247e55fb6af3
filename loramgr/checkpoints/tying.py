"""Adapters that keep tied names tied (PEFT's `ensure_weight_tying`): one update for the one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loramgr.adapter import LowRank, Replacement, Rows, Update
from loramgr.errors import IncompatibleError

if TYPE_CHECKING:
    from loramgr.checkpoints.binding import BoundUpdate

__all__ = ["keep_tied"]


def keep_tied(bound: Sequence[BoundUpdate]) -> list[BoundUpdate]:
    """Bind the updates of tied names to the tensor that the file has.

    PEFT writes such an update twice, for the head transposed; the second is left out once its bytes are known to be
    the same. Raises IncompatibleError when they differ: the adapter then does not keep the tie it claims to keep.
    """
    direct = {update.target: update for update in bound if update.tied_source is None}
    kept = list(direct.values())
    for update in bound:
        if update.tied_source is None:
            continue
        other = direct.get(update.tied_source)
        if other is None:
            moved = replace(update, target=update.tied_source, tied_source=None)
            direct[moved.target] = moved
            kept.append(moved)
        elif not _is_same(update.update, other.update):
            raise IncompatibleError(
                f"{update.name} and {other.name} are one tensor in the base, and the adapter's updates of them differ",
                "train it without ensure_weight_tying, or with one update for both",
            )
    return kept


def _is_same(head: Update, embedding: Update) -> bool:
    """Say whether both updates make the same tensor of the same one."""
    if isinstance(head, LowRank) and isinstance(embedding, LowRank):
        return _is_same_product(head, embedding)
    if isinstance(head, Replacement) and isinstance(embedding, Replacement):
        return bytes(head.tensor.read_bytes()) == bytes(embedding.tensor.read_bytes())
    if isinstance(head, Rows) and isinstance(embedding, Rows):
        same_rows = bytes(head.rows.read_bytes()) == bytes(embedding.rows.read_bytes())
        return head.indices == embedding.indices and same_rows
    return False


def _is_same_product(head: LowRank, embedding: LowRank) -> bool:
    import torch

    plain = head.magnitude is None and embedding.magnitude is None and head.scaling == embedding.scaling
    if not plain or (head.kind, embedding.kind) != ("linear", "embedding"):
        return False
    crossed = ((head.lora_A, embedding.lora_B), (head.lora_B, embedding.lora_A))
    tables = [view.read_bytes() for view in (head.table, embedding.table) if view is not None]
    same_tables = len(tables) < 2 or bytes(tables[0]) == bytes(tables[1])
    return same_tables and all(torch.equal(one.load(), other.load().T) for one, other in crossed)
