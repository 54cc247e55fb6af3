"""Deletes from a remote over a key store what no log there refers to, safe against pushes at the same time.

A push writes what it brings, then entries, then looks again for what it had found there, and only then the head. So
this says first that it is at work, and then reads the logs: a push whose entries it does not see will see it.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice

from loramgr.errors import ConflictError
from loramgr.log import Entry
from loramgr.needs import Needs, mentioned, needs_of
from loramgr.remotes.layout import BLOBS, COLLECTING, LOGS, MANIFESTS, log_prefix, parse_content_key, parse_entry_key
from loramgr.remotes.parallel import each
from loramgr.remotes.presence import YOUNG
from loramgr.remotes.protocol import Collected, MissingThere, RemoteLog, StoredKey, mending
from loramgr.remotes.reading import LogReader

__all__ = ["collect"]

_AT_ONCE = 100_000


@dataclass(slots=True)
class _Needed:
    """What has to stay: blobs and manifests by digest, entries by name and digest."""

    contents: set[str] = field(default_factory=set)
    entries: set[tuple[str, str]] = field(default_factory=set)

    def add(self, needs: Needs) -> None:
        """Keep what these need."""
        self.contents |= needs.blobs.keys() | needs.manifests.keys()


def collect(reader: LogReader, grace: timedelta, *, dry_run: bool) -> Collected:
    """Delete the blobs, manifests and entries that no log needs and that were written before the grace began.

    Ages are told by the remote's own clock; no more than `_AT_ONCE` keys go in one run. Raises IntegrityError, and
    deletes nothing, when a log is not whole and sound; ConflictError when it took so long that pushes no longer wait
    for it.
    """
    key = f"{COLLECTING}{uuid.uuid4().hex}"
    with _announced(reader, None if dry_run else key) as now:
        needed = _needed(reader, now - grace)
        unneeded = (stored for stored in _unneeded(reader, needed) if stored.key != key)
        garbage = list(islice((stored for stored in unneeded if stored.modified <= now - grace), _AT_ONCE))
        if not dry_run:
            for _ in each(reader.jobs, lambda stored: _delete(reader, stored, now), garbage):
                pass
    return Collected(tuple(sorted(stored.key for stored in garbage)), sum(stored.size for stored in garbage))


@contextmanager
def _announced(reader: LogReader, key: str | None) -> Iterator[datetime]:
    """Say at the remote that a gc is at work, for the block, and give the time there; None says nothing."""
    if key is None:
        yield datetime.now(UTC)
        return
    reader.store.put_if_absent(key, b"{}")
    try:
        listed = (stored.modified for stored in reader.store.list(COLLECTING) if stored.key == key)
        yield next(listed, datetime.now(UTC))  # of a listing, as the ages that it is compared with
    finally:
        reader.store.delete(key)


def _needed(reader: LogReader, before: datetime) -> _Needed:
    _refuse_lost(reader, before)
    needed = _Needed()
    for log in reader.logs(lambda _: None):
        needed.entries.update((log.name, entry.digest) for entry in log.entries)
        for head in log.heads:
            needed.add(needs_of([_branch(log, head)]))
    for name, digest in _arriving(reader, needed, before):
        needed.entries.add((name, digest))
        needed.add(mentioned([reader.entry(name, digest)]))
    return needed


def _refuse_lost(reader: LogReader, before: datetime) -> None:
    """Refuse to go on where a log has old entries and no head: it got lost, or a push was cut long ago."""
    for name in reader.astray():
        listed = [stored for stored in reader.store.list(log_prefix(name)) if parse_entry_key(stored.key) is not None]
        if listed and all(stored.modified <= before for stored in listed) and reader.head(name) is None:
            url = reader.store.url
            raise MissingThere(
                f"{url}: the log {name!r} has entries there and no head",
                f"{mending(name, url)}; else loramgr remote delete {shlex.quote(url)} {name}",
            )


def _arriving(reader: LogReader, needed: _Needed, before: datetime) -> list[tuple[str, str]]:
    """Return the entries that no log has and that are young: their push may be about to make them count."""
    found = ((stored, parse_entry_key(stored.key)) for stored in reader.store.list(LOGS))
    return [place for stored, place in found if place and place not in needed.entries and stored.modified > before]


def _branch(log: RemoteLog, head: str) -> list[Entry]:
    by_digest = {entry.digest: entry for entry in log.entries}
    branch: list[Entry] = []
    following: str | None = head
    while following is not None:
        branch.append(by_digest[following])
        following = by_digest[following].predecessor
    return branch[::-1]


def _unneeded(reader: LogReader, needed: _Needed) -> Iterator[StoredKey]:
    """Yield what no log needs; what has no place in the layout is not this gc's, and neither are the heads."""
    for folder in (BLOBS, MANIFESTS):
        for stored in reader.store.list(folder):
            digest = parse_content_key(stored.key)
            if digest is not None and digest not in needed.contents:
                yield stored
    if reader.rule == "swapped":  # elsewhere an entry always counts, or somebody's branch may go on from it
        for stored in reader.store.list(LOGS):
            place = parse_entry_key(stored.key)
            if place is not None and place not in needed.entries:
                yield stored
    yield from reader.store.list(COLLECTING)


def _delete(reader: LogReader, stored: StoredKey, began: datetime) -> None:
    if datetime.now(UTC) - began > YOUNG / 2:
        raise ConflictError(f"{reader.store.url}: this gc has taken too long to be sure of what it saw", "run it again")
    reader.store.delete(stored.key)
