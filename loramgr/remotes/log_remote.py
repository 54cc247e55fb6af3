"""A remote over a key store: logs, manifests and blobs under the keys of `layout`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Lock

from loramgr.digests import digest_bytes
from loramgr.errors import ConflictError, IncompatibleError, IntegrityError, NotFoundError
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.remotes.appending import Appender
from loramgr.remotes.collecting import collect
from loramgr.remotes.layout import (
    BLOBS,
    DESCRIPTION,
    LOGS,
    MANIFESTS,
    Description,
    Head,
    content_key,
    head_key,
    log_prefix,
)
from loramgr.remotes.mending import EntrySizes, entry_sizes, mend_log
from loramgr.remotes.presence import BlobPresence
from loramgr.remotes.protocol import Collected, KeyStore, KnownEntry, RemoteLog, StoredKey, VersionContent
from loramgr.remotes.proving import MANIFEST_LIMIT, parse_manifest
from loramgr.remotes.reading import LogReader, read_bounded
from loramgr.remotes.reviving import lost_log, read_description, restore_head, revive_description

__all__ = ["LogRemote"]


class LogRemote:
    """A `Remote` over a `KeyStore`; several threads may use one. `jobs` is how many requests it makes at once."""

    def __init__(self, store: KeyStore, jobs: int = 8) -> None:
        self._store = store
        self._jobs = jobs
        self._lock = Lock()
        self._description: Description | None = None
        self._presence = BlobPresence(store, jobs)
        self._manifests = BlobPresence(store, jobs, MANIFESTS)
        self._listed = False
        self._entry_sizes: EntrySizes | None = None
        self._appended: set[str] = set()

    @property
    def url(self) -> str:
        """The address as a person gave it; it has no secrets."""
        return self._store.url

    def names(self) -> list[str]:
        """Return the names of the adapters there, sorted; none where nothing was ever pushed."""
        reader = self._reader()
        return reader.names() if reader is not None else []

    def log(self, name: str, known: KnownEntry) -> RemoteLog | None:
        """Return the log of that name, None where there is none; entries that are known are not fetched."""
        reader = self._reader()
        return reader.log(name, known) if reader is not None else None

    def logs(self, known: KnownEntry) -> Iterator[RemoteLog]:
        """Yield all logs, by name; what is there is listed from here on, since much will be asked for."""
        self._presence.expect_many()
        self._manifests.expect_many()
        self._listed = True
        reader = self._reader()
        if reader is not None:
            yield from reader.logs(known)

    def missing(self, name: str, sizes: Mapping[str, int]) -> set[str]:
        """Return which of these blobs, given with their bytes, a push has to bring: absent, or of another length."""
        return self._presence.missing(sizes)

    def put_blob(self, name: str, file: FileRecord, source: Path, *, anew: bool = False) -> None:
        """Bring a blob, hashed before it is sent; one that stands there with another length, or `anew`, is replaced."""
        self._presence.put(file, source, anew=anew)

    def missing_manifests(self, name: str, sizes: Mapping[str, int | None]) -> set[str]:
        """Return which manifests are not there, or not with that many bytes."""
        return self._manifests.missing(sizes)

    def put_manifest(self, name: str, version: VersionContent) -> None:
        """Bring a manifest, in place of what is there and is another."""
        reader = LogReader(self._store, self._described().heads, self._jobs)
        Appender(reader, self._presence, self._listed).put_manifests([version])

    def astray(self) -> list[str]:
        """Return the names, sorted, under which there are entries and no head; none where there are no heads."""
        reader = self._reader()
        return reader.astray() if reader is not None else []

    def lost(self, name: str, known: KnownEntry) -> RemoteLog | None:
        """Return the log of a name without a sound head, as its entries tell it; None where its head is sound."""
        reader = self._reader()
        return lost_log(reader, name, known) if reader is not None else None

    def restore_head(self, log: RemoteLog, head: str) -> RemoteLog:
        """Have a log that `lost` returned end there again; ConflictError where its head changed meanwhile."""
        return restore_head(LogReader(self._store, self._described().heads, self._jobs), log, head)

    def revive(self) -> list[str]:
        """Say anew what the remote is, where that is lost or damaged; a line for what was done."""
        return revive_description(self._store)

    def append(
        self,
        expected: RemoteLog | None,
        entries: Sequence[Entry],
        versions: Sequence[VersionContent],
        blob: Callable[[str], Path],
    ) -> RemoteLog:
        """Append entries to a log, or begin one where `expected` is None, and return it as it is afterwards.

        Repeating it after a cut is safe. A blob that a gc took meanwhile is brought once more. Raises ConflictError,
        naming both heads, when the log went on, was deleted or another has its name.
        """
        reader = LogReader(self._store, self._described().heads, self._jobs)
        appender = Appender(reader, self._presence, self._listed)
        log = appender.append(expected, entries, versions, blob)
        with self._lock:
            self._appended.update(entry.digest for entry in entries)
        return log

    def check(self, expected: RemoteLog | None, entries: Sequence[Entry]) -> None:
        """Raise what `append` would raise now, as far as it shows without writing."""
        reader = self._reader()
        if reader is not None:
            Appender(reader, self._presence, self._listed).check(expected, entries)

    def settle(self, log: RemoteLog, *, tags: bool, thorough: bool) -> list[str]:
        """Put damaged entries right; tags are in the log. Where all logs were read, entries are listed once."""
        with self._lock:
            older = [entry for entry in log.entries if entry.digest not in self._appended]
        reader = self._reader() if older else None
        if reader is None:
            return []
        mended = mend_log(reader, log.name, older, thorough=thorough, listed=self._sizes(reader))
        return [f"{mended} damaged log entries of {log.name} were put right there"] if mended else []

    def read_manifest(self, name: str, number: int, digest: str) -> bytes:
        """Return the manifest of a version, proved; NotFoundError where it is not there."""
        key = content_key(MANIFESTS, digest)
        where = f"{self.url}: manifest {digest} of {name}@v{number}"
        with suppress(IntegrityError):  # damaged on its way, or there: the second reading tells
            return self._manifest(where, key, digest)
        return self._manifest(where, key, digest)

    def read_blob(self, name: str, number: int, file: FileRecord, offset: int = 0) -> Iterator[bytes]:
        """Yield a file of a version from an offset on, not hashed, and as many bytes as it has.

        An answer that ends early is followed by another for the rest. Raises NotFoundError where the file is not there,
        IntegrityError where there is more or less of it.
        """
        key, where = content_key(BLOBS, file.digest), f"{self.url}: {file.path} of {name}@v{number}"
        while True:
            begun = offset
            for piece in self._store.get(key, offset):
                offset += len(piece)
                if offset > file.bytes:
                    raise IntegrityError(f"{where} has more than {file.bytes} bytes")
                yield piece
            if offset == file.bytes:
                return
            there = self._store.head(key)
            if offset == begun or there is None or there.size != file.bytes:
                raise IntegrityError(f"{where} ends after {offset} of {file.bytes} bytes")

    def delete(self, name: str) -> None:
        """Delete a log there, damaged or not; ConflictError when it went on meanwhile, NotFoundError without one."""
        reader = self._reader()
        if reader is None:
            raise self._absent(name)
        if reader.rule == "swapped":
            self._delete_head(reader, name)
        else:
            self._delete_entries(reader, name)

    def collect(self, grace: timedelta, *, dry_run: bool) -> Collected:
        """Delete what no log there refers to and is older than the grace; nothing when any log is damaged."""
        reader = self._reader()
        return collect(reader, grace, dry_run=dry_run) if reader is not None else Collected((), 0)

    def _manifest(self, where: str, key: str, digest: str) -> bytes:
        data = read_bounded(self._store, key, MANIFEST_LIMIT)
        parse_manifest(where, digest, data)
        return data

    def _sizes(self, reader: LogReader) -> EntrySizes | None:
        """Return what the remote lists of all entries, listed once; None where one log is looked at."""
        with self._lock:
            if self._listed and self._entry_sizes is None:
                self._entry_sizes = entry_sizes(reader, LOGS)
            return self._entry_sizes

    def _delete_head(self, reader: LogReader, name: str) -> None:
        """Have the head say that the log is gone; one that is damaged or missing was the log's all the same."""
        key, nowhere = head_key(name), digest_bytes(name.encode())
        try:
            stored, head = self._store.head(key), reader.head(name)
        except IntegrityError:
            stored, head = self._stored_anyhow(key), Head(nowhere)
        if head.gone if head is not None else not reader.listed_log(name):
            raise self._absent(name)
        gone = Head(nowhere if head is None else head.digest, gone=True)
        self._store.put_if_match(key, gone.encode(), stored.token if stored is not None else None)

    def _stored_anyhow(self, key: str) -> StoredKey | None:
        """Return what is told of a key; what is no file, as a link, is taken away."""
        try:
            return self._store.head(key)
        except IntegrityError:
            self._store.delete(key)
            return None

    def _delete_entries(self, reader: LogReader, name: str) -> None:
        """Delete the entries, the last ones first, so that what a cut leaves is a log."""
        keys = [stored.key for stored in self._store.list(log_prefix(name))]
        if not keys:
            raise self._absent(name)
        try:
            log = reader.log(name, lambda _: None)
        except IntegrityError:
            log = None
        order = {entry.digest[-64:]: at for at, entry in enumerate(log.entries)} if log is not None else {}
        for key in sorted(keys, key=lambda key: -order.get(key[-64:], -1)):
            self._store.delete(key)

    def _absent(self, name: str) -> NotFoundError:
        return NotFoundError(
            f"{self.url}: no adapter {name!r} there", f"loramgr remote list-adapters {shlex.quote(self.url)}"
        )

    def _reader(self) -> LogReader | None:
        """Return what reads the logs there; None where nothing was ever pushed."""
        description = self._read_description()
        return LogReader(self._store, description.heads, self._jobs) if description is not None else None

    def _read_description(self) -> Description | None:
        with self._lock:
            if self._description is None:
                self._description = read_description(self._store)
            return self._description

    def _described(self) -> Description:
        """Return what the remote says of itself, said now where nobody did before.

        Of two clients that begin one at once the first is right, and both go on from what stands there. Raises
        IncompatibleError where heads are swapped and this client cannot.
        """
        description = self._read_description()
        if description is None:
            said = Description("swapped" if self._store.capabilities().compare_and_swap else "branches")
            self._store.put_if_absent(DESCRIPTION, said.encode())
            description = self._read_description()
        if description is None:
            raise ConflictError(f"{self.url}: what was written there is gone again", "push again")
        if description.heads == "swapped" and not self._store.capabilities().compare_and_swap:
            raise IncompatibleError(
                f"{self.url}: its heads are swapped, and by this way in it has no conditional writes",
                "reach it as whoever pushed to it first did",
            )
        return description
