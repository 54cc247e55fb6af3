"""Takes in logs from elsewhere: of two copies of one log the longer goes on, and two that differ are a conflict.

A log that was made anew after another one is swapped for that one as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, select, update

from loramgr.catalog.fold import apply, name_log
from loramgr.catalog.tables import EntryRow, Log, Table
from loramgr.digests import short
from loramgr.errors import ConflictError
from loramgr.forks import said_by
from loramgr.log import Entry

__all__ = ["join", "swap"]


def join(connection: Connection, logs: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
    """Append to each log the entries that the catalog lacks, and return these, log by log, in their order.

    Each log is given whole, from its first entry. Raises ConflictError when both sides went on from one entry, naming
    both heads, when a name is another log's, or when another log here would be set aside; IntegrityError when an entry
    makes no sense.
    """
    new = [list(log[_common(connection, log) :]) for log in logs]
    for log, entries in zip(logs, new, strict=True):
        _check_others(connection, log[0].digest, entries)
    heads: list[tuple[str, str]] = []
    for entries in filter(None, new):
        for entry in entries:
            root = apply(connection, entry)
        heads.append((root, entries[-1].name))
    roots = [root for root, _ in heads]
    connection.execute(update(Log).where(Log.root.in_(roots)).values(name=None))  # two logs may change names
    for root, name in heads:
        name_log(connection, root, name)
    return new


def swap(connection: Connection, roots: Sequence[str], logs: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
    """Forget the logs of these roots and take in others, each given whole, as `join` does.

    Returns the entries that the catalog lacked before.
    """
    known = {*connection.scalars(select(EntryRow.digest).where(EntryRow.root.in_(roots)))}
    for table in reversed(Table.metadata.sorted_tables):
        if "root" in table.columns:
            connection.execute(delete(table).where(table.columns["root"].in_(roots)))
    return [[entry for entry in entries if entry.digest not in known] for entries in join(connection, logs)]


def _check_others(connection: Connection, root: str, entries: Sequence[Entry]) -> None:
    """Refuse entries that say what another log here begins with: a rebuild could set that one aside."""
    said = {digest for entry in entries for digest in said_by(entry)}.difference(entry.digest for entry in entries)
    if not said:
        return
    for log in connection.execute(select(Log.root, Log.name).where(Log.root != root)):
        if log.root in said:
            raise ConflictError(
                f"the log of {entries[-1].log} {entries[-1].name!r} there says anew what {log.name!r} says here",
                "keep the one in a home of its own, and add its versions under another name",
            )


def _common(connection: Connection, log: Sequence[Entry]) -> int:
    """Return how many entries of the log are here already; ConflictError when it has others here."""
    rows = select(EntryRow.digest).where(EntryRow.root == log[0].digest).order_by(EntryRow.sequence)
    here = list(connection.scalars(rows))
    common = min(len(here), len(log))
    if here[:common] == [entry.digest for entry in log[:common]]:
        return common
    raise ConflictError(
        f"the log of {log[-1].log} {log[-1].name!r} went on in both places: here its head is {short(here[-1])}, "
        f"there {short(log[-1].digest)}",
        "keep the one in a home of its own, and add its versions under another name",
    )
