"""One collection of files named by the sha256 of their bytes, in `aa/bbcc…` below its folder.

A file appears whole and durable or not at all, and is never trusted because of its name: what is there is hashed
again before it counts.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader, BufferedWriter, BytesIO
from pathlib import Path
from typing import NamedTuple, Protocol

from loramgr.digests import PREFIX, digest_bytes, digest_file, is_digest
from loramgr.durable import appear, make_folder, sync_folder
from loramgr.errors import IntegrityError, LoramgrError, NotFoundError, UncheckedError, UsageError

__all__ = ["FANOUT", "BlobStore", "Observer", "Readable", "StoredFile", "copy"]

FANOUT = tuple(f"{number:02x}" for number in range(256))
_PIECE = 1 << 18
_REST = re.compile(r"[0-9a-f]{62}")


class StoredFile(NamedTuple):
    """What was stored: the digest and size in bytes of the content that was read, and whether it is new here."""

    digest: str
    bytes: int
    created: bool


class Readable(Protocol):
    """Something that can be read piece by piece."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the buffer from its beginning, as far as it goes, and return how far; 0 at the end."""


Observer = Callable[[memoryview], object]


class BlobStore:
    """One content-addressed collection of the store: blobs, manifests or log entries.

    `kind` is the word for one of its files in messages; `scratch` is a folder of the same file system for temporary
    files. Methods that write raise OSError where the file system refuses: full, read-only.
    """

    def __init__(self, folder: Path, kind: str, scratch: Path) -> None:
        self.folder = folder
        self.kind = kind
        self.scratch = scratch

    def put_bytes(self, data: bytes) -> str:
        """Store the bytes and return their digest; nothing is written when a sound copy is there."""
        digest = digest_bytes(data)
        if self._is_sound(digest):
            sync_folder(self._location(digest).parent)  # the process that put it may not have come to its own sync
            return digest
        return self._put(BytesIO(data), expected=digest).digest

    def put_file(self, source: Path, *, expected: str | None = None) -> StoredFile:
        """Store a file's content, read once, and return the digest and size of what was read.

        Raises NotFoundError when there is no such file, and IntegrityError when its content is not `expected`;
        None accepts any content.
        """
        try:
            stream = source.open("rb")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotFoundError(f"{source}: no such file") from error
        with stream:
            return self._put(stream, expected=expected, origin=f"{source}: ")

    def get(self, digest: str) -> bytes:
        """Return the content, hashed again; IntegrityError when it is missing or damaged."""
        try:
            data = self._location(digest).read_bytes()
        except OSError as error:
            raise self._unreadable(digest, error) from error
        if digest_bytes(data) != digest:
            raise self._damaged(digest)
        return data

    def check(self, digest: str) -> None:
        """Hash the content again, in chunks; IntegrityError when it is missing or damaged."""
        try:
            found = digest_file(self._location(digest))
        except OSError as error:
            raise self._unreadable(digest, error) from error
        if found != digest:
            raise self._damaged(digest)

    def path(self, digest: str) -> Path:
        """Return where the file is, not hashed again; IntegrityError when it is missing."""
        self.size(digest)
        return self._location(digest)

    def size(self, digest: str) -> int:
        """Return the size in bytes, as the file system has it; IntegrityError when the file is missing."""
        try:
            return self._location(digest).stat().st_size
        except OSError as error:
            raise self._unreadable(digest, error) from error

    def modified(self, digest: str) -> float:
        """Return when the file came, in seconds since 1970; IntegrityError when it is missing."""
        try:
            return self._location(digest).stat().st_mtime
        except OSError as error:
            raise self._unreadable(digest, error) from error

    def contains(self, digest: str) -> bool:
        """Say whether a file of that name is there, sound or not."""
        return self._location(digest).is_file()

    def digests(self) -> Iterator[str]:
        """Yield the digests of all files, sorted; files that the store did not name are passed over."""
        for first in FANOUT:
            folder = self.folder / first
            names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
            yield from (f"{PREFIX}{first}{name}" for name in names if _REST.fullmatch(name))

    def discard(self, digest: str) -> None:
        """Take a file out again that nothing refers to; it may be gone already."""
        path = self._location(digest)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():  # its folder may be what could not be made
            sync_folder(path.parent)

    def move(self, digests: Iterable[str], target: BlobStore) -> None:
        """Move files, in this order, to another collection of the same file system; durable when it returns.

        A file of that name there is replaced.
        """
        left, entered = set[Path](), set[Path]()
        for digest in digests:
            source, goal = self._location(digest), target._location(digest)
            make_folder(goal.parent)
            source.replace(goal)
            left.add(source.parent)
            entered.add(goal.parent)
        for folder in (*sorted(entered), *sorted(left)):  # in this order: found in both places rather than in none
            sync_folder(folder)

    def _location(self, digest: str) -> Path:
        if not is_digest(digest):
            raise UsageError(f"{digest!r} is not a digest")
        text = digest.removeprefix(PREFIX)
        return self.folder / text[:2] / text[2:]

    def _put(self, source: BufferedReader | BytesIO, *, expected: str | None, origin: str = "") -> StoredFile:
        descriptor, name = tempfile.mkstemp(dir=self.scratch)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                digest, size = copy(source, file)
                if expected not in (None, digest):
                    raise IntegrityError(f"{origin}the content is {digest}, expected was {expected}")
                sound = self._is_sound(digest)
                if not sound:
                    file.flush()
                    os.fchmod(descriptor, 0o444)
                    os.fsync(descriptor)
            created = not sound and self._appear(temporary, self._location(digest))
            sync_folder(self._location(digest).parent)
        finally:
            temporary.unlink(missing_ok=True)
        return StoredFile(digest, size, created)

    def _appear(self, temporary: Path, target: Path) -> bool:
        """Give the finished file its name; False when it took the place of a file of that name."""
        if not target.parent.is_dir():  # archives and copies of a home may drop empty folders
            target.parent.mkdir(exist_ok=True)
            sync_folder(self.folder)
        if appear(temporary, target):
            return True
        temporary.replace(target)  # it is damaged, or was put by another process meanwhile and has the same bytes
        return False

    def _is_sound(self, digest: str) -> bool:
        try:
            return digest_file(self._location(digest)) == digest
        except FileNotFoundError:
            return False

    def _damaged(self, digest: str) -> IntegrityError:
        return IntegrityError(f"{self.kind} {digest} is damaged: its bytes are others", "loramgr verify")

    def _unreadable(self, digest: str, error: OSError) -> LoramgrError:
        if isinstance(error, FileNotFoundError):
            return IntegrityError(f"{self.kind} {digest} is missing from the store", "loramgr verify")
        return UncheckedError(f"{self.kind} {digest} cannot be read: {error.strerror}")


def copy(source: Readable, target: BufferedWriter, observe: Observer | None = None) -> tuple[str, int]:
    """Copy to the end and hash what is written, so a source that changes meanwhile cannot make the digest lie.

    `observe`, when given, sees every piece of it, as long as the call lasts.
    """
    hasher, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_PIECE))  # one for all pieces: fresh memory costs more than the copy
    while count := source.readinto(buffer):
        piece = buffer[:count]
        hasher.update(piece)
        size += target.write(piece)
        if observe is not None:
            observe(piece)
    return PREFIX + hasher.hexdigest(), size
