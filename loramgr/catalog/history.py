"""Which log entries there are, newest first, and which of them name a version as a parent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import Connection, and_, select

from loramgr.catalog.tables import EntryRow, Log, Parent, Version

__all__ = ["children_entries", "entries_by_adapter", "names_of_log", "newest_entries"]


def newest_entries(connection: Connection, root: str | None, limit: int | None) -> list[str]:
    """Return the digests of a log's entries, last first; of all logs, by time, where `root` is None.

    `limit` is the most there may be, None for all.
    """
    entries = select(EntryRow.digest).limit(limit)
    if root is None:
        order = (EntryRow.time.desc(), EntryRow.root, EntryRow.sequence.desc())
        return list(connection.scalars(entries.order_by(*order)))
    return list(connection.scalars(entries.where(EntryRow.root == root).order_by(EntryRow.sequence.desc())))


def entries_by_adapter(connection: Connection) -> dict[str, list[str]]:
    """Return the digests of the entries of each adapter's log, removed or not, first to last, by its name."""
    logs: defaultdict[str, list[str]] = defaultdict(list)
    rows = select(Log.name, EntryRow.digest).join(Log, Log.root == EntryRow.root).where(Log.kind == "adapter")
    for name, digest in connection.execute(rows.order_by(EntryRow.root, EntryRow.sequence)):
        logs[str(name)].append(digest)
    return dict(logs)


def names_of_log(connection: Connection, root: str) -> list[str]:
    """Return every name that a log has had, sorted."""
    return list(connection.scalars(select(EntryRow.name).where(EntryRow.root == root).distinct().order_by("name")))


def children_entries(connection: Connection, digest: str, references: Sequence[str]) -> list[str]:
    """Return the digests of the entries that published a version with one of these references as a parent.

    `digest` is the parent's version digest; versions that are removed by now count.
    """
    of_child = and_(Parent.root == Version.root, Parent.number == Version.number)
    children = select(Version.entry).join(Parent, of_child)
    return list(connection.scalars(children.where(Parent.digest == digest, Parent.ref.in_(references)).distinct()))
