"""Knows which blobs, or manifests, a remote over a key store has, and brings the blobs that it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock

from loramgr.digests import digest_bytes, digest_file
from loramgr.errors import IntegrityError
from loramgr.records import FileRecord
from loramgr.remotes.layout import BLOBS, content_key, parse_content_key
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import KeyStore, StoredKey

__all__ = ["YOUNG", "BlobPresence"]

YOUNG = timedelta(hours=1)  # no gc with a sensible grace takes what was written that recently
_FEW = 16
_SMALL = 8 << 20
_LISTABLE = 200_000


class BlobPresence:
    """Answers for the blobs of one remote; several threads may ask and bring some at once.

    A few are asked for one by one. Where many are, all are listed once and remembered, so that a push of many versions
    does not ask again; a blob that another client brings meanwhile is sent in vain at worst. `folder` is BLOBS, or
    MANIFESTS for these. What stands under a key and is no blob, as a link in a folder, counts as none.
    """

    def __init__(self, store: KeyStore, jobs: int, folder: str = BLOBS) -> None:
        self._store = store
        self._jobs = jobs
        self._folder = folder
        self._lock = Lock()
        self._asked = 0
        self._unlistable = False
        self._listed: dict[str, tuple[int, datetime]] | None = None  # digest → bytes, when it was written
        self._written: dict[str, datetime] = {}

    def missing(self, sizes: Mapping[str, int | None]) -> set[str]:
        """Return which blobs, given with their bytes, are not there, or not with that many; None for any."""
        listed = self._listing(len(sizes))
        found = dict(each(self._jobs, self._ask, sizes)) if listed is None else listed
        missing = set[str]()
        with self._lock:
            for digest, size in sizes.items():
                there = found.get(digest)
                if there is not None and size in (None, there[0]):
                    self._written.setdefault(digest, there[1])
                elif digest not in self._written:
                    missing.add(digest)
        return missing

    def put(self, file: FileRecord, source: Path, *, anew: bool = False) -> None:
        """Bring a blob, proved before it is sent; one that stands there with another length, or `anew`, is replaced.

        Raises IntegrityError when the source is not what the record says.
        """
        proved = _proved(file, source)
        key, written = content_key(BLOBS, file.digest), datetime.now(UTC)
        if anew or not self._brought(key, proved):
            there = None if anew else self._there(file.digest)
            if there is None or there.size != file.bytes:
                self._store.delete(key)
                self._store.put_if_absent(key, proved)
            else:
                written = there.modified
        with self._lock:
            self._written[file.digest] = written

    def is_fresh(self, digest: str) -> bool:
        """Say whether the blob was brought from here, or found written so recently that no gc takes it."""
        written = self._written.get(digest)
        return written is not None and datetime.now(UTC) - written < YOUNG

    def whole(self, file: FileRecord) -> bool:
        """Ask the remote, whatever is remembered, whether a blob is there with its length."""
        there = self._there(file.digest)
        return there is not None and there.size == file.bytes

    def expect_many(self) -> None:
        """Have the next question answered by a listing."""
        with self._lock:
            self._asked += _FEW

    def _ask(self, digest: str) -> tuple[str, tuple[int, datetime] | None]:
        there = self._there(digest)
        return digest, None if there is None else (there.size, there.modified)

    def _brought(self, key: str, proved: Path | bytes) -> bool:
        with suppress(IntegrityError):
            return self._store.put_if_absent(key, proved)
        return False

    def _there(self, digest: str) -> StoredKey | None:
        with suppress(IntegrityError):
            return self._store.head(content_key(self._folder, digest))
        return None

    def _listing(self, count: int) -> Mapping[str, tuple[int, datetime] | None] | None:
        """Return the blobs there by digest once many were asked for; None before, or where there are too many."""
        with self._lock:
            self._asked += count
            if self._asked > _FEW and self._listed is None and not self._unlistable:
                self._listed = self._list()
                self._unlistable = self._listed is None
            return self._listed

    def _list(self) -> dict[str, tuple[int, datetime]] | None:
        listed: dict[str, tuple[int, datetime]] = {}
        for stored in self._store.list(self._folder):
            digest = parse_content_key(stored.key)
            if digest is not None:
                listed[digest] = (stored.size, stored.modified)
            if len(listed) > _LISTABLE:
                return None
        return listed


def _proved(file: FileRecord, source: Path) -> Path | bytes:
    """Return what to send, once it is known to be what the record says: of a small file the bytes themselves."""
    size = source.stat().st_size
    content = source.read_bytes() if size == file.bytes <= _SMALL else source
    found = digest_bytes(content) if isinstance(content, bytes) else digest_file(source)
    if size != file.bytes or found != file.digest:
        raise IntegrityError(f"{source}: not the {file.bytes} bytes of {file.digest}", "loramgr verify --repair")
    return content
