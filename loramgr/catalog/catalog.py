"""The catalog of a workspace: opened against its store, read and written in transactions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, select

from loramgr.catalog import schema, statements
from loramgr.catalog.engine import BUSY_SECONDS, READ, WRITE, in_transaction, open_engine, suspected, transaction
from loramgr.catalog.fold import apply, name_log
from loramgr.catalog.joining import join, swap
from loramgr.catalog.reader import Reader
from loramgr.catalog.tables import Workspace
from loramgr.errors import ConflictError, IntegrityError
from loramgr.log import Entry

__all__ = ["Catalog", "Writer"]


class Writer(Reader):
    """A view of the catalog that can move heads; nothing it does counts before its transaction ends.

    `appended` has the digests of the entries that were appended so far, in this order.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.appended: list[str] = []

    def append(self, entry: Entry) -> None:
        """Append an entry to its log and update the rows.

        The entry has to be in the store before the transaction ends, not before this call: an entry that is refused
        here is best never stored. Raises ConflictError when the log has moved on or the name is taken, IntegrityError
        when the entry does not make sense after its predecessor.
        """
        entry = entry.settled()  # what a rebuild will read
        self._check_head(entry)
        root = apply(self._connection, entry)
        name_log(self._connection, root, entry.name)
        self.appended.append(entry.digest)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Let the block fail alone: what it appended is taken back, and the transaction can go on."""
        before = len(self.appended)
        savepoint = self._connection.begin_nested()
        try:
            yield
            savepoint.commit()
        except BaseException:
            del self.appended[before:]
            if in_transaction(self._connection):  # when the disk is full, SQLite has rolled everything back by itself
                savepoint.rollback()
            raise

    def join(self, logs: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        """Append to each log the entries that are not here yet, and return these; see `loramgr.catalog.joining`."""
        new = join(self._connection, logs)
        self.appended += [entry.digest for log in new for entry in log]
        return new

    def swap(self, roots: Sequence[str], logs: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        """Put other logs in the place of those of these roots; see `loramgr.catalog.joining`.

        Returns the entries that were not here yet. The entries of the old logs stay in the store: what replaces them
        has to name them, or a rebuild brings them back.
        """
        new = swap(self._connection, roots, logs)
        self.appended += [entry.digest for log in new for entry in log]
        return new

    def _check_head(self, entry: Entry) -> None:
        if self._connection.execute(statements.ENTRY_OF_DIGEST, {"digest": entry.digest}).first() is not None:
            raise ConflictError(f"the log of {entry.log} {entry.name!r} has this entry", "run the command again")
        if entry.predecessor is None:
            return
        if self._connection.scalar(statements.LOG_OF_HEAD, {"digest": entry.predecessor}) is None:
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

    def waiting(self, seconds: float) -> Catalog:
        """Return the same catalog with another time to wait for other processes."""
        return Catalog(self.path, open_engine(self.path, busy_seconds=seconds))

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Open a consistent view for the block; ConflictError when a writer holds the catalog for too long."""
        with transaction(self._engine, READ, self.path) as connection:
            yield Reader(connection)

    def suspecting(self) -> AbstractContextManager[None]:
        """Take whatever goes wrong in a block that asks a reader for damage of the rows: IntegrityError."""
        return suspected(self.path)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Open the catalog for writing; the block's end is the acknowledgement, an exception rolls everything back.

        Raises ConflictError when another process writes for too long or has replaced the catalog.
        """
        with transaction(self._engine, WRITE, self.path) as connection:
            yield Writer(connection)
