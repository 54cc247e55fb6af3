"""The catalog of a workspace: opened against its store, read and written in transactions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, select

from loramgr.catalog import schema
from loramgr.catalog.engine import BUSY_SECONDS, READ, WRITE, open_engine, transaction
from loramgr.catalog.fold import apply, name_log
from loramgr.catalog.reader import Reader
from loramgr.catalog.tables import EntryRow, Log, Workspace
from loramgr.errors import ConflictError, IntegrityError
from loramgr.log import Entry

__all__ = ["Catalog", "Writer"]


class Writer(Reader):
    """A view of the catalog that can move heads; nothing it does counts before its transaction ends."""

    def append(self, entry: Entry) -> None:
        """Append an entry to its log and update the rows.

        The entry has to be in the store before the transaction ends, not before this call: an entry that is refused
        here is best never stored. Raises ConflictError when the log has moved on or the name is taken, IntegrityError
        when the entry does not make sense after its predecessor.
        """
        entry = Entry.decode(entry.encode())  # what a rebuild will read: keys in canonical order, 1.0 as 1
        self._check_head(entry)
        root = apply(self._connection, entry)
        name_log(self._connection, root, entry.name)

    def _check_head(self, entry: Entry) -> None:
        if self._connection.scalar(select(EntryRow.digest).where(EntryRow.digest == entry.digest)):
            raise ConflictError(f"the log of {entry.log} {entry.name!r} has this entry", "run the command again")
        if entry.predecessor is None:
            return
        if self._connection.scalar(select(Log.root).where(Log.head == entry.predecessor)) is None:
            raise ConflictError(f"the log of {entry.log} {entry.name!r} has moved on", "run the command again")


class Catalog:
    """An existing catalog with the newest schema, paired with its store."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine

    @classmethod
    def open(cls, path: Path, uuid: str, *, busy_seconds: float = BUSY_SECONDS) -> Catalog:
        """Open the catalog of the store with that UUID; an empty one is made where there is none.

        Opening an existing one writes nothing. `busy_seconds` is how long a transaction waits for other processes.
        Raises IncompatibleError for another schema than ours, IntegrityError for a damaged catalog or one of another
        store, and OSError where an absent one cannot be made.
        """
        if not path.exists():
            from loramgr.catalog.rebuild import build

            build(path, uuid, (), replace=False)
        catalog = cls(path, open_engine(path, busy_seconds=busy_seconds))
        with transaction(catalog._engine, READ, path) as connection:
            schema.check(schema.revision_of(connection), path)
            owner = connection.scalar(select(Workspace.uuid))
        if owner != uuid:
            raise IntegrityError(f"{path}: the catalog belongs to another store", "loramgr db rebuild")
        return catalog

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Open a consistent view for the block; ConflictError when a writer holds the catalog for too long."""
        with transaction(self._engine, READ, self.path) as connection:
            yield Reader(connection)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Open the catalog for writing; the block's end is the acknowledgement, an exception rolls everything back.

        Raises ConflictError when another process writes for too long or has replaced the catalog.
        """
        with transaction(self._engine, WRITE, self.path) as connection:
            yield Writer(connection)
