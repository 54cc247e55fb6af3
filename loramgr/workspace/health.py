"""Use cases about the catalog as a whole: its schema, and making it again from the logs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loramgr.catalog import schema
from loramgr.catalog.rebuild import rebuild
from loramgr.log import Entry
from loramgr.records import RebuildReport, SchemaReport
from loramgr.store.locks import locked
from loramgr.store.store import Store
from loramgr.workspace.home import Home, catalog_path

__all__ = ["counting_entries", "current_schema", "entries_of", "rebuild_catalog", "upgrade_schema"]


def current_schema(home: Path) -> SchemaReport:
    """Return the schema revision of the home's catalog, None where there is none yet, and the newest one."""
    return SchemaReport(schema.current(catalog_path(home)), schema.HEAD_REVISION)


def upgrade_schema(home: Path) -> SchemaReport:
    """Bring the catalog to the newest schema, or make an empty one in a new home."""
    if (catalog_path(home)).exists():
        schema.upgrade(catalog_path(home))
    else:
        Home.open(home, jobs=1, progress=False)
    return current_schema(home)


def rebuild_catalog(home: Path) -> RebuildReport:
    """Make the catalog anew from the log entries of the store; the old one stays when an entry is damaged."""
    store = Store.open(home / "store")
    with locked(store.root):
        return rebuild(catalog_path(home), store.uuid, counting_entries(store))


def counting_entries(store: Store) -> Iterator[Entry]:
    """Yield the log entries that a new catalog counts: all but those of a group that did not arrive as a whole."""
    left_out = store.groups.incomplete(store.entries)
    return (entry for entry in entries_of(store) if entry.digest not in left_out)


def entries_of(store: Store) -> Iterator[Entry]:
    """Yield every log entry of the store, each checked against its digest."""
    for digest in store.entries.digests():
        yield Entry.decode(store.entries.get(digest))
