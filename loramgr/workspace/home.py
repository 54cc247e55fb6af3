"""An opened workspace: the store, the catalog that indexes it, and how events become log entries."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loramgr.catalog.catalog import Catalog, Writer
from loramgr.digests import digest_bytes
from loramgr.errors import ConflictError, IntegrityError
from loramgr.log import Entry, LogKind
from loramgr.records import FileRecord, VersionRecord
from loramgr.store.blobs import BlobStore
from loramgr.store.store import Store

__all__ = ["CATALOG", "Home", "NewFiles", "default_home"]

CATALOG = "catalog.sqlite3"


def default_home() -> Path:
    """Return `LORAMGR_HOME`, else the platform's folder for user data."""
    if home := os.environ.get("LORAMGR_HOME"):
        return Path(home)
    import platformdirs

    return Path(platformdirs.user_data_dir("loramgr"))


@dataclass(frozen=True, slots=True)
class Home:
    """A home folder with its store and catalog; `jobs` threads for parallel work, `progress` for bars on a terminal."""

    path: Path
    store: Store
    catalog: Catalog
    jobs: int
    progress: bool

    @classmethod
    def open(cls, path: Path, jobs: int, progress: bool) -> Home:
        """Open a home, made on first use.

        Raises IntegrityError when store and catalog do not belong together or the catalog of a store that was used
        is missing, IncompatibleError when another loramgr wrote them, and OSError where it cannot be made.
        """
        store = Store.create(path / "store")
        catalog = path / CATALOG
        if not catalog.exists() and next(store.entries.digests(), None) is not None:
            raise IntegrityError(f"{catalog}: the catalog of this store is missing", "loramgr db rebuild")
        return cls(path, store, Catalog.open(catalog, store.uuid), jobs, progress)

    @property
    def cache(self) -> Path:
        """Where facts about files outside are remembered; it may be deleted at any time."""
        return self.path / "cache"

    def record(self, writer: Writer, log: LogKind, kind: str, name: str, content: Mapping[str, Any]) -> Entry:
        """Append what happened to the log of that name: to the catalog's open transaction, and to the store.

        The entry is stored before the transaction can end, and not at all when the catalog refuses it.
        """
        previous = content.get("from", name)
        state = writer.log_state(log, previous)
        head = None if state is None else state.head
        entry = Entry(log, kind, name, head, _now(), _author(), dict(content))
        writer.append(entry)
        self.store.entries.put_bytes(entry.encode())
        return entry

    @contextmanager
    def provisional(self) -> Iterator[NewFiles]:
        """Put files into the store that a version or base will refer to; when the block fails, they are gone again."""
        files = NewFiles(self.store)
        try:
            yield files
        except BaseException:
            with self.catalog.writing() as writer:  # nobody publishes meanwhile, and publishing looks for its files
                files.discard(referenced={*writer.file_digests(), *writer.version_digests()})
            raise

    @contextmanager
    def files_of(self, version: VersionRecord) -> Iterator[Path]:
        """Give a folder with the files of a version, hashed again, for the duration of the block.

        Raises IntegrityError when one is missing or damaged.
        """
        for file in version.files:
            self.store.blobs.check(file.digest)
        with self._temporary_folder() as folder:
            for file in version.files:
                _link(self.store.blobs.path(file.digest), folder / file.path)
            yield folder

    @contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        scratch = self.store.root / "scratch"
        folder = Path(tempfile.mkdtemp(dir=scratch if os.access(scratch, os.W_OK) else None))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


class NewFiles:
    """Files that were put into the store and that nothing refers to yet."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._added: list[tuple[BlobStore, str]] = []

    def put_blob(self, source: Path | bytes) -> FileRecord:
        """Store a file's content or bytes; the record's path is empty."""
        if isinstance(source, bytes):
            return FileRecord("", self._put(self._store.blobs, source), len(source))
        before = _state(source)
        stored = self._store.blobs.put_file(source)
        if stored.created:
            self._added.append((self._store.blobs, stored.digest))
        if _state(source) != before:
            raise ConflictError(f"{source}: the file was written to while it was read", "add it when it is complete")
        return FileRecord("", stored.digest, stored.bytes)

    def put_manifest(self, data: bytes) -> str:
        """Store a manifest and return its digest."""
        return self._put(self._store.manifests, data)

    def discard(self, referenced: set[str]) -> None:
        """Take the files out again, but for those that somebody else refers to by now."""
        for collection, digest in self._added:
            if digest not in referenced:
                collection.discard(digest)

    def _put(self, collection: BlobStore, data: bytes) -> str:
        known = collection.contains(digest_bytes(data))
        digest = collection.put_bytes(data)
        if not known:
            self._added.append((collection, digest))
        return digest


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _link(blob: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(blob, path)
    except OSError:  # another file system, or one without hard links: an adapter is small enough to copy
        shutil.copyfile(blob, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _author() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
