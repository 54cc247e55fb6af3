"""Makes a catalog from log entries: the empty one, the one after damage, and the one that `verify` compares with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, insert

from loramgr.catalog import schema
from loramgr.catalog.chains import Chains, follow
from loramgr.catalog.engine import WRITE, explained, open_engine, transaction
from loramgr.catalog.fold import apply, name_log
from loramgr.catalog.tables import Workspace
from loramgr.durable import appear, sync_folder
from loramgr.errors import IntegrityError
from loramgr.log import Entry
from loramgr.records import RebuildReport
from loramgr.temporary import temporary_folder

__all__ = ["build", "fold", "rebuild"]


def rebuild(path: Path, uuid: str, entries: Iterable[Entry]) -> RebuildReport:
    """Make the catalog anew from all log entries of the store and put it in the place of the old one, if any.

    The old catalog is locked meanwhile, so `entries` should be read lazily: what was committed before is then among
    them. Raises IntegrityError when a predecessor is missing or an entry makes no sense, ConflictError when another
    process holds the catalog; then the old one stays.
    """
    with _locked(path):
        return build(path, uuid, entries, replace=True)


def build(path: Path, uuid: str, entries: Iterable[Entry], *, replace: bool) -> RebuildReport:
    """Make a catalog beside its place and let it appear there whole; without `replace`, only if nothing is there."""
    with temporary_folder(path.parent, schema.TEMPORARY) as folder:
        built = folder / path.name
        engine = open_engine(built, create=True)
        with explained(path), engine.connect() as connection, connection.begin():
            schema.migrate(connection)
            report = fold(connection, uuid, entries)
        _appear(built, path, replace=replace)
    return report


def fold(connection: Connection, uuid: str, entries: Iterable[Entry]) -> RebuildReport:
    """Apply all entries to an empty catalog, log by log, then give the logs the names of their newest entries."""
    connection.execute(insert(Workspace).values(uuid=uuid))
    chains: Chains = follow(entries)
    heads: list[tuple[str, str]] = []
    for log in chains.logs:
        for entry in log:
            root = apply(connection, entry)
        heads.append((root, log[-1].name))
    for root, name in heads:
        name_log(connection, root, name)
    return RebuildReport(sum(map(len, chains.logs)), len(chains.logs), chains.forks)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the write lock of the catalog that is there; an absent or damaged one has none that anybody could hold."""
    with ExitStack() as stack:
        locked = False
        if path.exists() and path.stat().st_size:
            with suppress(IntegrityError):
                stack.enter_context(transaction(open_engine(path), WRITE, path))
                locked = True
        if not locked:
            _journal(path).unlink(missing_ok=True)  # SQLite would roll it into the new catalog
        yield


def _appear(built: Path, path: Path, *, replace: bool) -> None:
    if replace:
        built.replace(path)
    elif _journal(path).exists() and not path.exists():  # in this order: another process may be making it
        raise IntegrityError(f"{path}: the catalog is gone, but its journal is there", "loramgr db rebuild")
    else:
        appear(built, path)
    sync_folder(path.parent)


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")
