"""Memory for large reads, in large pages: to fault in 4 KiB at a time costs more than to read what goes there."""

from __future__ import annotations

import mmap
from contextlib import suppress
from threading import local

__all__ = ["large_pages", "piece"]

_LARGE = 1 << 22  # bytes: below, the allocator's memory is as good and is used again
_held = local()


def large_pages(size: int) -> bytearray | memoryview:
    """Return writable zeros of so many bytes, in pages of 2 MiB where the system has them and it is worth it."""
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(size)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them gives small ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def piece(size: int) -> memoryview:
    """Return memory of so many bytes, of any content, that is this thread's own until it asks again."""
    held: memoryview | None = getattr(_held, "memory", None)
    if held is None or len(held) < size:
        held = _held.memory = memoryview(large_pages(size))
    return held[:size]
