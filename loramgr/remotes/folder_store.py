"""A key store in a folder, on this machine or mounted from another.

Keys are files. One appears whole and durable or not at all: it is written beside, in `.temporary`, and linked to its
name. Compare-and-swap holds the kernel's lock on the file `.lock`; where the file system has no such locks, as some
mounted ones, the store says that it cannot swap. Links inside the folder are never followed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shlex
import shutil
import stat
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from loramgr.durable import appear, make_folder, sync_folder
from loramgr.errors import (
    ConflictError,
    IncompatibleError,
    IntegrityError,
    LoramgrError,
    NotFoundError,
    UncheckedError,
)
from loramgr.remotes.keys import HIDDEN, check_key, folder_of
from loramgr.remotes.protocol import Capabilities, StoredKey

__all__ = ["FolderStore"]

_TEMPORARY = ".temporary"
_LOCK = ".lock"
_PIECE = 1 << 18
_HASHED = 1 << 16  # bytes: what is swapped is smaller, and larger keys name their bytes
_ABANDONED_SECONDS = 24 * 3600.0
_FULL = "free some space there and repeat the command: what is there already is not sent again"
_NOT_WRITABLE = "check who owns the folder, its mode and how it is mounted"
_WAYS_ON = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _NOT_WRITABLE),
}
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


class FolderStore:
    """The keys in a folder that exists; `url` is what messages name it by."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url
        self._swept = False
        self._guard = threading.Lock()

    @property
    def url(self) -> str:
        """The address as a person gave it."""
        return self._url

    def capabilities(self) -> Capabilities:
        """Say whether the file system has locks, which compare-and-swap needs."""
        with self._worded():
            try:
                with self._locked():
                    return Capabilities(compare_and_swap=True)
            except IncompatibleError:
                return Capabilities(compare_and_swap=False)

    def head(self, key: str) -> StoredKey | None:
        """Return size, time and token of a key; the token is the sha256 of small keys, empty for larger ones."""
        with self._worded():
            path = self._path(key)
            try:
                return self._stored(key, path)
            except FileNotFoundError:
                self._require_folder()
                return None

    def get(self, key: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a key from an offset on."""
        with self._worded():
            try:
                stream = _open(self._path(key))
            except FileNotFoundError:
                self._require_folder()
                raise NotFoundError(f"{self._url}: there is no {key}") from None
            with stream:
                stream.seek(offset)
                while piece := stream.read(_PIECE):
                    yield piece

    def put_if_absent(self, key: str, source: Path | bytes) -> bool:
        """Store a key that is not there; False when it is."""
        with self._worded(writing=True):
            path = self._path(key)
            if path.exists():
                sync_folder(path.parent)  # whoever put it may not have come to that
                return False
            with self._written(source) as temporary:
                return _appeared(temporary, path)

    def put_if_match(self, key: str, data: bytes, token: str | None) -> str:
        """Replace a small key in the state that the token names; IncompatibleError where there are no locks."""
        with self._worded(writing=True), self._written(data) as temporary, self._locked():
            path = self._path(key)
            if token is None:
                if not _appeared(temporary, path):
                    raise self._moved(key)
            else:
                there = self.head(key)
                if there is None or there.token != token:
                    raise self._moved(key)
                temporary.replace(path)
                sync_folder(path.parent)
        return _token(data)

    def list(self, prefix: str) -> Iterator[StoredKey]:
        """Yield the keys that begin with a prefix, without tokens."""
        start = folder_of(prefix)
        self._require_folder()
        with self._worded():
            for path in _files(self._path(start) if start else self._folder):
                key = path.relative_to(self._folder).as_posix()
                if key.startswith(prefix) and not key.startswith(HIDDEN):
                    with suppress(FileNotFoundError):  # somebody deletes it meanwhile
                        yield _described(key, path.lstat())

    def delete(self, key: str) -> None:
        """Delete a key, and what else has its name: a link, an empty folder; one that is not there is no error."""
        with self._worded(writing=True):
            path = self._place(key)
            if path.is_dir() and not path.is_symlink():
                _remove_empty(path)
            else:
                path.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync_folder(path.parent)

    def _path(self, key: str) -> Path:
        """Return where a key is; IntegrityError when a part of it is a link."""
        path = self._place(key)
        self._refuse_link(key, path)
        return path

    def _place(self, key: str) -> Path:
        """Return where a key is, or a link that has its name; IntegrityError when another part of it is a link."""
        path = self._folder
        *folders, last = check_key(key).split("/")
        for part in folders:
            path = path / part
            self._refuse_link(key, path)
        return path / last

    def _refuse_link(self, key: str, path: Path) -> None:
        if path.is_symlink():
            raise IntegrityError(f"{self._url}: {key} leads through the link {path}", f"rm {shlex.quote(str(path))}")

    def _stored(self, key: str, path: Path) -> StoredKey:
        with _open(path) as stream:
            found = os.fstat(stream.fileno())
            token = _token(stream.read()) if found.st_size <= _HASHED else ""
        return _described(key, found, token)

    @contextmanager
    def _written(self, source: Path | bytes) -> Iterator[Path]:
        """Give a durable file with the content, which is gone after the block unless it was moved."""
        self._require_folder()
        folder = self._folder / _TEMPORARY
        if folder.is_symlink():
            raise IntegrityError(f"{folder} is a link", f"rm {folder}")
        make_folder(folder)
        temporary = folder / uuid.uuid4().hex
        try:
            with temporary.open("xb") as file, _reading(source) as stream:
                shutil.copyfileobj(stream, file, _PIECE)
                file.flush()
                os.fsync(file.fileno())
            self._sweep(temporary.stat().st_mtime)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep(self, now: float) -> None:
        """Delete, once, what killed processes left; `now` is the file system's own clock."""
        with self._guard:
            if self._swept:
                return
            self._swept = True
        for path in (self._folder / _TEMPORARY).iterdir():
            with suppress(FileNotFoundError):
                if now - path.lstat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    raise IncompatibleError(f"{self._url}: the file system has no locks") from error
                raise
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _worded(self, *, writing: bool = False) -> Iterator[None]:
        """Say what the file system refuses in words that name the remote: what cannot be read is unchecked."""
        try:
            yield
        except OSError as error:
            self._require_folder()
            message, hint = f"{self._url}: {error.strerror or error}", _WAYS_ON.get(error.errno or 0)
            if hint is not None and (writing or error.errno not in (errno.EACCES, errno.EPERM)):
                raise LoramgrError(message, hint) from error
            raise UncheckedError(message, hint) from error

    def _require_folder(self) -> None:
        if not self._folder.is_dir():  # never made here: while a mount is missing it would be on the wrong disk
            raise NotFoundError(f"{self._url}: there is no such folder", f"mkdir -p {self._folder}")

    def _moved(self, key: str) -> ConflictError:
        return ConflictError(f"{self._url}: somebody else has changed {key}", "run the command again")


def _open(path: Path) -> BinaryIO:
    """Open a regular file; FileNotFoundError for a folder, IntegrityError for a link and the like."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    raise IntegrityError(f"{path} is not a regular file", f"rm {shlex.quote(str(path))}")


def _remove_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise IntegrityError(f"{path} is a folder, not a file", f"rm -r {shlex.quote(str(path))}") from error


def _appeared(temporary: Path, path: Path) -> bool:
    make_folder(path.parent)
    new = appear(temporary, path)
    sync_folder(path.parent)
    return new


def _reading(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    try:
        return source.open("rb")
    except OSError as error:
        raise UncheckedError(f"{source} cannot be read: {error.strerror}") from error


def _files(folder: Path) -> Iterator[Path]:
    """Yield the regular files below a folder, which may be missing or lose parts meanwhile; links are passed over."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield Path(entry.path)


def _described(key: str, found: os.stat_result, token: str = "") -> StoredKey:
    return StoredKey(key, found.st_size, token, datetime.fromtimestamp(found.st_mtime, UTC))


def _token(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
