"""How a format says that files are its own, and what it saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loramgr.adapter import Adapter
from loramgr.formats.files import AdapterFiles
from loramgr.formats.hints import ReadHints

__all__ = ["Detector", "Evidence", "counted"]

_MANY = 3


@dataclass(frozen=True, slots=True)
class Evidence:
    """A format that recognises an adapter's files by what they hold.

    `dialect` is the writer's own spelling where a format has several, None where it has one; `sentences` say what was
    seen; `read` reads the files.
    """

    format: str
    dialect: str | None
    sentences: tuple[str, ...]
    read: Callable[[AdapterFiles, ReadHints], Adapter]


Detector = Callable[[AdapterFiles], Evidence | None]


def counted(names: list[str], what: str) -> str:
    """Return a sentence that counts tensors of a kind and names the first of them."""
    some = ", ".join(sorted(names)[:_MANY])
    more = ", …" if len(names) > _MANY else ""
    return f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}: {some}{more}"
