"""Names of a format that has its own, found among those of a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loramgr.adapter import Update
from loramgr.errors import IncompatibleError
from loramgr.tensorfile import TensorSpec

__all__ = ["known_name", "resolved_names"]


def resolved_names(
    updates: Mapping[str, Update],
    specs: Mapping[str, TensorSpec],
    rename: Callable[[str], str | None],
    change: Callable[[str, Update], Update],
) -> dict[str, Update]:
    """Return the updates by the base's names; `change` brings one into the base's layout.

    `rename` gives the name that transformers has for one of the format's, None for one it does not know; a prefix of
    the base's file, or one that it lacks, is taken into account. Raises IncompatibleError, naming the module, where the
    base has no such tensor, and where two become one.
    """
    resolved: dict[str, Update] = {}
    for name, update in updates.items():
        renamed = rename(name)
        found = None if renamed is None else known_name(renamed, specs)
        if found is None:
            raise IncompatibleError(
                f"the base has no module {(renamed or name).removesuffix('.weight')} that the adapter updates",
                "name the base that the adapter was trained on",
            )
        if found in resolved:
            raise IncompatibleError(f"{name}: two modules of the adapter are {found} of the base")
        resolved[found] = change(name, update)
    return resolved


def known_name(name: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """Return a parameter's name in the base: as it is, below one further prefix, or without its first component."""
    if name in specs:
        return name
    shorter = name.partition(".")[2]
    if shorter in specs and not shorter[:1].isdigit():
        return shorter
    found = [known for known in specs if known.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None
