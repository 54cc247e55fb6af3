"""Folders that appear whole: built beside their place, synced, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramgr.errors import ConflictError, LoramgrError

__all__ = ["check_free", "exchange", "is_vacant", "staged"]

_LOCK = ".loramgr-lock"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def is_vacant(output: Path) -> bool:
    """Say whether a folder may appear at this path: nothing is there, or an empty folder."""
    if output.is_symlink() or not output.is_dir():
        return not os.path.lexists(output)
    return not any(output.iterdir())


def check_free(output: Path, needed: int) -> None:
    """Raise LoramgrError when the file system of the output has less than `needed` bytes left."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise LoramgrError(
            f"{output}: {needed:,} bytes are needed and {free:,} are free", "make room, or choose another disk"
        )


@contextmanager
def staged(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `output` to fill; at the end of the block it is synced and takes that place.

    With `replace` it takes the place of the folder that is there in one step; else anything there but an empty folder
    is a ConflictError, as is another process that builds the same output. When the block fails, nothing stays; what a
    killed process left is swept by the next one.
    """
    output = output.absolute()
    if not replace and not is_vacant(output):
        raise ConflictError(f"{output}: there is something already", "choose another folder, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.loramgr-partial"
    lock = _claim(folder, output)
    try:
        yield folder
        _sync_tree(folder)
        (folder / _LOCK).unlink()
        _appear(folder, output, replace=replace)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # the old folder after an exchange, the torso after a failure
        os.close(lock)


def _claim(folder: Path, output: Path) -> int:
    """Lock the staging folder and empty it; the lock of a process that died is gone with it."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # its owner finished between the two calls
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConflictError(f"{output}: another process is writing it", "wait for it, then try again") from error
        if _is_same_file(lock, folder / _LOCK):
            break
        os.close(lock)
    for left in folder.iterdir():
        if left.name != _LOCK:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return lock


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _appear(folder: Path, output: Path, *, replace: bool) -> None:
    if replace:
        exchange(folder, output)
    else:
        try:
            folder.rename(output)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise ConflictError(f"{output}: something appeared there meanwhile", "choose another folder") from error
    _sync(output.parent)


def exchange(new: Path, old: Path) -> None:
    """Swap two folders of one file system: atomically where the system can, else in two renames."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        first, second = os.fsencode(new), os.fsencode(old)
        if library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(old))
    aside = old.parent / f"{new.name}-old"
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
