"""Use case: take out of the store what no log refers to, in two steps that are at least a grace apart."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from loramgr.catalog import schema
from loramgr.catalog.chains import follow
from loramgr.catalog.reader import Reader
from loramgr.errors import IntegrityError
from loramgr.forks import set_aside
from loramgr.log import Entry
from loramgr.needs import Needs, mentioned, needs_of
from loramgr.records import GcReport
from loramgr.store import store as layout
from loramgr.store.blobs import BlobStore
from loramgr.store.locks import locked
from loramgr.store.store import Store
from loramgr.temporary import is_abandoned, sweep
from loramgr.workspace.health import entries_of
from loramgr.workspace.home import Home
from loramgr.workspace.promises import promised_versions

__all__ = ["collect"]

_REPAIR = "loramgr verify --repair"


@dataclass(frozen=True, slots=True)
class _Garbage:
    """What can go: log entries, each after those that follow it, manifests, blobs, and temporary files.

    `young` are the entries that do not count either, and are younger than the grace; `replaced` those that a rebase
    made anew.
    """

    entries: list[Entry]
    replaced: set[str]
    young: frozenset[str]
    manifests: list[str]
    blobs: list[str]
    temporary: list[Path]

    def files(self, store: Store) -> list[tuple[BlobStore, str]]:
        """Return each of the collections' files with its collection."""
        digests = ([entry.digest for entry in self.entries], self.manifests, self.blobs)
        return [(each, name) for each, names in zip(store.collections, digests, strict=True) for name in names]


def collect(home: Home, grace: timedelta, *, dry_run: bool) -> GcReport:
    """Move what no log refers to, and is older than the grace, into the trash; delete what was there for as long.

    What is referred to is told from the log entries in the store. Writers are kept away meanwhile; a dry run only
    tells. Raises IntegrityError, with nothing touched, when an entry is damaged, a log has a gap, or something that a
    log refers to is missing; UncheckedError when an entry cannot be read; ConflictError when writers take too long.
    """
    now = datetime.now(UTC)
    store = home.store
    with locked(store.root, exclusive=True):
        with home.catalog.reading() as reader:
            garbage = _survey(home, reader, time.time() - grace.total_seconds())
        batches = store.trash.taken_before(now - grace)
        files = garbage.files(store)
        old = [each for batch in batches for each in store.trash.contents(batch, store.collections)]
        report = GcReport(
            [*map(_named, files), *(f"temporary file {path.relative_to(home.path)}" for path in garbage.temporary)],
            _bytes(files) + sum(map(_size, garbage.temporary)),
            [*map(_named, old)],
            _bytes(old),
            [_note(entry, entry.digest in garbage.replaced) for entry in garbage.entries],
        )
        if not dry_run:
            for batch in batches:
                store.trash.purge(batch)
            _trash(store, garbage, now)
            store.groups.drop_settled(garbage.young)
    return report


def _survey(home: Home, reader: Reader, before: float) -> _Garbage:
    """Find what is older than `before` (seconds since 1970) and in no log; errors as in `collect`."""
    store = home.store
    entries = {entry.digest: entry for entry in entries_of(store)}
    known = {*reader.entry_digests()}
    strays = [entry for digest, entry in entries.items() if digest not in known]
    logs = _logs(reader, [_known(entries, digest) for digest in sorted(known)])
    _check_presence(store, needs_of(logs, promised_versions(store, logs)))
    needs = needs_of(logs)
    left = _left_by_a_kill(store, entries, strays, before)
    gone = {entry.digest for entry in left}
    staying = [entry for entry in strays if entry.digest not in gone]
    young = mentioned(staying)
    return _Garbage(
        left,
        set_aside(entries.values()),
        frozenset(entry.digest for entry in staying),
        _unneeded(store.manifests, needs.manifests.keys() | young.manifests.keys(), before),
        _unneeded(store.blobs, needs.blobs.keys() | young.blobs.keys(), before),
        [path for path in _temporary_files(home) if _is_left(path, before)],
    )


def _known(entries: dict[str, Entry], digest: str) -> Entry:
    try:
        return entries[digest]
    except KeyError as error:
        raise IntegrityError(f"log entry {digest} is missing from the store", _REPAIR) from error


def _logs(reader: Reader, entries: Sequence[Entry]) -> list[list[Entry]]:
    """Put the entries that count into their logs; IntegrityError unless these reach from the roots to the heads."""
    logs = follow(entries).logs
    if {log[0].digest: log[-1].digest for log in logs} != reader.heads() or sum(map(len, logs)) != len(entries):
        raise IntegrityError("the logs do not end where the catalog says that they end", _REPAIR)
    return logs


def _check_presence(store: Store, needs: Needs) -> None:
    for collection, digests in ((store.manifests, needs.manifests), (store.blobs, needs.blobs)):
        for digest in digests:
            if not collection.contains(digest):
                raise IntegrityError(f"{collection.kind} {digest} is missing from the store", _REPAIR)


def _left_by_a_kill(store: Store, entries: dict[str, Entry], strays: Sequence[Entry], before: float) -> list[Entry]:
    """Return the old ones of the entries that never came to count, each after those that follow it.

    One that a young entry follows stays with it. IntegrityError when one follows what is not there.
    """
    kept: set[str] = set()
    depths: dict[str, int] = {}
    for entry in strays:
        path = [entry]
        while (above := path[-1].predecessor) is not None:
            path.append(_known(entries, above))
        depths[entry.digest] = len(path)
        if store.entries.modified(entry.digest) > before:
            kept.update(each.digest for each in path)
    old = [entry for entry in strays if entry.digest not in kept]
    return sorted(old, key=lambda entry: (-depths[entry.digest], entry.digest))


def _unneeded(collection: BlobStore, needed: Iterable[str], before: float) -> list[str]:
    wanted = {*needed}
    return [digest for digest in collection.digests() if digest not in wanted and collection.modified(digest) <= before]


def _temporary_files(home: Home) -> list[Path]:
    """Return what commands work in: it goes with them, unless they are killed."""
    beside = [path for prefix in (layout.PREFIX, schema.TEMPORARY) for path in home.path.glob(f"{prefix}*")]
    return sorted([*beside, *(home.store.root / layout.SCRATCH).iterdir()])


def _is_left(path: Path, before: float) -> bool:
    try:
        return path.lstat().st_mtime <= before and (not path.is_dir() or is_abandoned(path))
    except FileNotFoundError:  # its command has come to its end
        return False


def _trash(store: Store, garbage: _Garbage, now: datetime) -> None:
    """Take out the entries one by one, so that none ever stays without the one that it follows; then what they name."""
    for entry in garbage.entries:
        store.trash.take(store.entries, [entry.digest], now)
    store.trash.take(store.manifests, garbage.manifests, now)
    store.trash.take(store.blobs, garbage.blobs, now)
    for path in garbage.temporary:
        sweep(path) if path.is_dir() else path.unlink(missing_ok=True)


def _named(file: tuple[BlobStore, str]) -> str:
    collection, digest = file
    return f"{collection.kind} {digest}"


def _bytes(files: Iterable[tuple[BlobStore, str]]) -> int:
    return sum(collection.size(digest) for collection, digest in files)


def _size(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder that are no second names of the store's."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.lstat().st_size for file in files if file.lstat().st_nlink == 1)


def _note(entry: Entry, replaced: bool) -> str:
    why = "was made anew by a rebase" if replaced else "never came to count"
    return f"log entry {entry.digest}: {entry.kind} of {entry.log} {entry.name} at {entry.time} {why}"
