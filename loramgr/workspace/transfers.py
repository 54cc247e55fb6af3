"""What a push and a pull have in common: many adapters at once, and one error that tells of all that failed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

from loramgr.errors import LoramgrError
from loramgr.records import TransferReport
from loramgr.workspace.home import Home

__all__ = ["Failures", "Moved", "bar", "tried"]

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Moved:
    """What was moved of one adapter, or of several; as in `TransferReport`."""

    transferred: int = 0
    skipped: int = 0
    bytes: int = 0
    entries: int = 0
    versions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.transferred + other.transferred,
            self.skipped + other.skipped,
            self.bytes + other.bytes,
            self.entries + other.entries,
            (*self.versions, *other.versions),
            (*self.notes, *other.notes),
        )

    def report(self, remote: str) -> TransferReport:
        """Return this as a record."""
        counts = (self.transferred, self.skipped, self.bytes)
        return TransferReport(remote, *counts, [*self.versions], self.entries, [*self.notes])


@dataclass
class Failures:
    """The adapters that failed, while the others went on."""

    total: int
    errors: dict[str, LoramgrError] = field(default_factory=dict)

    def check(self, what: str) -> None:
        """Raise an error of the first failure's kind that tells all of them, the only one as it is."""
        if not self.errors:
            return
        first = next(iter(self.errors.values()))
        if self.total == 1:
            raise first
        told = "".join(f"\n{name}: {error.message}" for name, error in self.errors.items())
        raise type(first)(f"{len(self.errors)} of {self.total} adapters were not {what}:{told}", first.hint)


def tried(work: Callable[[Item], Result], item: Item) -> Result | LoramgrError:
    """Return what the work gives, or the error that it ended with."""
    try:
        return work(item)
    except LoramgrError as error:
        return error


def bar(home: Home, what: str, total: int) -> tqdm[Sequence[object]]:
    """Return a bar for that many bytes, shown on a terminal when it takes longer than a second."""
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, delay=1, file=sys.stderr,
        disable=None if home.progress else True,
    )  # fmt: skip
