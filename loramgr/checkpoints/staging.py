"""Folders that appear whole: built beside their place, synced, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loramgr.durable import make_folder
from loramgr.errors import ConflictError, LoramgrError, UsageError

__all__ = ["check_apart", "check_free", "exchange", "is_vacant", "settle", "staged", "sweep"]

_LOCK, _FOLDER, _ASIDE = "loramgr-lock", "loramgr-partial", "loramgr-replaced"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def is_vacant(output: Path) -> bool:
    """Say whether a folder may appear at this path: nothing is there, or an empty folder."""
    if output.is_symlink() or not output.is_dir():
        return not os.path.lexists(output)
    return not any(output.iterdir())


def check_apart(output: Path, model: Path) -> None:
    """Raise UsageError when the output would lie inside the model folder, whose files are copied with all below it."""
    inside, place = model.resolve(), output.resolve()
    if inside in place.parents:
        raise UsageError(f"{output} lies in the model folder {model}, of which it is to be a copy", "-o DIR beside it")


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
def staged(output: Path, *, replace: bool = False, resume: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `output` to fill; at the end of the block it is synced and takes that place.

    With `replace` it takes the place of the folder that is there in one step; else anything there but an empty folder
    is a ConflictError, as is another process that builds the same output. When the block fails, nothing stays; what a
    killed process left is swept by the next one, or with `resume` given to it to go on.
    """
    output = output.absolute()
    make_folder(output.parent)
    with _claimed(output, keep=resume) as folder:
        if not replace and not is_vacant(output):
            raise ConflictError(f"{output}: there is something already", "choose another folder, or remove it")
        folder.mkdir(exist_ok=True)
        try:
            yield folder
            _sync_tree(folder)
        except OSError as error:
            error.filename = error.filename or str(output)  # a full disk is found by calls that know no name
            raise
        _appear(folder, output, replace=replace)


def sweep(output: Path) -> None:
    """Take away what a killed process that was building `output` left beside it, and put back what it moved aside.

    Raises ConflictError when a process is still building it.
    """
    output = output.absolute()
    if any(os.path.lexists(path) for path in (_beside(output, mark) for mark in (_LOCK, _FOLDER, _ASIDE))):
        with _claimed(output):
            pass


def settle(output: Path) -> None:
    """Put back what a killed process moved out of the place of `output`, where it could not exchange folders at once.

    Raises ConflictError when a process is working there.
    """
    output = output.absolute()
    if _beside(output, _ASIDE).exists():
        sweep(output)


def _beside(output: Path, mark: str) -> Path:
    return output.parent / f".{output.name}.{mark}"


@contextmanager
def _claimed(output: Path, *, keep: bool = False) -> Iterator[Path]:
    """Give the place of the staging folder to one process; a dead one's lock is gone with it, and its folder too.

    With `keep` the folder stays, unless an exchange of folders was cut off: then it may be the old one.

    The lock lies beside the folder, so that it is held until the last of the folder has been taken away.
    """
    path, folder, aside = (_beside(output, mark) for mark in (_LOCK, _FOLDER, _ASIDE))
    lock = _lock(path, output)
    try:
        keep = keep and not aside.exists()
        if aside.exists():
            shutil.rmtree(aside) if output.exists() else aside.rename(output)
        if folder.exists() and not keep:
            shutil.rmtree(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # the old folder after an exchange, the torso after a failure
        with suppress(OSError):  # the work is done or has failed already; the next one can use the file as well
            path.unlink()
        os.close(lock)


def _lock(path: Path, output: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConflictError(f"{output}: another process is writing it", "wait for it, then try again") from error
        if _is_same_file(lock, path):
            return lock
        os.close(lock)  # its last owner took the file away between the two calls


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
    """Swap two folders of one file system: atomically where the system can, else in renames that `sweep` can undo."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        first, second = os.fsencode(new), os.fsencode(old)
        if library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(old))
    aside = _beside(old, _ASIDE)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
