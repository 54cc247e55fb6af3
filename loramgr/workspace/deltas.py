"""Adapters side by side: which of their updates are of one parameter, and the deltas as matrices in two factors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from loramgr.adapter import Adapter, LowRank, Update
from loramgr.checkpoints.prefixes import Renaming
from loramgr.errors import IncompatibleError

if TYPE_CHECKING:
    from loramgr.algebra.lowrank import Product

__all__ = ["aligned", "product_of", "renamed"]


def product_of(update: LowRank, device: str = "cpu") -> Product:
    """Return scaling · lora_B lora_A, (out, in) or with the kernel flattened (out, in·k), of an embedding (dim, vocab).

    Raises IncompatibleError, naming the tensor, where this is not the whole update (DoRA's magnitude, or a table that
    takes the parameter's place first, projections shared by layers of several sizes, slices of a fused weight), and for
    NaN or infinite values.
    """
    from loramgr.algebra.finite import all_finite
    from loramgr.algebra.lowrank import Product

    if update.shared:
        raise IncompatibleError(
            f"{update.lora_A.spec.name}: how much of the shared projections the layer takes only the base says",
            "register the base and tie the adapter to it with loramgr bind",
        )
    if update.magnitude is not None:
        raise IncompatibleError(f"{update.magnitude.spec.name}: the delta of DoRA depends on the base's weights")
    if update.table is not None:
        raise IncompatibleError(f"{update.table.spec.name}: the adapter replaces the whole parameter before its delta")
    if update.lora_A.spec.shape[0] != update.lora_B.spec.shape[1]:
        raise IncompatibleError(
            f"{update.lora_A.spec.name}: which slices of the fused weight the factors are for only the base says",
            "register the base and tie the adapter to it with loramgr bind",
        )
    lora_A, lora_B = update.lora_A.load().flatten(1), update.lora_B.load().flatten(1)
    for tensor, view in ((lora_B, update.lora_B), (lora_A, update.lora_A)):
        if not (all_finite(tensor) and math.isfinite(update.scaling)):
            raise IncompatibleError(f"{view.spec.name} holds NaN or infinite values, or its scaling is one")
    return Product.of(lora_B, lora_A, update.scaling, device)


def aligned(adapters: Sequence[Adapter]) -> dict[str, list[Update | None]]:
    """Return every parameter's updates in the order of the adapters, None where one lacks the parameter; sorted.

    Names are those of the first adapter that has the parameter; where a later one writes all of its modules with
    another prefix (`bert.encoder…` for `encoder…`), its names are changed into theirs. Raises IncompatibleError,
    naming one, where several changes of prefix find modules, or one makes a single name of two.
    """
    found: dict[str, list[Update | None]] = {}
    for position, adapter in enumerate(adapters):
        for name, target in renamed(adapter.updates, found).items():
            found.setdefault(target, [None] * len(adapters))[position] = adapter.updates[name]
    return dict(sorted(found.items()))


def renamed(names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Return each name's spelling among the known names, its own for one that is not among them; see `aligned`."""
    renaming = _renaming(names, known)
    targets = {name: _target(name, renaming, known) for name in names}
    _refuse_merged(targets)
    return targets


def _target(name: str, renaming: Renaming, known: Collection[str]) -> str:
    """Return the known spelling of a name; one that the change of prefix is not for keeps its own."""
    renamed = renaming.apply(name)
    return name if renamed is None or (renamed not in known and name in known) else renamed


def _refuse_merged(targets: dict[str, str]) -> None:
    target, count = max(Counter(targets.values()).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        names = sorted(name for name, each in targets.items() if each == target)
        raise IncompatibleError(f"{names[0]} and {names[1]} are both {target} of the other adapter: ambiguous")


def _renaming(names: Collection[str], known: Collection[str]) -> Renaming:
    """Return the change of prefix that brings names among the known ones; none where that finds no module at all.

    Names that fit as they are stay so. Of several changes the one counts that fits all modules of either side.
    """
    modules, others = _comparable(_modules(names), _modules(known))
    if modules & others:
        return Renaming()
    found = sorted(_candidates(modules, others), key=lambda each: (each.dropped, each.added))
    fewest = min(len(modules), len(others))
    whole = [each for each in found if sum(each.apply(module) in others for module in modules) == fewest]
    chosen = whole or found
    if len(chosen) > 1:
        examples = (f"{module} as {each.apply(module)}" for each in chosen[:2] for module in [_example(each, modules)])
        raise IncompatibleError(f"two changes of prefix lead to the other adapter, {' and '.join(examples)}: ambiguous")
    return chosen[0] if chosen else Renaming()


def _modules(names: Collection[str]) -> set[str]:
    """Return the modules of the parameters that stand inside of a model: one without a dot stands beside it."""
    return {module for name in names if "." in (module := name.rpartition(".")[0])}


def _comparable(first: set[str], second: set[str]) -> tuple[set[str], set[str]]:
    """Return the modules of numbered layers, which heads beside the model cannot be, where both sides have some."""
    numbered = {name for name in first if _numbered(name)}, {name for name in second if _numbered(name)}
    return numbered if all(numbered) else (first, second)


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _candidates(modules: Collection[str], others: Collection[str]) -> set[Renaming]:
    """Return the changes of prefix that bring any module among the others, each module's with the fewest dropped."""
    prefixes: dict[str, set[str]] = {}
    for other in others:
        for added in _prefixes(other):
            prefixes.setdefault(other.removeprefix(added), set()).add(added)
    found: set[Renaming] = set()
    for module in modules:
        for dropped in _prefixes(module):
            rest = module.removeprefix(dropped)
            fitting = {Renaming(dropped, added) for added in prefixes.get(rest, ()) if _wraps(dropped, added)}
            if fitting:
                found |= fitting
                break
    return found


def _prefixes(module: str) -> list[str]:
    """Return what can be cut off a module's name, shortest first: never a layer's number, which says which it is."""
    found = [""]
    for part in module.split(".")[:-1]:
        if part.isdigit():
            break
        found.append(f"{found[-1]}{part}.")
    return found


def _wraps(dropped: str, added: str) -> bool:
    """Say whether one prefix holds all components of the other: an encoder is no decoder, but may lie in a model."""
    first, second = Counter(dropped.split(".")), Counter(added.split("."))
    return first <= second or second <= first


def _example(renaming: Renaming, modules: Collection[str]) -> str:
    return min(module for module in modules if module.startswith(renaming.dropped))
