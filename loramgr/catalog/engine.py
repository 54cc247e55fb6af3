"""SQLite connections and transactions, and what their failures mean to a person.

Rollback journal, `synchronous=EXTRA`, foreign keys enforced, every transaction opened explicitly: SQLite's driver would
otherwise begin late and commit before schema changes. EXTRA also syncs the folder after the journal is deleted; with
FULL a power cut can bring the journal back, and it would undo a commit that was acknowledged.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, ExceptionContext, NullPool, create_engine, event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.util import LRUCache

from loramgr.errors import ConflictError, IntegrityError, LoramgrError, UncheckedError

__all__ = ["BUSY_SECONDS", "READ", "WRITE", "explained", "in_transaction", "open_engine", "suspected", "transaction"]

BUSY_SECONDS = 60.0
CACHE_KIB = 1 << 16  # of changed pages that do not fit into it SQLite writes some early, and locks out the readers
READ = "BEGIN"
WRITE = "BEGIN IMMEDIATE"
_BEGIN = "loramgr_begin"
_STATEMENTS = 500  # compiled ones that are kept; SQLAlchemy keeps as many for each engine


class CatalogDialect(SQLiteDialect_pysqlite):
    """SQLite's dialect, each equal to every other: what was compiled for one catalog serves all of the process."""

    supports_statement_cache = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CatalogDialect)

    def __hash__(self) -> int:
        return hash(CatalogDialect)


registry.register("sqlite.loramgr", __name__, CatalogDialect.__name__)
_compiled: LRUCache[Any, Any] = LRUCache(_STATEMENTS)


def open_engine(
    path: Path | None, *, busy_seconds: float = BUSY_SECONDS, foreign_keys: bool = True, create: bool = False
) -> Engine:
    """Return an engine for a catalog file, or for an empty catalog in memory where the path is None.

    A missing file is made only with `create`. A transaction waits `busy_seconds` for another process before it fails.
    Migrations work with `foreign_keys` off, because rebuilding a parent table would delete its children's rows.
    """

    def connect() -> sqlite3.Connection:
        uri = "file::memory:" if path is None else f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        connection = sqlite3.connect(uri, uri=True, timeout=busy_seconds, isolation_level=None)
        enforced = f"foreign_keys={'ON' if foreign_keys else 'OFF'}"
        with _readable_words(path):
            for pragma in ("journal_mode=DELETE", "synchronous=EXTRA", f"cache_size=-{CACHE_KIB}", enforced):
                connection.execute(f"PRAGMA {pragma}").close()
        return connection

    def reword(context: ExceptionContext) -> None:
        with _readable_words(path):
            if isinstance(context.original_exception, UnicodeDecodeError):
                raise context.original_exception

    compiled = {"compiled_cache": _compiled}
    engine = create_engine("sqlite+loramgr://", creator=connect, poolclass=NullPool, execution_options=compiled)
    event.listen(engine, "begin", _begin)
    event.listen(engine, "handle_error", reword)
    return engine


@contextmanager
def _readable_words(path: Path | None) -> Iterator[None]:
    """Raise IntegrityError where the driver fails over SQLite's own words: they quote a damaged schema."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _damaged(path or Path(":memory:")) from error


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, READ))


def in_transaction(connection: Connection) -> bool:
    """Say whether SQLite itself is in a transaction: it ends one unasked where it cannot write."""
    return bool(getattr(connection.connection.dbapi_connection, "in_transaction", False))


@contextmanager
def transaction(engine: Engine, begin: str, path: Path) -> Iterator[Connection]:
    """Run the block in one transaction, READ or WRITE; commit at its end, roll back when it raises.

    Raises the errors of `explained`, and ConflictError when the file was replaced while we waited for its lock.
    """
    before = path.stat()
    with explained(path), engine.connect() as plain:
        connection = plain.execution_options(**{_BEGIN: begin})
        with connection.begin():
            if begin == WRITE and not os.path.samestat(before, path.stat()):
                raise ConflictError(f"{path}: the catalog was replaced meanwhile", "run the command again")
            yield connection


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's failures in the block into errors for a person; other database errors pass as they are.

    Raises ConflictError for a lock that did not come free, IntegrityError for a damaged file, UncheckedError for one
    that cannot be opened or read, LoramgrError for a read-only or full file system.
    """
    try:
        yield
    except DBAPIError as error:
        failure = _failure(error.orig, path)
        if failure is None:
            raise
        raise failure from error
    except sqlite3.Error as error:
        failure = _failure(error, path)
        if failure is None:
            raise
        raise failure from error


@contextmanager
def suspected(path: Path) -> Iterator[None]:
    """Take whatever goes wrong in the block, in which nothing but rows is read, for damage: raise IntegrityError."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, ValueError, TypeError, LookupError) as error:
        words = str(error).splitlines()[0]
        raise IntegrityError(f"{path}: the catalog is damaged: {words}", "loramgr verify --repair") from error


def _failure(error: BaseException | None, path: Path) -> LoramgrError | None:
    code = getattr(error, "sqlite_errorcode", None)  # absent for errors of the driver itself
    if str(error).startswith(_SIGNS):
        return _damaged(path)
    explain = _FAILURES.get(code & 0xFF) if isinstance(code, int) else None
    return explain(path) if explain else None


# of a schema that is not the one its revision names
_SIGNS = ("Could not decode to UTF-8", "no such table", "no such column", "malformed database schema")


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(f"{path}: the catalog is damaged", "loramgr db rebuild")


_FAILURES: dict[int, Callable[[Path], LoramgrError]] = {
    sqlite3.SQLITE_BUSY: lambda path: ConflictError(
        f"{path}: another process holds the catalog", "run the command again when it is done"
    ),
    sqlite3.SQLITE_READONLY: lambda path: LoramgrError(f"{path}: the catalog is read-only, nothing was changed"),
    sqlite3.SQLITE_FULL: lambda path: LoramgrError(f"{path}: no space left for the catalog, nothing was changed"),
    sqlite3.SQLITE_IOERR: lambda path: UncheckedError(f"{path}: the catalog cannot be read or written"),
    sqlite3.SQLITE_CANTOPEN: lambda path: UncheckedError(f"{path}: the catalog cannot be opened"),
    sqlite3.SQLITE_CORRUPT: _damaged,
    sqlite3.SQLITE_NOTADB: _damaged,
}
