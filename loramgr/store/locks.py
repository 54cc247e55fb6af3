"""The lock of a store: whoever puts files into it and publishes them shares it, gc has it alone.

It is taken before the catalog's transaction, never inside one. Readers take none. The kernel drops what a dead process
held, so no lock is ever stale.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramgr.errors import ConflictError

__all__ = ["LOCK", "WAIT_SECONDS", "locked"]

LOCK = "lock"
WAIT_SECONDS = 60.0
_PAUSE_SECONDS = 0.02


@contextmanager
def locked(root: Path, *, exclusive: bool = False, seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of the store at `root` for the duration of the block, shared or exclusive.

    `seconds` is how long to wait for others, None for `WAIT_SECONDS`; then ConflictError. A process may share it
    several times at once, but has to let go of it before it asks for it alone. Raises OSError where the lock's file
    cannot be made: read-only.
    """
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        wanted = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        if not _acquired(descriptor, wanted, WAIT_SECONDS if seconds is None else seconds):
            holder = "other commands are writing" if exclusive else "loramgr gc or verify --repair is running"
            raise ConflictError(f"{root}: the store is locked, {holder}", "run the command again when they are done")
        yield
    finally:
        os.close(descriptor)


def _acquired(descriptor: int, wanted: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, wanted | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
