"""Files that appear whole and stay: durable folder entries, and names taken without replacing what has them."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path

__all__ = ["BatchSync", "appear", "begin_writing", "make_folder", "reserve", "sync_folder"]

_FEW = 16
_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_CANNOT_RESERVE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EINTR})
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS})


def sync_folder(folder: Path) -> None:
    """Make what appeared in the folder, or vanished from it, durable; OSError when the folder cannot be opened."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BatchSync:
    """Makes many files and folders of one file system durable with few calls, where the system can.

    It is opened before the first of them is written: `syncfs` reports what went wrong since then, from Linux 5.8 on.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> BatchSync:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def sync(self, paths: Collection[Path]) -> None:
        """Return when the files and folders are durable; OSError when one could not be written."""
        if len(paths) > _FEW and _reports_all_errors():
            _sync_file_system(self._descriptor)
            return
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _reports_all_errors() -> bool:
    """Say whether `syncfs` is there and fails when something could not be written (man 2 syncfs)."""
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return sys.platform == "linux" and version is not None and (int(version[1]), int(version[2])) >= (5, 8)


def _sync_file_system(descriptor: int) -> None:
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if library.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def begin_writing(descriptor: int, start: int, count: int) -> None:
    """Have the kernel begin to write a range of a file to the disk, where it can be asked to: the sync is shorter then.

    Nothing is durable before a sync, which also is what tells of errors (man 2 sync_file_range).
    """
    import ctypes

    if sys.platform == "linux" and count:
        library = ctypes.CDLL(None)
        if hasattr(library, "sync_file_range"):
            library.sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(count), _WRITE)


def reserve(descriptor: int, size: int) -> None:
    """Have the file system set bytes of a new file aside, where it can: writing is faster, and a full disk known first.

    Raises OSError when there is no room (man 2 fallocate).
    """
    import ctypes

    if sys.platform != "linux" or not size:
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code not in _CANNOT_RESERVE:
            raise OSError(code, os.strerror(code))


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, durable; OSError where the file system refuses."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def appear(temporary: Path, target: Path) -> bool:
    """Move a finished file to its name and say True, or leave it where it is and say False when the name is taken.

    Both are on one file system. Where that has no hard links, a file that takes the name at the same instant is
    replaced. The caller syncs the folder.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if target.exists():
            return False
        temporary.replace(target)
        return True
    temporary.unlink()
    return True
