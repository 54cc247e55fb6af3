"""All parameters of two adapters, or all tensors of two models, compared in parallel and one pair at a time each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from loramgr.adapter import Adapter
from loramgr.checkpoints.families import tied_groups
from loramgr.checkpoints.source import Checkpoint
from loramgr.errors import IncompatibleError, LoramgrError
from loramgr.records import ModuleDifference
from loramgr.tensorfile import TensorView
from loramgr.workspace.deltas import aligned, renamed
from loramgr.workspace.home import Home
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.matching import match_base
from loramgr.workspace.pairs import Pair, compare, module_name, needs_weight
from loramgr.workspace.sources import base_of_digest
from loramgr.workspace.weights import Weights

__all__ = ["compare_adapters", "compare_models"]

_Item = TypeVar("_Item")


def compare_adapters(
    home: Home, adapters: tuple[Adapter, Adapter], base: str | None, *, spectrum: bool
) -> tuple[list[ModuleDifference], list[str]]:
    """Compare every parameter that one of the adapters updates; return the figures by name, and notes for a person.

    `base` is the digest of theirs, None where they say nothing. Its weights are read only for what is no product of
    factors alone; where they are not at hand, such figures are None and a note says why. Raises IncompatibleError
    where no parameter is in common.
    """
    pairs = [Pair(name, a, b) for name, (a, b) in aligned(adapters).items()]
    if not any(len(pair.updates) == 2 for pair in pairs):
        names = " and ".join(min(map(module_name, adapter.updates), default="nothing") for adapter in adapters)
        foreign = any(each.naming is not None and each.naming.is_needed for each in adapters)
        hint = "loramgr bind both to their base, whose names they then have" if foreign else None
        raise IncompatibleError(f"the adapters update no module in common; for example {names}", hint)
    needy = [pair for pair in pairs if needs_weight(pair)]
    weights, notes = (None, []) if not needy else _weights(home, adapters, base)
    with loading_torch():
        found = _mapped(home, lambda pair: compare(pair, weights, spectrum=spectrum), pairs)
    blank = [each.name for each in found if each.norm_a is None and each.status != "same"]
    if blank and not notes:
        notes = [f"{_listed(blank)}: tensors of different shapes have no distance"]
    return found, notes


def compare_models(home: Home, models: tuple[Checkpoint, Checkpoint]) -> tuple[list[ModuleDifference], list[str]]:
    """Compare every tensor of two models; return the figures by name, and notes for a person.

    Raises IncompatibleError where no tensor of one name has the same shape in both.
    """
    first, second = (dict(each.tensors) for each in models)
    others = {target: second[name] for name, target in renamed(second, first).items()}
    if not any(name in others and others[name].spec.shape == view.spec.shape for name, view in first.items()):
        raise IncompatibleError(f"{models[0].path} and {models[1].path} have no tensor of one name and shape in common")
    _keep_ties(models, (first, others))
    pairs = [(name, first.get(name), others.get(name)) for name in sorted(first.keys() | others.keys())]
    same = models[0] is models[1]
    with loading_torch():
        found = _mapped(home, lambda pair: _compare_tensors(*pair, same=same), pairs)
    blank = [each.name for each in found if each.distance is None]
    return found, [f"{_listed(blank)}: different shapes, or NaN or infinite values: no figures"] if blank else []


def _weights(home: Home, adapters: Sequence[Adapter], base: str | None) -> tuple[Weights | None, list[str]]:
    """Open the adapters' base, None where it is not at hand; a note says so."""
    try:
        digest = base or next(
            (found.digest for each in adapters if (found := match_base(home, each, None, force=True)).digest), None
        )
        if digest is not None:
            return Weights(base_of_digest(home, digest), adapters), []
        why, hint = "the adapters do not say which base they belong to", "loramgr base add PATH"
    except LoramgrError as error:
        why, hint = error.message, error.hint or ""
    said = "what an adapter replaces or decomposes (DoRA) can be measured only against the base"
    return None, [f"{said}, and {why}" + (f"; {hint}" if hint else "")]


def _mapped(
    home: Home, compared: Callable[[_Item], ModuleDifference], items: Sequence[_Item]
) -> list[ModuleDifference]:
    """Compare in as many threads as the home allows, with a bar where it takes long; the order is that of the items."""
    from tqdm import tqdm

    disable = None if home.progress else True  # None: a bar on terminals only
    with ThreadPoolExecutor(max_workers=max(1, home.jobs)) as pool:
        pending = [pool.submit(compared, item) for item in items]
        bar: Iterable[Any] = tqdm(pending, desc="compare", delay=1, file=sys.stderr, disable=disable)
        try:
            return [future.result() for future in bar]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _keep_ties(models: Sequence[Checkpoint], views: Sequence[dict[str, TensorView]]) -> None:
    """Give a model the tied name that its file leaves out, where the other's file has it."""
    for model, own, other in ((models[0], views[0], views[1]), (models[1], views[1], views[0])):
        for group in tied_groups(model.config, list(own), model.aliases):
            for name in group.tied:
                if name in other and name not in own and group.source in own:
                    own[name] = own[group.source]


def _compare_tensors(name: str, a: TensorView | None, b: TensorView | None, *, same: bool) -> ModuleDifference:
    import math

    from loramgr.algebra.effects import Whole, effect_distances
    from loramgr.workspace.weights import oriented

    status = "added" if a is None else "removed" if b is None else "changed"
    blank = ModuleDifference(name, status, "tensor")
    first = None if a is None else oriented(a.load(), transposed=False)
    second = first if same else None if b is None else oriented(b.load(), transposed=False)
    if first is not None and second is not None and first.shape != second.shape:
        return blank
    known = first if first is not None else second
    assert known is not None
    sides = [None if each is None else Whole(each) for each in (first, second)]
    found = effect_distances(sides[0], sides[1], known.new_zeros(()).expand(known.shape))
    if not all(map(math.isfinite, (found.norm_a, found.norm_b, found.distance))):
        return blank
    return replace(
        blank,
        status="same" if status == "changed" and found.distance == 0 else status,
        norm_a=found.norm_a,
        norm_b=found.norm_b,
        distance=found.distance,
        relative_distance=found.relative_distance,
        cosine=found.cosine,
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
