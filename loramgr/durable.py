"""Files that appear whole and stay: durable folder entries, and names taken without replacing what has them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["appear", "sync_folder"]

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS})


def sync_folder(folder: Path) -> None:
    """Make what appeared in the folder, or vanished from it, durable; OSError when the folder cannot be opened."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
