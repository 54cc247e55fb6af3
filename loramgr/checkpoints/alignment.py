"""Which tensor of a fine-tune is which of its base: one change of prefix, and the heads that either lacks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loramgr.checkpoints.families import TieGroup
from loramgr.checkpoints.prefixes import Renaming
from loramgr.checkpoints.shapes import is_replaceable
from loramgr.errors import IncompatibleError
from loramgr.tensorfile import TensorSpec

__all__ = ["Alignment", "align"]


@dataclass(frozen=True, slots=True)
class Alignment:
    """`pairs` maps every tensor of the fine-tune that the base has, too, to its name there.

    `sources` maps it to the tensor in the base's files: another one for a name that the base ties. `new` are tensors
    that the base lacks, `missing` those of the base's files that the fine-tune lacks.
    """

    pairs: dict[str, str]
    sources: dict[str, str]
    new: tuple[str, ...]
    missing: tuple[str, ...]


def align(
    finetuned: Mapping[str, TensorSpec], base: Mapping[str, TensorSpec], ties: Sequence[TieGroup], where: str
) -> Alignment:
    """Pair the tensors of a fine-tune with those of its base; `where` names the fine-tune.

    Raises IncompatibleError, naming a tensor, for a model of another architecture: no names or shapes in common, no
    layer in common where both have some, more or fewer layers, or another shape of what is no vocabulary and no head.
    """
    known = {name: name for name in base} | {
        name: group.source for group in ties for name in group.tied if name not in base
    }
    renaming = _renaming(finetuned, base, known)
    pairs = {name: target for name in finetuned if (target := _target(name, renaming, known)) is not None}
    sources = {name: known[target] for name, target in pairs.items()}
    matched = {name for name, source in sources.items() if finetuned[name].shape == base[source].shape}
    if not any(len(finetuned[name].shape) > 1 for name in matched):
        raise IncompatibleError(f"{where}: no matrix of it is the base's by name and shape: another architecture")
    for name, source in sorted(sources.items()):
        if not is_replaceable(base[source], finetuned[name].shape):
            raise IncompatibleError(
                f"{name} is {list(finetuned[name].shape)} in {where}, and {list(base[source].shape)} in the base: "
                "another architecture"
            )
    if _has_layers(finetuned) and _has_layers(base) and not _has_layers(matched):
        raise IncompatibleError(f"{where}: no layer of it is one of the base's by name and shape: another architecture")
    new = tuple(sorted(finetuned.keys() - pairs.keys()))
    missing = tuple(sorted(base.keys() - set(sources.values())))
    _check_layers(new, pairs, f"{where} has %s, a layer that the base lacks")
    _check_layers(missing, pairs.values(), f"{where} lacks %s, a layer of the base")
    return Alignment(pairs, sources, new, missing)


def _target(name: str, renaming: Renaming, known: Collection[str]) -> str | None:
    """Return the base's name; a name that the change of prefix is not for keeps its own, and None is in the base."""
    renamed = renaming.apply(name)
    return next((each for each in (renamed, name) if each is not None and each in known), None)


def _renaming(
    finetuned: Mapping[str, TensorSpec], base: Mapping[str, TensorSpec], known: Mapping[str, str]
) -> Renaming:
    """Return the change of prefix that pairs the most values; of several as good, the one that changes least."""

    def paired(renaming: Renaming) -> int:
        targets = ((spec, renaming.apply(name)) for name, spec in finetuned.items())
        return sum(
            spec.elements
            for spec, target in targets
            if target is not None and target in known and spec.shape == base[known[target]].shape
        )

    candidates = {Renaming(dropped, added) for dropped in _prefixes(finetuned) for added in _prefixes(known)}
    ranked = sorted(candidates, key=lambda each: (len(each.dropped) + len(each.added), each.dropped, each.added))
    return max(ranked, key=paired)


def _prefixes(names: Iterable[str]) -> set[str]:
    """Return what may stand before the names of one model and not of the other: nothing with a layer's number."""
    found = {""}
    for name in names:
        prefix = ""
        for part in name.split(".")[:-2]:
            if part.isdigit():
                break
            prefix += f"{part}."
            found.add(prefix)
    return found


def _check_layers(alone: Iterable[str], paired: Iterable[str], message: str) -> None:
    """Refuse a tensor that only one model has and that is a paired one but for a layer's number."""
    patterns = {_unnumbered(name) for name in paired}
    for name in alone:
        pattern = _unnumbered(name)
        if pattern != name and pattern in patterns:
            raise IncompatibleError(f"{message % name}: another architecture")


def _has_layers(names: Iterable[str]) -> bool:
    return any(_unnumbered(name) != name for name in names)


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
