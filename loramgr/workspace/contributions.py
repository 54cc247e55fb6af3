"""What every adapter of a merge does to every tensor of the base, and which tied names part because of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loramgr.adapter import Adapter, LowRank, Replacement, Rows, Shift, Update, whole_tensor
from loramgr.checkpoints.binding import Binding, BoundUpdate
from loramgr.checkpoints.families import TASKS_WITHOUT_VOCABULARY_HEAD, TieGroup, is_output_head
from loramgr.errors import IncompatibleError
from loramgr.records import VersionRecord
from loramgr.tensorfile import TensorView
from loramgr.workspace.sources import OpenBase

__all__ = ["Contribution", "Pick", "collect", "part_ties", "sha256_as", "whole_tensor", "without_base_table"]


@dataclass(frozen=True, slots=True)
class Pick:
    """An adapter of a merge as it was asked for: the text, what it means, its weight, and its bound updates."""

    text: str
    ref: str
    version: VersionRecord
    adapter: Adapter
    weight: float
    binding: Binding

    @property
    def keeps_ties(self) -> bool:
        """Whether tied names are to stay one tensor under this adapter."""
        return self.adapter.keeps_ties

    def means(self, chosen: str | None) -> bool:
        """Say whether a person's choice is this adapter: as it was asked for, by reference or by digest."""
        return chosen in (self.text, self.ref, self.version.digest)


@dataclass(frozen=True, slots=True)
class Contribution:
    """One adapter's update of one tensor."""

    pick: Pick
    bound: BoundUpdate

    @property
    def update(self) -> Update:
        """The update itself."""
        return self.bound.update

    @property
    def weight(self) -> float:
        """The weight it is added with."""
        return self.pick.weight


Contributions = dict[str, list[Contribution]]


def collect(base: OpenBase, picks: Sequence[Pick], replacements_of: str | None, *, keep_tied: bool) -> Contributions:
    """Return every tensor's contributions, in the order of the adapters.

    Tables that are the base's own tensor, in its dtype, are dropped from their updates. Of several replacements of
    one tensor only one may count: the chosen adapter's, or all are the same and have weight 1; else IncompatibleError.
    """
    found: Contributions = {}
    for pick in picks:
        for bound in pick.binding.updates:
            target = bound.tied_source if keep_tied and bound.tied_source else bound.target
            kept = replace(bound, target=target, update=without_base_table(base, bound))
            found.setdefault(target, []).append(Contribution(pick, kept))
    return {target: _one_replacement(target, items, replacements_of) for target, items in found.items()}


def part_ties(
    base: OpenBase, contributions: Contributions, picks: Sequence[Pick], *, keep_tied: bool
) -> dict[str, str]:
    """Decide which tied names become tensors of their own, and complete their contributions.

    Returns parted name → the tensor of the base whose bytes it had; empty while every group stays one tensor. A group
    parts when its names would differ: an adapter that keeps ties acts on all of its names, any other on the one it
    names. When one group parts, all do, since a configuration has one switch for them.
    """
    headless = any(pick.adapter.task_type in TASKS_WITHOUT_VOCABULARY_HEAD for pick in picks)
    groups = [kept for group in base.ties if (kept := _living(group, headless=headless)).tied]
    members = {group.source: _by_member(group, contributions, keep_tied=keep_tied) for group in groups}
    if all(_all_equal(list(named.values())) for named in members.values()):
        for group in groups:
            for name in group.tied:
                contributions.pop(name, None)
        return {}
    for named in members.values():
        contributions.update({name: items for name, items in named.items() if items})
    return {name: group.source for group in groups for name in group.tied if name not in base.checkpoint.tensors}


def _living(group: TieGroup, *, headless: bool) -> TieGroup:
    """Return the group without the names that the merged model no longer has."""
    if not headless:
        return group
    return replace(group, tied=tuple(name for name in group.tied if not _is_of_head(name)))


def _is_of_head(name: str) -> bool:
    return is_output_head(f"{name.rpartition('.')[0]}.weight")


def _by_member(group: TieGroup, contributions: Contributions, *, keep_tied: bool) -> Contributions:
    """Return the contributions to every name of the group."""
    source = contributions.get(group.source, [])
    shared = [item for item in source if keep_tied or item.pick.keeps_ties]
    named = {group.source: source}
    for name in group.tied:
        named[name] = shared + contributions.get(name, [])
    return named


def _all_equal(members: list[list[Contribution]]) -> bool:
    first, *others = members
    return all(_same(first, other) for other in others)


def _same(first: Sequence[Contribution], second: Sequence[Contribution]) -> bool:
    """Say whether two names of a group end as the same tensor: by the same updates, or equal replacements."""
    if [id(item.update) for item in first] == [id(item.update) for item in second]:
        return True
    both = [item for items in (first, second) for item in items]
    alone = len(first) == len(second) == 1 and all(isinstance(item.update, Replacement) for item in both)
    return alone and first[0].weight == second[0].weight and len({_sha256(item) for item in both}) == 1


def _sha256(item: Contribution) -> tuple[object, ...]:
    view = whole_tensor(item.update)
    assert view is not None
    return view.spec.dtype, view.spec.shape, hashlib.sha256(view.read_bytes()).hexdigest()


def without_base_table(base: OpenBase, bound: BoundUpdate) -> Update:
    """Return the update without the table that takes the parameter's place, where that is the base's own tensor."""
    update = bound.update
    if not isinstance(update, LowRank | Shift | Rows) or update.table is None:
        return update
    known = base.tensors.get(bound.tied_source or bound.target)
    if known is None or known.shape != update.table.spec.shape:
        return update
    return replace(update, table=None) if sha256_as(update.table, known.dtype) == known.sha256 else update


def sha256_as(view: TensorView, dtype: str) -> str:
    """Return the sha256 of a tensor's bytes in the base's dtype, in which PEFT would load it."""
    if view.spec.dtype == dtype:
        return hashlib.sha256(view.read_bytes()).hexdigest()
    from loramgr.algebra.casting import rounded
    from loramgr.tensors import as_bytes, torch_dtype

    return hashlib.sha256(as_bytes(rounded(view.load(), torch_dtype(dtype)))).hexdigest()


def _one_replacement(target: str, items: list[Contribution], chosen: str | None) -> list[Contribution]:
    wholes = [item for item in items if whole_tensor(item.update) is not None]
    if len(wholes) < 2:
        return items
    kept = [item for item in wholes if item.pick.means(chosen)]
    if not kept and len({_sha256(item) for item in wholes}) == 1 and _are_plain(wholes):
        kept = wholes[:1]
    if not kept:
        names = " and ".join(item.pick.ref for item in wholes)
        raise IncompatibleError(
            f"{names} replace the same tensor {target}, and only one of them can",
            f"--replacements-of {wholes[0].pick.ref}",
        )
    return [item for item in items if item not in wholes or item in kept[:1]]


def _are_plain(items: Sequence[Contribution]) -> bool:
    return all(isinstance(item.update, Replacement) and item.weight == 1 for item in items)
