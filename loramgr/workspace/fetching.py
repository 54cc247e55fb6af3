"""Brings files from a remote: hashed as they arrive, gone on with after a cut or a kill, in nobody's way meanwhile.

A file is kept as `cache/partial/<digest>` of the home until it is whole and proved. Nothing of it has a name in the
store before.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Protocol

from loramgr.digests import CHUNK, PREFIX, digest_file
from loramgr.errors import IntegrityError, LoramgrError, NotFoundError, UncheckedError
from loramgr.records import FileRecord
from loramgr.remotes.protocol import MissingThere

__all__ = ["BlobSource", "Wanted", "fetch", "partial_folder", "read_proved"]

_ATTEMPTS = 4  # without a byte of progress
_PAUSE_SECONDS = 0.2


class BlobSource(Protocol):
    """What files come from: the parts of a `Remote` that are asked here."""

    @property
    def url(self) -> str:
        """The address, without secrets."""

    def read_blob(self, name: str, number: int, file: FileRecord, offset: int = 0) -> Iterator[bytes]:
        """Yield a file from an offset on, not hashed."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file of a version at a remote: of which adapter and version number, and what is recorded of it."""

    name: str
    number: int
    file: FileRecord


def partial_folder(cache: Path) -> Path:
    """Return where files that are on their way are kept."""
    return cache / "partial"


def fetch(remote: BlobSource, wanted: Wanted, folder: Path, observe: Callable[[int], object]) -> Path:
    """Bring a file and return where it is, whole and proved; what an earlier call left of it is gone on with.

    `observe` is told the size in bytes of every piece that is done. The file may have a second name in the store by
    then, and is not to be changed. Raises IntegrityError when the remote lacks it, or gives other bytes than its digest
    names twice in a row, and UncheckedError when it stops giving any.
    """
    path = folder / wanted.file.digest.removeprefix(PREFIX)
    if _is_finished(path, wanted.file):
        observe(wanted.file.bytes)
        return path
    with _claimed(path) as file:
        for _ in range(2):
            if _completed(remote, wanted, file, observe):
                return path
            file.seek(0)
            file.truncate()
        path.unlink()
    raise _damaged(remote, wanted)


def _is_finished(path: Path, file: FileRecord) -> bool:
    """Say whether a file that was about to enter the store is there and whole; one that is damaged is taken away."""
    with suppress(FileNotFoundError):  # another process has taken it in meanwhile
        if path.stat().st_mode & stat.S_IWUSR:
            return False
        if digest_file(path) == file.digest:
            return True
        path.unlink()
    return False


def read_proved(remote: BlobSource, wanted: Wanted) -> None:
    """Read a file of a remote to its end and hash it; errors as in `fetch`, nothing is kept."""
    for _ in range(2):
        hasher, size = hashlib.sha256(), 0
        for piece in _pieces(remote, wanted, 0):
            hasher.update(piece)
            size += len(piece)
        if PREFIX + hasher.hexdigest() == wanted.file.digest and size == wanted.file.bytes:
            return
    raise _damaged(remote, wanted)


def _completed(remote: BlobSource, wanted: Wanted, file: BufferedRandom, observe: Callable[[int], object]) -> bool:
    """Read on where the file ends, and say whether it is what its digest names."""
    hasher, size = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(CHUNK):
        hasher.update(chunk)
        size += len(chunk)
        observe(len(chunk))
    if size < wanted.file.bytes:
        for piece in _pieces(remote, wanted, size):
            hasher.update(piece)
            file.write(piece)
            size += len(piece)
            observe(len(piece))
        file.flush()
    return size == wanted.file.bytes and PREFIX + hasher.hexdigest() == wanted.file.digest


def _pieces(remote: BlobSource, wanted: Wanted, offset: int) -> Iterator[bytes]:
    """Yield the bytes of a file from an offset on, as many as it has to have; a cut is gone on from."""
    failures = 0
    while offset < wanted.file.bytes:
        before = offset
        error: LoramgrError = IntegrityError(
            f"{remote.url}: {_named(wanted)} ends there before the {wanted.file.bytes:,} bytes that are recorded",
            _look(remote),
        )
        try:
            for piece in _stream(remote, wanted, offset):
                offset += len(piece)
                yield piece
        except UncheckedError as cut:
            error = cut
        failures = 0 if offset > before else failures + 1
        if failures == _ATTEMPTS:
            raise error
        if offset < wanted.file.bytes:
            time.sleep(_PAUSE_SECONDS * 2**failures)


def _stream(remote: BlobSource, wanted: Wanted, offset: int) -> Iterator[bytes]:
    """Yield what the remote gives from an offset on; IntegrityError when it has nothing, or more than it may."""
    try:
        for piece in remote.read_blob(wanted.name, wanted.number, wanted.file, offset):
            offset += len(piece)
            if offset > wanted.file.bytes:
                more = f"has more there than the {wanted.file.bytes:,} bytes that are recorded"
                raise IntegrityError(f"{remote.url}: {_named(wanted)} {more}", _look(remote))
            yield piece
    except NotFoundError as error:
        raise MissingThere(f"{remote.url}: {_named(wanted)} is missing there", _look(remote)) from error
    except IntegrityError as error:
        raise type(error)(error.message, error.hint or _look(remote)) from error


def _damaged(remote: BlobSource, wanted: Wanted) -> IntegrityError:
    told = f"its bytes are not {wanted.file.digest}"
    return IntegrityError(f"{remote.url}: {_named(wanted)} is damaged there: {told}", _look(remote))


def _look(remote: BlobSource) -> str:
    return f"loramgr remote verify {shlex.quote(remote.url)}"


def _named(wanted: Wanted) -> str:
    return f"{wanted.file.path} of {wanted.name}@v{wanted.number}"


@contextmanager
def _claimed(path: Path) -> Iterator[BufferedRandom]:
    """Open a file to read and write it alone; another process that fetches the same is waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(file, path):  # else it was moved into the store meanwhile, and is not to be written to
                yield file
                return


def _is_still(file: BufferedRandom, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
