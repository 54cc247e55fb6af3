"""An opened workspace: the store, the catalog that indexes it, and how events become log entries."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loramgr.catalog.catalog import Catalog, Writer
from loramgr.digests import digest_bytes
from loramgr.errors import IncompatibleError, IntegrityError, LoramgrError
from loramgr.hints import ReadHints
from loramgr.log import Entry, LogKind
from loramgr.needs import mentioned
from loramgr.records import VersionRecord
from loramgr.store.blobs import BlobStore
from loramgr.store.locks import locked
from loramgr.store.store import Store
from loramgr.temporary import temporary_folder
from loramgr.workspace.promises import check_here

__all__ = ["CATALOG", "Home", "NewFiles", "catalog_path", "default_home", "file_state"]

CATALOG = "catalog.sqlite3"
_TIDY_SECONDS = 2.0  # whoever waited for the catalog in vain is not to wait as long again; gc takes what stays


def default_home() -> Path:
    """Return `LORAMGR_HOME`, else the platform's folder for user data."""
    if home := os.environ.get("LORAMGR_HOME"):
        return Path(home)
    import platformdirs

    return Path(platformdirs.user_data_dir("loramgr"))


def catalog_path(home: Path) -> Path:
    """Return where the catalog of a home is: in it, or where `LORAMGR_CATALOG_URL` says.

    Raises IncompatibleError for a URL of anything but an SQLite file; it is not repeated, it may hold a password.
    """
    url = os.environ.get("LORAMGR_CATALOG_URL")
    if not url:
        return home / CATALOG
    scheme, _, path = url.partition(":///")
    if scheme != "sqlite" or not path:
        kind = url.partition(":")[0]
        raise IncompatibleError(
            f"LORAMGR_CATALOG_URL: catalogs of kind {kind!r} are not supported", "LORAMGR_CATALOG_URL=sqlite:///PATH"
        )
    return Path(path)


@dataclass(frozen=True, slots=True)
class Home:
    """A home folder with its store and catalog; `jobs` threads for parallel work, `progress` for bars on a terminal.

    `hints` is what a person says of adapters given as paths that their files do not.
    """

    path: Path
    store: Store
    catalog: Catalog
    jobs: int
    progress: bool
    hints: ReadHints = field(default_factory=ReadHints)

    @classmethod
    def open(cls, path: Path, jobs: int, progress: bool, hints: ReadHints | None = None) -> Home:
        """Open a home, made on first use.

        Raises IntegrityError when store and catalog do not belong together or the catalog of a store that was used
        is missing, IncompatibleError when another loramgr wrote them, and OSError where it cannot be made.
        """
        store = Store.create(path / "store")
        catalog = catalog_path(path)
        if not catalog.exists() and next(store.entries.digests(), None) is not None:
            raise IntegrityError(f"{catalog}: the catalog of this store is missing", "loramgr db rebuild")
        return cls(path, store, Catalog.open(catalog, store.uuid), jobs, progress, hints or ReadHints())

    @property
    def cache(self) -> Path:
        """Where facts about files outside are remembered; it may be deleted at any time."""
        return self.path / "cache"

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Open the catalog for a change of the logs, with gc kept away; the block's end is the acknowledgement.

        When the block or the end fails, nothing has changed and the recorded entries are gone from the store again.
        Raises ConflictError when gc or another writer takes too long.
        """
        with locked(self.store.root):
            recorded: list[str] = []
            try:
                with self.catalog.writing() as writer:
                    recorded = writer.appended
                    yield writer
            except BaseException:
                with suppress(LoramgrError, OSError):  # what stays then is for gc; the failure is what has to be told
                    self._withdraw(recorded)
                raise

    def _withdraw(self, entries: list[str]) -> None:
        """Take entries out of the store again that did not come to count, the last one first."""
        if not entries:
            return
        with self.catalog.writing() as writer:  # for which SQLite first settles what an interrupted commit left open
            known = {*writer.entry_digests()}
        for digest in reversed(entries):
            if digest not in known:
                self.store.entries.discard(digest)

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
        """Put files into the store that a version or base will refer to; when the block fails, they are gone again.

        Gc is kept away until the end of the block, so what it finds in the store is still there when it is published.
        """
        with locked(self.store.root):
            files = NewFiles(self.store)
            try:
                yield files
            except BaseException:
                self.tidy(files)
                raise

    def tidy(self, files: NewFiles) -> None:
        """Take files out of the store again, but for those that an entry names, even one that does not count.

        What cannot be taken out, as while another process holds the catalog, is left to gc.
        """
        catalog = self.catalog.waiting(_TIDY_SECONDS)
        with suppress(LoramgrError, OSError), catalog.writing():  # publishing looks for its files, and waits meanwhile
            entries = (Entry.decode(self.store.entries.get(digest)) for digest in self.store.entries.digests())
            needs = mentioned(entries)
            files.discard(referenced={*needs.blobs, *needs.manifests})

    @contextmanager
    def files_of(self, version: VersionRecord) -> Iterator[Path]:
        """Give a folder with the files of a version, hashed again, for the duration of the block.

        Raises NotFoundError when they are at a remote only, IntegrityError when one is missing or damaged, or when they
        are not those that the manifest names, which the version digest names.
        """
        check_here(self.store, version)
        named = json.loads(self.store.manifests.get(version.digest))["files"]
        if named != [asdict(file) for file in sorted(version.files, key=lambda file: file.path)]:
            raise IntegrityError(
                f"the catalog has other files for {version.name}@v{version.version} than its manifest", "loramgr verify"
            )
        with self.laid_out(version) as folder:
            yield folder

    @contextmanager
    def laid_out(self, version: VersionRecord) -> Iterator[Path]:
        """Give a folder as `files_of` does, without a look at the manifest."""
        for file in version.files:
            self.store.blobs.check(file.digest)
        scratch = self.store.root / "scratch"
        with temporary_folder(scratch if os.access(scratch, os.W_OK) else None) as folder:
            for file in version.files:
                _link(self.store.blobs.path(file.digest), folder / file.path)
            yield folder


class NewFiles:
    """Files that were put into the store and that nothing refers to yet."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._added: list[tuple[BlobStore, str]] = []

    def put_blob(self, data: bytes) -> str:
        """Store bytes as a blob and return their digest."""
        return self._put(self._store.blobs, data)

    def put_manifest(self, data: bytes) -> str:
        """Store a manifest and return its digest."""
        return self._put(self._store.manifests, data)

    def adopt(self, added: Iterable[tuple[BlobStore, str]]) -> None:
        """Count files as new that were put into the store by other means."""
        self._added += added

    def discard(self, referenced: set[str]) -> None:
        """Take the files out again, but for those that something refers to by now."""
        for collection, digest in self._added:
            if digest not in referenced:
                collection.discard(digest)

    def _put(self, collection: BlobStore, data: bytes) -> str:
        known = collection.contains(digest_bytes(data))
        digest = collection.put_bytes(data)
        if not known:
            self._added.append((collection, digest))
        return digest


def file_state(path: Path) -> tuple[int, int, int]:
    """Return what tells a file that was written to or replaced from one that was not."""
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
