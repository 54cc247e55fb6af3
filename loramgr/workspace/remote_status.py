"""Use cases that tell what is at a remote, and how it compares with what is here."""

from __future__ import annotations

from collections.abc import Sequence

from loramgr.catalog.chains import follow
from loramgr.errors import NotFoundError
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.records import RemoteStatus, RemoteVersionRecord
from loramgr.remotes.protocol import RemoteLog
from loramgr.workspace.branches import Branch
from loramgr.workspace.home import Home
from loramgr.workspace.promises import files_of_entry
from loramgr.workspace.remote_logs import compare, known_entries, local_log, log_of_root
from loramgr.workspace.remotes import resolve

__all__ = ["list_adapters", "remote_status"]


def list_adapters(home: Home, remote: str | None) -> list[RemoteVersionRecord]:
    """Return the adapters at a remote by their newest versions, sorted by name; those without one are left out."""
    place = resolve(home, remote)
    records = [_described(home, log) for log in place.open(home.jobs).logs(known_entries(home))]
    return sorted((record for record in records if record is not None), key=lambda record: record.name)


def remote_status(home: Home, remote: str | None, names: Sequence[str]) -> list[RemoteStatus]:
    """Return how adapters here and at a remote compare, of the names given or of all; sorted by name.

    Raises NotFoundError for a name that is in neither place.
    """
    place = resolve(home, remote)
    rows: dict[str, RemoteStatus] = {}
    with home.catalog.reading() as reader:
        left = reader.adapters()
        for log in place.open(home.jobs).logs(known_entries(home)):
            here = log_of_root(home, reader, log.entries[0].digest) or local_log(home, reader, log.name)
            name = here[-1].name if here else log.name
            left.pop(name, None)
            found = compare(here, log)
            counts = (len(found.ahead), len(found.behind))
            rows[name] = RemoteStatus(name, found.state, *counts, [*log.heads], place.label)
        for name in left:
            ahead = len(local_log(home, reader, name))
            rows[name] = RemoteStatus(name, "here", ahead, 0, [], place.label)
    for name in names:
        if name not in rows:
            raise NotFoundError(f"there is no adapter {name!r}, neither here nor at {place.label}", "loramgr list")
    return [rows[name] for name in sorted(rows) if not names or name in names]


def _described(home: Home, log: RemoteLog) -> RemoteVersionRecord | None:
    """Return an adapter at a remote by its newest version, of the branch that counts; None where it has none."""
    chain = _counting(log)
    versions = live(chain)
    if not versions:
        return None
    newest = versions[-1].content
    summary = newest["summary"]
    return RemoteVersionRecord(
        name=log.name,
        version=newest["number"],
        digest=newest["version"],
        base=summary["base"],
        method=summary["method"],
        bytes=summary["bytes"],
        versions=len(versions),
        tags=[f"{tag}@v{number}" for tag, number in sorted(Branch(chain).tags.items())],
        message=newest["message"],
        created_at=versions[-1].time,
        here=home.store.holds(newest["version"], files_of_entry(versions[-1])),
    )


def _counting(log: RemoteLog) -> list[Entry]:
    return follow(log.entries).logs[0]
