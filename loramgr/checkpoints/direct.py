"""Writes past the page cache: to fill its pages costs more of the processor than to compute what goes there.

Aligned pieces of memory go to aligned places of a file (man 2 open, O_DIRECT). The rest of a file may be written in the
usual way at the same time, as long as no page is written in both.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

__all__ = ["PAGE", "open_direct", "write_direct"]

PAGE = max(4096, mmap.PAGESIZE)  # bytes: the cache's page, and no file system asks for a coarser alignment
_LEAST = 1 << 20  # bytes: what is smaller waits longer for the disk than it takes to copy
_STEP = 1 << 24  # bytes of one call: a failure is told, and an interrupt is heard, before the next
_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})


def open_direct(path: Path) -> int | None:
    """Open a file that is there for direct writes; None where the system or the file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return None


def write_direct(descriptor: int, data: memoryview, offset: int) -> range:
    """Write the whole pages of the data that is to lie at an offset of the file; return which bytes of it are written.

    None are where memory and file are not aligned alike, or the file system refuses: the caller writes the rest. Raises
    OSError for everything else, as for a full disk.
    """
    begin, end = -offset % PAGE, len(data) - (offset + len(data)) % PAGE
    if data.readonly or end - begin < _LEAST or (_address(data) + begin) % PAGE:
        return range(0)
    at = begin
    while at < end:
        try:
            count = os.pwrite(descriptor, data[at : min(at + _STEP, end)], offset + at)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            break
        at += count
        if count % PAGE:
            break
    return range(begin, at)


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))
