"""Reads logs from a remote over a key store and proves them; nothing that arrives is held beyond stated sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from loramgr.errors import IntegrityError, LoramgrError, NotFoundError
from loramgr.log import Entry
from loramgr.remotes.layout import (
    HEADS,
    LOGS,
    Head,
    HeadRule,
    entry_key,
    head_key,
    log_prefix,
    parse_entry_key,
    parse_head_key,
)
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import (
    DamagedLogs,
    KeyStore,
    KnownEntry,
    MissingThere,
    RemoteLog,
    StoredKey,
    ends,
    mending,
)
from loramgr.remotes.proving import ENTRY_LIMIT, check_log, prove_entry

__all__ = ["LogReader", "read_bounded"]

Named = TypeVar("Named", bound=Hashable)

LOG_ENTRIES = 100_000
LOG_BYTES = 128 << 20
REMOTE_ENTRIES = 1_000_000
REMOTE_LOGS = 200_000
_HEAD_LIMIT = 4096
_LIVE_HEAD = len(Head("sha256:" + 64 * "0").encode())  # one that tells of a log that is gone is longer


def read_bounded(store: KeyStore, key: str, limit: int) -> bytes:
    """Return the bytes of a key; IntegrityError for more than the limit, NotFoundError when there is none."""
    pieces: list[bytes] = []
    size = 0
    for piece in store.get(key):
        size += len(piece)
        if size > limit:
            raise IntegrityError(f"{store.url}: {key} has more than {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class LogReader:
    """Reads the logs of a remote, with that many requests at once; `rule` says where a log ends."""

    store: KeyStore
    rule: HeadRule
    jobs: int

    def names(self) -> list[str]:
        """Return the names that have a log, sound or not, sorted, from listings wherever these suffice."""
        if self.rule == "swapped":
            heads = sorted(self._listed_heads().items())
            standing = each(self.jobs, self._stands, heads)
            return [name for (name, _), stands in zip(heads, standing, strict=True) if stands]
        listed = self.listed()
        holders: defaultdict[str, list[str]] = defaultdict(list)
        for name, digests in listed.items():
            for digest in digests:
                holders[digest].append(name)
        shared = {name for names in holders.values() if len(names) > 1 for name in names}  # one was renamed to another
        return sorted(name for name in listed if name not in shared or self.branches(name, listed[name], _unknown))

    def log(self, name: str, known: KnownEntry) -> RemoteLog | None:
        """Return the log of a name, None where there is none; IntegrityError for one that is not whole and sound."""
        if self.rule == "branches":
            return self.branches(name, self.listed_log(name), known)
        stored = self.store.head(head_key(name))
        return None if stored is None else self._swapped(name, stored, known, None)

    def astray(self) -> list[str]:
        """Return the names, sorted, under which there are log entries and no head; none where there are no heads."""
        if self.rule == "branches":
            return []
        listed = {name for name, _ in self._entries(LOGS, REMOTE_ENTRIES)}
        return sorted(listed.difference(self._listed_heads()))

    def logs(self, known: KnownEntry) -> Iterator[RemoteLog]:
        """Yield all logs, sorted by name, and raise DamagedLogs after those that are sound."""
        heads = {} if self.rule == "branches" else self._listed_heads()  # before the entries: these are there by then
        listed = self.listed()
        alone = LogReader(self.store, self.rule, 1)

        def read(name: str) -> RemoteLog | IntegrityError | None:
            try:
                if self.rule == "branches":
                    return alone.branches(name, listed[name], known)
                stored = heads[name] if heads[name].token else self.store.head(head_key(name))  # not all list tokens
                return alone._swapped(name, stored, known, listed.get(name, [])) if stored is not None else None
            except IntegrityError as error:
                return error

        damaged: dict[str, LoramgrError] = {}
        names = sorted(heads if self.rule == "swapped" else listed)
        for name, log in zip(names, each(self.jobs, read, names), strict=True):
            if isinstance(log, IntegrityError):
                damaged[name] = log
            elif log is not None:
                yield log
        if damaged:
            raise DamagedLogs(damaged)

    def head(self, name: str) -> Head | None:
        """Return what stands under a name's head, None where nothing does; for remotes that swap heads."""
        key = head_key(name)
        try:
            return Head.decode(f"{self.store.url}: {key}", read_bounded(self.store, key, _HEAD_LIMIT))
        except NotFoundError:
            return None
        except IntegrityError as error:
            raise IntegrityError(error.message, error.hint or mending(name, self.store.url)) from error

    def listed(self) -> dict[str, list[str]]:
        """Return the digests of the entries under each name, as the remote lists them."""
        logs: defaultdict[str, list[str]] = defaultdict(list)
        for name, digest in self._entries(LOGS, REMOTE_ENTRIES):
            logs[name].append(digest)
        return dict(logs)

    def entry(self, name: str, digest: str) -> Entry:
        """Read one entry, and once more if it is not what its digest names; IntegrityError where there is none."""
        where = f"{self.store.url}: log entry {digest} of {name!r}"
        try:
            try:
                return prove_entry(where, digest, read_bounded(self.store, entry_key(name, digest), ENTRY_LIMIT))
            except IntegrityError:  # damaged on its way, or there
                return prove_entry(where, digest, read_bounded(self.store, entry_key(name, digest), ENTRY_LIMIT))
        except NotFoundError as error:
            raise MissingThere(f"{where} is missing") from error

    def _stands(self, listed: tuple[str, StoredKey]) -> bool:
        """Say whether a head, as it was listed, is one of a log that is not gone; a damaged one is."""
        name, stored = listed
        if stored.size == _LIVE_HEAD:
            return True
        try:
            head = self.head(name)
        except IntegrityError:
            return True
        return head is not None and not head.gone

    def _listed_heads(self) -> dict[str, StoredKey]:
        return dict(self._named(HEADS, REMOTE_LOGS, parse_head_key))

    def listed_log(self, name: str) -> list[str]:
        """Return the digests of the entries under one name, as the remote lists them."""
        return [digest for found, digest in self._entries(log_prefix(name), LOG_ENTRIES) if found == name]

    def _entries(self, prefix: str, limit: int) -> Iterator[tuple[str, str]]:
        return (place for place, _ in self._named(prefix, limit, parse_entry_key))

    def _named(
        self, prefix: str, limit: int, parse: Callable[[str], Named | None]
    ) -> Iterator[tuple[Named, StoredKey]]:
        """Yield what the keys under a prefix name; where one names nothing, also what only a second listing has.

        Such a key may be somebody else's, or have been damaged on its way: then a log would look shorter than it is.
        """
        seen: set[Named] = set()
        for _ in range(2):
            strange = False
            for stored in self._bounded(prefix, limit):
                named = parse(stored.key)
                if named is None:
                    strange = True
                elif named not in seen:
                    seen.add(named)
                    yield named, stored
            if not strange:
                return

    def _bounded(self, prefix: str, limit: int) -> Iterator[StoredKey]:
        for at, stored in enumerate(self.store.list(prefix)):
            if at == limit:
                raise IntegrityError(f"{self.store.url}: more than {limit} keys under {prefix}")
            yield stored

    def _swapped(
        self, name: str, stored: StoredKey, known: KnownEntry, listed: Sequence[str] | None
    ) -> RemoteLog | None:
        """Read the log that a head names; the token is older than what is read here, so a swap cannot skip anything."""
        head = self.head(name)
        if head is None or head.gone:
            return None
        gathered = _Gathered(self, name, known)
        if known(head.digest) is None:
            gathered.fetch(self.listed_log(name) if listed is None else listed)
        chain = gathered.back_from([head.digest])
        return self._proved(name, chain, (head.digest,), stored.token)

    def branches(self, name: str, listed: Sequence[str], known: KnownEntry) -> RemoteLog | None:
        """Return the log of a name that is made of all entries listed under it."""
        gathered = _Gathered(self, name, known)
        gathered.fetch(listed)
        found = gathered.back_from(listed)
        heads = ends(found)
        if not any(entry.name == name for entry in found if entry.digest in heads):
            return None  # there is nothing, or it goes on under another name
        chain = gathered.back_from(heads)
        return self._proved(name, chain, heads, "")

    def _proved(self, name: str, chain: Sequence[Entry], heads: tuple[str, ...], state: str) -> RemoteLog:
        where = f"{self.store.url}: log {name!r}"
        check_log(where, chain)
        if self.rule == "swapped" and chain[-1].name != name:
            raise IntegrityError(f"{where}: its head is of a log called {chain[-1].name!r}")
        return RemoteLog(name, tuple(chain), heads, state)


class _Gathered:
    """The entries of one log as they come together: known ones are looked up, the others fetched within bounds."""

    def __init__(self, reader: LogReader, name: str, known: KnownEntry) -> None:
        self._reader = reader
        self._name = name
        self._known = known
        self._fetched: dict[str, Entry | LoramgrError] = {}
        self._bytes = 0

    def fetch(self, digests: Iterable[str]) -> None:
        """Fetch those that are not known, several at once; what is wrong with one is told when it is needed."""
        unknown = (digest for digest in digests if self._known(digest) is None)
        for digest, found in each(self._reader.jobs, self._read, unknown):
            self._take(digest, found)

    def back_from(self, digests: Iterable[str]) -> list[Entry]:
        """Return the entries and all that come before them, each after its predecessor."""
        ordered: dict[str, Entry] = {}
        for digest in digests:
            branch: list[Entry] = []
            following: str | None = digest
            while following is not None and following not in ordered:
                entry = self._get(following)
                branch.append(entry)
                if len(ordered) + len(branch) > LOG_ENTRIES:
                    raise self._too_large()
                following = entry.predecessor
            ordered.update((entry.digest, entry) for entry in reversed(branch))
        return list(ordered.values())

    def _get(self, digest: str) -> Entry:
        entry = self._known(digest)
        if entry is not None:
            return entry
        if digest not in self._fetched:
            self._take(*self._read(digest))
        found = self._fetched[digest]
        if isinstance(found, LoramgrError):
            raise found
        return found

    def _read(self, digest: str) -> tuple[str, Entry | LoramgrError]:
        try:
            return digest, self._reader.entry(self._name, digest)
        except IntegrityError as error:
            return digest, type(error)(error.message, error.hint or mending(self._name, self._reader.store.url))

    def _take(self, digest: str, found: Entry | LoramgrError) -> None:
        self._fetched[digest] = found
        self._bytes += len(found.encode()) if isinstance(found, Entry) else 0
        if self._bytes > LOG_BYTES:
            raise self._too_large()

    def _too_large(self) -> IntegrityError:
        limits = f"{LOG_ENTRIES} entries or {LOG_BYTES >> 20} MiB"
        return IntegrityError(f"{self._reader.store.url}: the log {self._name!r} has more than {limits}")


def _unknown(_: str) -> Entry | None:
    return None
