"""Appends to logs at a remote over a key store: manifests, entries, then the head, each step one that may be repeated.

Whoever refers to something that stood there before writes the entry first and then looks whether it is still there,
with no gc at work: an entry that a gc can see is kept with all that it names (see `collecting`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from loramgr.digests import short
from loramgr.errors import ConflictError, IntegrityError, NotFoundError, RacedError
from loramgr.log import Entry
from loramgr.remotes.layout import COLLECTING, MANIFESTS, Head, content_key, entry_key, head_key
from loramgr.remotes.parallel import each
from loramgr.remotes.presence import YOUNG, BlobPresence
from loramgr.remotes.protocol import KnownEntry, RemoteLog, VersionContent
from loramgr.remotes.proving import ENTRY_LIMIT, MANIFEST_LIMIT, check_entry, check_log
from loramgr.remotes.reading import LogReader, read_bounded

__all__ = ["Appender"]

BlobFile = Callable[[str], Path]


@dataclass(frozen=True, slots=True)
class _Push:
    """What is appended: the log as it was read, what comes after it, and the whole chain that results."""

    expected: RemoteLog | None
    entries: Sequence[Entry]
    chain: Sequence[Entry]

    @property
    def name(self) -> str:
        """What the log is called afterwards."""
        return self.entries[-1].name

    @property
    def head(self) -> str:
        """Where the log ends afterwards."""
        return self.entries[-1].digest

    @property
    def left(self) -> RemoteLog | None:
        """The log under the name that it gives up, None where it keeps its own or is new."""
        return self.expected if self.expected is not None and self.expected.name != self.name else None


@dataclass(frozen=True, slots=True)
class Appender:
    """Appends entries, as `Remote.append` says; `listed` says that all logs were read by this client before."""

    reader: LogReader
    presence: BlobPresence
    listed: bool

    def append(
        self, expected: RemoteLog | None, entries: Sequence[Entry], versions: Sequence[VersionContent], blob: BlobFile
    ) -> RemoteLog:
        """Append entries to a log, or begin one."""
        push = _Push(expected, entries, self._chain(expected, entries))
        self._check_readable(push, versions)
        self._check_name_is_free(push)
        written = self.put_manifests(versions)
        stood = [version for version, new in zip(versions, written, strict=True) if not new]
        self._put_entries(push)
        self._prove_there(versions, stood, blob)
        return self._swap(push) if self.reader.rule == "swapped" else self._branch(push)

    def check(self, expected: RemoteLog | None, entries: Sequence[Entry]) -> None:
        """Refuse what `append` would refuse, as far as it shows without writing."""
        push = _Push(expected, entries, self._chain(expected, entries))
        self._check_readable(push, ())
        self._check_name_is_free(push)
        if self.reader.rule == "swapped" and push.left is not None:
            self._check_target(push)

    def _chain(self, expected: RemoteLog | None, entries: Sequence[Entry]) -> list[Entry]:
        """Return the log, from its first entry to the new head; ConflictError when the entries do not follow it."""
        there = {entry.digest: entry for entry in expected.entries} if expected is not None else {}
        heads = expected.heads if expected is not None else ()
        following = entries[0].predecessor
        if following not in heads and (expected is not None or following is not None):
            raise self._moved_on(entries[-1].name, entries[-1].digest, heads)
        chain: list[Entry] = []
        while following is not None:
            chain.append(there[following])
            following = there[following].predecessor
        return [*reversed(chain), *entries]

    def _check_readable(self, push: _Push, versions: Sequence[VersionContent]) -> None:
        """Refuse to bring what nobody could read again."""
        for entry in push.entries:
            check_entry(f"log entry {entry.digest}", entry)
        check_log(f"log {push.name!r}", push.chain)
        for version in versions:
            if len(version.manifest) > MANIFEST_LIMIT:
                raise IntegrityError(f"manifest {version.digest}: larger than {MANIFEST_LIMIT} bytes")

    def _check_name_is_free(self, push: _Push) -> None:
        """Refuse to give a log the name of another where no swap of a head would tell."""
        if self.reader.rule == "branches" and push.left is not None:
            other = self.reader.log(push.name, _those(push.chain))
            if other is not None and other.entries[0].digest != push.chain[0].digest:
                raise self._taken(push, other.heads)

    def put_manifests(self, versions: Sequence[VersionContent]) -> list[bool]:
        """Store manifests, also in place of what is none of them; say of each whether it was not there."""

        def put(version: VersionContent) -> bool:
            return self._put(content_key(MANIFESTS, version.digest), version.manifest, MANIFEST_LIMIT)

        return list(each(self.reader.jobs, put, versions))

    def _put_entries(self, push: _Push) -> None:
        """Store the entries; where each counts at once, in their order, so that no log ever has a gap."""
        at_once = self.reader.rule == "branches"
        keys = [(push.name, entry) for entry in (push.entries if push.left is None else push.chain)]
        if (left := push.left) is not None:
            rename = next(at for at, entry in enumerate(push.entries) if entry.name != left.name)
            keys += [(left.name, entry) for entry in push.entries[: rename + 1]]

        def put(placed: tuple[str, Entry]) -> None:
            name, entry = placed
            key = entry_key(name, entry.digest)
            if not self._put(key, entry.encode(), ENTRY_LIMIT) and not at_once:
                self._freshen(key, entry.encode())

        for _ in each(1 if at_once else self.reader.jobs, put, keys):
            pass

    def _put(self, key: str, data: bytes, limit: int) -> bool:
        """Store bytes under the key that names them; False when they, and no others, stood there already."""
        store = self.reader.store
        with suppress(IntegrityError):  # a link or the like has its name
            if store.put_if_absent(key, data):
                return True
        with suppress(IntegrityError, NotFoundError):  # too large or gone again: not what belongs there
            if read_bounded(store, key, limit) == data:
                return False
        store.delete(key)
        store.put_if_absent(key, data)
        return True

    def _freshen(self, key: str, data: bytes) -> None:
        """Write an entry of an earlier try anew that no head names: a gc would take it for what it was."""
        there = self.reader.store.head(key)
        if there is None or datetime.now(UTC) - there.modified > YOUNG:
            self.reader.store.delete(key)
            self.reader.store.put_if_absent(key, data)

    def _prove_there(self, versions: Sequence[VersionContent], stood: Sequence[VersionContent], blob: BlobFile) -> None:
        """Look again for what stood there before this push began, now that a gc sees who refers to it."""
        files = {file.digest: file for version in versions for file in version.files}
        relied = [file for digest, file in files.items() if not self.presence.is_fresh(digest)]
        if not (relied or stood):
            return
        if any(datetime.now(UTC) - stored.modified < YOUNG for stored in self.reader.store.list(COLLECTING)):
            raise ConflictError(f"{self.reader.store.url}: a gc is at work there", "push again when it is done")
        whole = each(self.reader.jobs, self.presence.whole, relied)
        for file in [file for file, there in zip(relied, whole, strict=True) if not there]:
            self.presence.put(file, blob(file.digest))
        self.put_manifests(stood)

    def _swap(self, push: _Push) -> RemoteLog:
        """Make the head name the new end, if it is still what it was when the log was read."""
        token = push.expected.state if push.expected is not None else None
        if push.left is not None:
            self._leave(push, push.left)
            token = None
        try:
            return self._settled(push, token)
        except ConflictError as error:
            return self._after_refusal(push, error)

    def _settled(self, push: _Push, token: str | None) -> RemoteLog:
        state = self.reader.store.put_if_match(head_key(push.name), Head(push.head).encode(), token)
        return RemoteLog(push.name, tuple(push.chain), (push.head,), state)

    def _leave(self, push: _Push, left: RemoteLog) -> None:
        """Have the old name's head say where the log went; from here on nobody can append under that name."""
        self._check_target(push)
        gone = Head(push.head, gone=True, moved=push.name)
        try:
            self.reader.store.put_if_match(head_key(left.name), gone.encode(), left.state)
        except ConflictError as error:
            now = self.reader.head(left.name)
            if now != gone:
                raise self._moved_on(left.name, push.head, (now.digest,) if now else ()) from error

    def _check_target(self, push: _Push) -> None:
        other = self.reader.head(push.name)
        if other is not None and not other.gone and other.digest != push.head:
            raise self._taken(push, (other.digest,))

    def _after_refusal(self, push: _Push, error: ConflictError) -> RemoteLog:
        """Tell our own success whose answer was lost, and a name that is free again, from another's success."""
        stored, now = self.reader.store.head(head_key(push.name)), self.reader.head(push.name)
        if stored is None or now is None:
            raise self._moved_on(push.name, push.head, ()) from error
        if now.gone:
            self._check_is_free_again(push, now)
            return self._settled(push, stored.token)
        there = self.reader.log(push.name, _those(push.chain))
        if there is not None and push.head in {entry.digest for entry in there.entries}:
            return there
        if there is not None and there.entries[0].digest != push.chain[0].digest:
            raise self._taken(push, there.heads) from error
        raise self._moved_on(push.name, push.head, (now.digest,)) from error

    def _check_is_free_again(self, push: _Push, gone: Head) -> None:
        """Refuse a name whose log went away while we looked, or which is this log's own former name."""
        if push.expected is not None and push.left is None:
            raise self._moved_on(push.name, push.head, (gone.digest,))
        moved = self.reader.log(gone.moved, _those(push.chain)) if gone.moved is not None else None
        if moved is not None and moved.entries[0].digest == push.chain[0].digest:
            raise ConflictError(
                f"{push.name!r} is called {moved.name!r} at {self.reader.store.url}: its head there is "
                f"{short(gone.digest)}, here {short(push.head)}",
                f"loramgr pull {moved.name}",
            )

    def _branch(self, push: _Push) -> RemoteLog:
        """Read the log again, where every end counts: another client's branch is told as a fork.

        Where the log was deleted meanwhile, or the name is another log's, the entries are taken back. A new log among
        many is not read again: its name was free when all were listed, and a fork since then shows when next looked at.
        """
        if self.listed and push.expected is None:
            return RemoteLog(push.name, tuple(push.chain), (push.head,), "")
        listed = self.reader.listed_log(push.name)
        if not {entry.digest for entry in push.chain} <= {*listed}:
            self._take_back(push)
            raise self._moved_on(push.name, push.head, ())
        there = self.reader.branches(push.name, listed, _those(push.chain))
        if there is None:
            raise self._moved_on(push.name, push.head, ())
        roots = {entry.digest for entry in there.entries if entry.predecessor is None}
        if roots != {push.chain[0].digest} and (push.expected is None or push.left is not None):
            self._take_back(push)
            raise self._taken(push, [head for head in there.heads if head != push.head])
        return there

    def _take_back(self, push: _Push) -> None:
        """Delete the entries that were just stored, the last one first; nobody was told that they count."""
        for entry in reversed(push.entries):
            self.reader.store.delete(entry_key(push.name, entry.digest))

    def _moved_on(self, name: str, here: str, there: Sequence[str]) -> RacedError:
        ends = " and ".join(short(head) for head in there) or "gone"
        return RacedError(
            f"the log of {name!r} went on at {self.reader.store.url}: its head there is {ends}, here {short(here)}",
            f"loramgr push --rebase {name}",
        )

    def _taken(self, push: _Push, there: Sequence[str]) -> ConflictError:
        ends = " and ".join(short(head) for head in there)
        return ConflictError(
            f"the name {push.name!r} is another log's at {self.reader.store.url}: its head there is {ends}, "
            f"here {short(push.head)}",
            f"loramgr rename {push.name} NEW, then push it",
        )


def _those(chain: Sequence[Entry]) -> KnownEntry:
    return {entry.digest: entry for entry in chain}.get
