"""The two protocols of remotes, and what goes over them.

A `Remote` keeps logs and the files of their versions. Most are laid over a `KeyStore`, a flat store of named bytes.
Neither is believed: whoever reads from one hashes what arrives, before it gets a name.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from loramgr import forks
from loramgr.errors import IntegrityError, LoramgrError
from loramgr.log import Entry
from loramgr.records import FileRecord

__all__ = [
    "Capabilities",
    "Collected",
    "DamagedLogs",
    "KeyStore",
    "KnownEntry",
    "MissingThere",
    "Remote",
    "RemoteLog",
    "StoredKey",
    "VersionContent",
    "ends",
    "mending",
]

KnownEntry = Callable[[str], Entry | None]  # an entry by its digest, where it is here already and need not be fetched


class MissingThere(IntegrityError):
    """What a remote says that it has is not there at all."""


class DamagedLogs(IntegrityError):
    """Logs that are not whole and sound, told after all that are; `errors` has one for each name."""

    def __init__(self, errors: Mapping[str, LoramgrError]) -> None:
        first = next(iter(errors.values()))
        message = first.message
        if len(errors) > 1:
            message = f"{len(errors)} logs are damaged:" + "".join(f"\n{each.message}" for each in errors.values())
        super().__init__(message, first.hint)
        self.errors = dict(errors)


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as a store tells of it: size in bytes, when it was written (aware, UTC), and what names its state.

    `token` changes with the content and is what `put_if_match` expects; empty where the store has none.
    """

    key: str
    size: int
    token: str
    modified: datetime


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a key store was found to hold against other clients: of two conditional writes at once one is refused."""

    compare_and_swap: bool


class KeyStore(Protocol):
    """A flat store of named bytes; keys are relative paths of plain characters with `/` between their parts.

    What goes wrong: NotFoundError for a bucket or folder that does not exist, UncheckedError for a store that cannot be
    reached or refuses the credentials, always naming `url`, and never a secret.
    """

    @property
    def url(self) -> str:
        """The address as a person gave it; it has no secrets."""

    def capabilities(self) -> Capabilities:
        """Find out by two conditional writes, once per store object, what the store holds."""

    def head(self, key: str) -> StoredKey | None:
        """Return what the store tells of a key, None where there is none."""

    def get(self, key: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a key from an offset on, in pieces of bounded size; NotFoundError where there is none."""

    def put_if_absent(self, key: str, source: Path | bytes) -> bool:
        """Store bytes, or a file as a stream, under a key; False when the key is there already, and stays.

        For keys that name their bytes: a store without conditional writes may write the same bytes again.
        """

    def put_if_match(self, key: str, data: bytes, token: str | None) -> str:
        """Replace a key in the state that the token names, None for an absent one, and return its new token.

        Raises ConflictError when it is in another state, IncompatibleError when the store has no conditional writes.
        """

    def list(self, prefix: str) -> Iterator[StoredKey]:
        """Yield the keys that begin with a prefix, in no order."""

    def delete(self, key: str) -> None:
        """Delete a key; one that is not there is no error."""


@dataclass(frozen=True, slots=True)
class RemoteLog:
    """A log of an adapter at a remote, every entry read and named by its own digest.

    `entries` begin with the first and each stands after its predecessor; `heads` are the ends of the branches, and more
    than one is a fork. `state` names what `append` expects to find unchanged.
    """

    name: str
    entries: tuple[Entry, ...]
    heads: tuple[str, ...]
    state: str


@dataclass(frozen=True, slots=True)
class VersionContent:
    """A version on its way to a remote: its number, the digest and bytes of its manifest, and its files."""

    number: int
    digest: str
    manifest: bytes
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class Collected:
    """What a remote's gc deleted, or would delete, by key, and the size of it in bytes."""

    removed: tuple[str, ...]
    bytes: int


class Remote(Protocol):
    """Where logs and the files of their versions are kept; errors as for `KeyStore`.

    What it returns of entries is proved: named by its digest, well-formed, complete from the first to each head.
    IntegrityError for anything else.
    """

    @property
    def url(self) -> str:
        """The address as a person gave it; it has no secrets."""

    def names(self) -> list[str]:
        """Return the names of the adapters there, sorted."""

    def log(self, name: str, known: KnownEntry) -> RemoteLog | None:
        """Return the log of that name, None where there is none; entries that are known are not fetched."""

    def logs(self, known: KnownEntry) -> Iterator[RemoteLog]:
        """Yield all logs, with fewer requests than one by one; DamagedLogs after the last, where some are damaged."""

    def astray(self) -> list[str]:
        """Return the names, sorted, with log entries that no head tells of: it got lost, or a push was cut."""

    def lost(self, name: str, known: KnownEntry) -> RemoteLog | None:
        """Return the log of a name without a sound head, as its entries tell it; None where its head is sound."""

    def restore_head(self, log: RemoteLog, head: str) -> RemoteLog:
        """Have a log that `lost` returned end there again; ConflictError where its head changed meanwhile."""

    def revive(self) -> list[str]:
        """Put right what the remote says of itself, where that is lost or damaged; a line for each thing."""

    def missing(self, name: str, sizes: Mapping[str, int]) -> set[str]:
        """Return which of these blobs, given with their bytes, a push of that adapter has to bring."""

    def put_blob(self, name: str, file: FileRecord, source: Path, *, anew: bool = False) -> None:
        """Bring a blob, streamed; nothing refers to it before `append`. Several threads may bring some at once.

        `anew` takes the place of one that is there. IntegrityError where the remote has no way to do that.
        """

    def missing_manifests(self, name: str, sizes: Mapping[str, int | None]) -> set[str]:
        """Return which manifests of versions that its log has are not there, or not with that many bytes.

        A size is None where it is not known.
        """

    def put_manifest(self, name: str, version: VersionContent) -> None:
        """Bring the manifest of a version that the log has; one that is there and is another is replaced.

        IntegrityError where the remote has no way to do that.
        """

    def append(
        self,
        expected: RemoteLog | None,
        entries: Sequence[Entry],
        versions: Sequence[VersionContent],
        blob: Callable[[str], Path],
    ) -> RemoteLog:
        """Append entries to a log, or begin one where `expected` is None, and return it as it is afterwards.

        `versions` are those that the entries publish, their blobs being there, and `blob` gives the file of a digest.
        The name is that of the last entry. Raises ConflictError, naming both heads, when the log went on since
        `expected` was read or another has its name. Where the store cannot tell, a fork comes back: several `heads`.
        """

    def check(self, expected: RemoteLog | None, entries: Sequence[Entry]) -> None:
        """Raise what `append` would raise now, as far as it shows without writing."""

    def settle(self, log: RemoteLog, *, tags: bool, thorough: bool) -> list[str]:
        """Put right what earlier pushes of a log left undone or others damaged, and say so, a line for each thing.

        What that is depends on the kind of remote: damaged entries, all of them read again where `thorough`; marks for
        people, like git tags, with `tags` also those of the adapter. The log is one that was just read or appended to.
        """

    def read_manifest(self, name: str, number: int, digest: str) -> bytes:
        """Return the manifest of a version, hashed; NotFoundError where it is not there, IntegrityError for another."""

    def read_blob(self, name: str, number: int, file: FileRecord, offset: int = 0) -> Iterator[bytes]:
        """Yield a file of a version from an offset on, not hashed; NotFoundError where it is not there."""

    def delete(self, name: str) -> None:
        """Delete a log there; NotFoundError where there is none. What it referred to is for `collect`."""

    def collect(self, grace: timedelta, *, dry_run: bool) -> Collected:
        """Delete what no log there refers to and is older than the grace."""


def mending(name: str, url: str) -> str:
    """Return the hint for something damaged or missing of an adapter at a remote."""
    return f"where a home has it: loramgr push --repair {name} --to {shlex.quote(url)}"


def ends(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Return the digests of the entries where branches end, sorted; one that another says all of is no branch."""
    return tuple(sorted(forks.ends(entries)))
