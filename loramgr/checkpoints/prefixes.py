"""How the names of the model that was trained become the names of the base's file: one change of prefix."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from loramgr.errors import IncompatibleError

__all__ = ["Renaming", "find_renaming", "fitting_renamings"]

_OF_EXPERTS = (
    "name the base that the adapter was trained on; if its model has the experts in one tensor and its file has them "
    "apart, save it by save_pretrained(folder, save_original_format=False)"
)


@dataclass(frozen=True, slots=True)
class Renaming:
    """`dropped` at the front of a name becomes `added`; both are whole components with their dot, or empty."""

    dropped: str = ""
    added: str = ""

    def apply(self, name: str) -> str | None:
        """Return the name in the base's file, None for a name without the dropped prefix."""
        if not name.startswith(self.dropped):
            return None
        return self.added + name.removeprefix(self.dropped)


def find_renaming(required: Collection[str], names: Collection[str]) -> Renaming:
    """Find the one change of prefix with which every required name is among `names`.

    Names that fit as they are stay so; else as few leading components as possible are dropped. A layer's number is
    never dropped nor added: it says which layer is meant. Raises IncompatibleError when no change fits, or several do.
    """
    fitting = fitting_renamings(required, names)
    if not fitting:
        raise _unresolved(required, names)
    if len(fitting) > 1:
        name = min(required)
        raise IncompatibleError(
            f"{name} could be {fitting[0].apply(name)} or {fitting[1].apply(name)} of the base: ambiguous",
            "name the base that the adapter was trained on",
        )
    return fitting[0]


def fitting_renamings(required: Collection[str], names: Collection[str]) -> list[Renaming]:
    """Return the renamings that fit with the fewest dropped components: one, none, or several that compete."""
    known = frozenset(names)
    if all(name in known for name in required):
        return [Renaming()]
    for dropped in _droppable(required):
        fitting = sorted(_fitting(dropped, required, known), key=lambda renaming: renaming.added)
        if fitting:
            return fitting
    return []


def _droppable(required: Collection[str]) -> list[str]:
    """Prefixes that all the names share, shortest first, each leaving module and parameter."""
    shortest = min(required, key=lambda name: name.count("."))
    parts = shortest.split(".")
    prefixes = [""]
    for part in parts[:-2]:
        prefix = f"{prefixes[-1]}{part}."
        if part.isdigit() or not all(name.startswith(prefix) and name.count(".", len(prefix)) for name in required):
            break
        prefixes.append(prefix)
    return prefixes


def _fitting(dropped: str, required: Collection[str], known: frozenset[str]) -> Iterable[Renaming]:
    """Yield the renamings with this dropped prefix that bring every required name among the known ones."""
    rest = min(required).removeprefix(dropped)
    for name in known:
        if name == rest or name.endswith(f".{rest}"):
            renaming = Renaming(dropped, name.removesuffix(rest))
            numbered = any(part.isdigit() for part in renaming.added.split("."))
            if not numbered and all(renaming.apply(other) in known for other in required):
                yield renaming


def _unresolved(required: Collection[str], names: Collection[str]) -> IncompatibleError:
    missing = min(name for name in required if name not in names)
    module, _, leaf = missing.rpartition(".")
    close = difflib.get_close_matches(missing, [name for name in names if name.endswith(f".{leaf}")], 3, 0.5)
    nearest = f"; the closest names are {', '.join(close)}" if close else ""
    return IncompatibleError(
        f"the base has no module {module or missing} that the adapter updates{nearest}",
        _OF_EXPERTS if module.endswith("experts") else "name the base that the adapter was trained on",
    )
