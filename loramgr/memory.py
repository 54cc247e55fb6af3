"""Memory for large tensors: in large pages, and used again, since the kernel clears what it gives.

To fault pages in 4 KiB at a time costs more than to read what goes there, and to clear a tensor's pages half as much.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from threading import local

__all__ = ["Memory", "fresh", "large_pages", "piece"]

Memory = Callable[[str, int], memoryview]  # gives memory for what a slot names, of so many bytes

_LARGE = 1 << 22  # bytes: below, the allocator's memory is as good and is used again
_KEPT = 1 << 26  # bytes: what is larger is too much for a thread to keep
_held = local()


def large_pages(size: int) -> bytearray | memoryview:
    """Return writable zeros of so many bytes, in pages of 2 MiB where the system has them and it is worth it."""
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(size)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them gives small ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def fresh(slot: str, size: int) -> memoryview:
    """Return memory of so many bytes that nobody else gets, whatever the slot."""
    return memoryview(large_pages(size))


def piece(slot: str, size: int) -> memoryview:
    """Return memory of so many bytes, of any content, that is this thread's own until it asks for the slot again.

    From 64 MiB on it is the caller's for good.
    """
    if size > _KEPT:
        return fresh(slot, size)
    pieces: dict[str, memoryview] = vars(_held)
    held = pieces.get(slot)
    if held is None or len(held) < size:
        held = pieces[slot] = fresh(slot, size)
    return held[:size]
