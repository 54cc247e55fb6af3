"""Use cases that tell what is at a remote, and how it compares with what is here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loramgr.errors import LoramgrError, NotFoundError
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.records import RemoteStatus, RemoteVersionRecord
from loramgr.remotes.protocol import DamagedLogs, RemoteLog
from loramgr.workspace.branches import Branch
from loramgr.workspace.home import Home
from loramgr.workspace.promises import files_of_entry
from loramgr.workspace.remote_logs import chain_to, compare, favourite, known_entries, local_log, log_of_root
from loramgr.workspace.remotes import Place, resolve

__all__ = ["list_adapters", "remote_status"]


Damage = dict[str, LoramgrError]


def list_adapters(home: Home, remote: str | None, damage: Damage | None = None) -> list[RemoteVersionRecord]:
    """Return the adapters at a remote by their newest versions, sorted by name; those without one are left out.

    What is wrong with logs that cannot be read is put into `damage`, by name; None raises it.
    """
    place = resolve(home, remote)
    records = [_described(home, log) for log in _logs(home, place, damage)]
    return sorted((record for record in records if record is not None), key=lambda record: record.name)


def remote_status(
    home: Home, remote: str | None, names: Sequence[str], damage: Damage | None = None
) -> list[RemoteStatus]:
    """Return how adapters here and at a remote compare, of the names given or of all; sorted by name.

    Raises NotFoundError for a name that is in neither place; `damage` as for `list_adapters`.
    """
    place = resolve(home, remote)
    rows: dict[str, RemoteStatus] = {}
    damage, told = {}, damage
    with home.catalog.reading() as reader:
        left = reader.adapters()
        for log in _logs(home, place, damage):
            here = log_of_root(home, reader, log.entries[0].digest) or local_log(home, reader, log.name)
            name = here[-1].name if here else log.name
            left.pop(name, None)
            found = compare(here, log)
            counts = (len(found.ahead), len(found.behind))
            rows[name] = RemoteStatus(name, found.state, *counts, [*log.heads], place.label)
        for name in left.keys() - damage.keys():
            ahead = len(local_log(home, reader, name))
            rows[name] = RemoteStatus(name, "here", ahead, 0, [], place.label)
    meant = {name: error for name, error in damage.items() if not names or name in names}
    if told is None and meant:
        raise DamagedLogs(meant)
    if told is not None:
        told.update(meant)
    for name in names:
        if name not in rows and name not in damage:
            raise NotFoundError(f"there is no adapter {name!r}, neither here nor at {place.label}", "loramgr list")
    return [rows[name] for name in sorted(rows) if not names or name in names]


def _logs(home: Home, place: Place, damage: Damage | None) -> Iterator[RemoteLog]:
    try:
        yield from place.open(home.jobs).logs(known_entries(home))
    except DamagedLogs as error:
        if damage is None:
            raise
        damage.update(error.errors)


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
    return favourite([chain_to(log, head) for head in log.heads])
