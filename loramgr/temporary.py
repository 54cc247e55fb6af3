"""Temporary folders that a sweep can tell from those that a killed process left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["is_abandoned", "sweep", "temporary_folder"]


@contextmanager
def temporary_folder(parent: Path | None, prefix: str = "") -> Iterator[Path]:
    """Give a new folder for the duration of the block and take it away after it, unless it was renamed.

    The process holds a lock on it, which the kernel drops when the process dies. `parent` None is the system's folder
    for temporary files. Raises OSError where the folder cannot be made.
    """
    folder, lock = _claim(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed is for the next sweep, the work is done
        os.close(lock)


def is_abandoned(folder: Path) -> bool:
    """Say whether no living process works in the folder; False also where the file system cannot tell."""
    with _alone(folder) as alone:
        return alone


def sweep(folder: Path) -> None:
    """Delete a folder unless a living process works in it, which nobody can begin meanwhile."""
    with _alone(folder) as alone:
        if alone:
            shutil.rmtree(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False  # its process has taken it away meanwhile
        return
    try:
        yield _locked(lock)
    finally:
        os.close(lock)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _claim(parent: Path | None, prefix: str) -> tuple[Path, int]:
    """Make a folder and lock it; again, when a sweep took it for an old one between the two."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        except OSError:
            folder.rmdir()
            raise
        with suppress(OSError):  # without locks for folders, as on some network file systems, only age tells
            fcntl.flock(lock, fcntl.LOCK_SH)
        if folder.is_dir():
            return folder, lock
        os.close(lock)
