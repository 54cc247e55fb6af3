"""Logs and versions to push, key stores to push them to, and what the tests of remotes ask of them."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from logbook import summary

from loramgr.digests import canonical_json, digest_bytes
from loramgr.errors import ConflictError, IncompatibleError, NotFoundError
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.remotes.protocol import Capabilities, KeyStore, Remote, RemoteLog, StoredKey, VersionContent


def nothing_known(_: str) -> Entry | None:
    """Know no entry, as a fresh home."""
    return None


class MemoryStore:
    """A key store in memory, with compare-and-swap or without."""

    def __init__(self, *, swaps: bool = True) -> None:
        self.url = "memory:"
        self.swaps = swaps
        self.keys: dict[str, tuple[bytes, datetime]] = {}
        self._lock = threading.Lock()

    def capabilities(self) -> Capabilities:
        return Capabilities(self.swaps)

    def head(self, key: str) -> StoredKey | None:
        with self._lock:
            return self._stored(key) if key in self.keys else None

    def get(self, key: str, offset: int = 0) -> Iterator[bytes]:
        with self._lock:
            if key not in self.keys:
                raise NotFoundError(f"memory: there is no {key}")
            data = self.keys[key][0]
        for at in range(offset, len(data), 1 << 16):
            yield data[at : at + (1 << 16)]

    def put_if_absent(self, key: str, source: Path | bytes) -> bool:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with self._lock:
            if key in self.keys and self.swaps:
                return False
            self.keys[key] = (data, datetime.now(UTC))
            return True

    def put_if_match(self, key: str, data: bytes, token: str | None) -> str:
        if not self.swaps:
            raise IncompatibleError("memory: no conditional writes")
        with self._lock:
            if (self._stored(key).token if key in self.keys else None) != token:
                raise ConflictError(f"memory: somebody else has changed {key}")
            self.keys[key] = (data, datetime.now(UTC))
            return self._stored(key).token

    def list(self, prefix: str) -> Iterator[StoredKey]:
        with self._lock:
            found = [self._stored(key) for key in self.keys if key.startswith(prefix)]
        yield from found

    def delete(self, key: str) -> None:
        with self._lock:
            self.keys.pop(key, None)

    def _stored(self, key: str) -> StoredKey:
        data, modified = self.keys[key]
        return StoredKey(key, len(data), hashlib.sha256(data).hexdigest(), modified)


class CountingStore:
    """A key store that counts what is asked of another one, by method and first part of the key."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._store.url

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            with self._lock:
                if method == "capabilities":  # found out once, and remembered
                    return self._store.capabilities()
                self.counts[" ".join([method, *(str(argument).split("/")[0] for argument in arguments[:1])])] += 1
            return getattr(self._store, method)(*arguments)

        return counted


@dataclass
class Line:
    """An adapter as a home has it: its log, and the files and manifests of its versions."""

    folder: Path
    name: str = "sql"
    author: str = "tester"
    entries: list[Entry] = field(default_factory=list)
    versions: list[VersionContent] = field(default_factory=list)
    pushed: RemoteLog | None = None
    _seconds: Iterator[int] = field(default_factory=count)

    def copy(self, author: str) -> Line:
        """Return what another home has that pulled all of this."""
        return Line(self.folder, self.name, author, [*self.entries], [*self.versions], self.pushed)

    def publish(self, files: dict[str, bytes], **said: Any) -> Entry:
        """Add a version with these files."""
        records = [self._file(path, data) for path, data in files.items()]
        listed = [{"path": file.path, "digest": file.digest, "bytes": file.bytes} for file in records]
        number = max([entry.content["number"] for entry in self.entries if entry.kind == "publish"], default=0) + 1
        manifest = canonical_json({"schema": 1, "method": "lora", "base": None, "files": listed, "by": self.author})
        version = VersionContent(number, digest_bytes(manifest), manifest, tuple(records))
        self.versions.append(version)
        content = {"message": "", "tags": [], "parents": [], "labels": {}, "metrics": {}, "recipe": None}
        content |= {"number": number, "version": version.digest, "summary": summary(files=listed)} | said
        return self.add("publish", content)

    def add(self, kind: str, content: dict[str, Any], name: str | None = None) -> Entry:
        """Add an entry; `name` is the new one of a rename."""
        second = next(self._seconds)
        time = f"2026-01-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}Z"
        before = self.entries[-1].digest if self.entries else None
        entry = Entry("adapter", kind, name or self.name, before, time, self.author, content)
        self.name = entry.name
        self.entries.append(entry)
        return entry

    def rename(self, name: str) -> Entry:
        """Give the adapter another name."""
        return self.add("rename", {"from": self.name}, name)

    def path(self, digest: str) -> Path:
        """Return where a blob lies."""
        return self.folder / digest[-64:]

    def known(self, digest: str) -> Entry | None:
        """Return an entry that is here."""
        return next((entry for entry in self.entries if entry.digest == digest), None)

    def push(self, remote: Remote, expected: RemoteLog | None = None) -> RemoteLog:
        """Bring what the remote lacked when it was last looked at, as a push does."""
        expected = expected or self.pushed
        there = {entry.digest for entry in expected.entries} if expected else set()
        new = [entry for entry in self.entries if entry.digest not in there]
        published = {entry.content["version"] for entry in new if entry.kind == "publish"}
        versions = [version for version in self.versions if version.digest in published]
        files = {file.digest: file for version in versions for file in version.files}
        for digest in remote.missing(self.name, {digest: file.bytes for digest, file in files.items()}):
            remote.put_blob(self.name, files[digest], self.path(digest))
        self.pushed = remote.append(expected, new, versions, self.path)
        return self.pushed

    def _file(self, path: str, data: bytes) -> FileRecord:
        digest = digest_bytes(data)
        self.path(digest).write_bytes(data)
        return FileRecord(path, digest, len(data))


def read_all(remote: Remote, log: RemoteLog, versions: Sequence[VersionContent]) -> None:
    """Read all of these versions from a remote and compare them byte for byte."""
    published = {entry.content["version"]: entry for entry in log.entries if entry.kind == "publish"}
    for version in versions:
        number = published[version.digest].content["number"]
        assert remote.read_manifest(log.name, number, version.digest) == version.manifest
        for file in version.files:
            data = b"".join(remote.read_blob(log.name, number, file))
            assert (digest_bytes(data), len(data)) == (file.digest, file.bytes)
            assert b"".join(remote.read_blob(log.name, number, file, 2)) == data[2:]
