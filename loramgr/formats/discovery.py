"""Adapters in the folders beneath a folder, in the order in which they came to be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from loramgr.errors import UncheckedError
from loramgr.formats.folder import CONFIGURATION

__all__ = ["DEPTH", "find_adapters", "is_checkpoint"]

DEPTH = 3
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def find_adapters(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Return the folders with an adapter's configuration, at most `depth` folders beneath this one, and itself.

    They are sorted by name, the checkpoints of a run by their numbers, and a folder comes after those in it: a run's
    checkpoints, then its end. Hidden folders and links to folders are passed over. Raises UncheckedError for a folder
    that cannot be read.
    """
    return list(_walk(folder, depth))


def is_checkpoint(folder: Path) -> bool:
    """Say whether a folder is a state of the run whose folder it lies in."""
    return folder.name.startswith("checkpoint-")


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
        folders = [path for path in entries if path.is_dir() and not path.is_symlink()] if depth else []
    except OSError as error:
        raise UncheckedError(f"{folder}: cannot be read: {error.strerror}") from error
    for below in sorted(folders, key=_order):
        yield from _walk(below, depth - 1)
    if any(path.name == CONFIGURATION for path in entries):
        yield folder


def _order(folder: Path) -> tuple[bool, int, str]:
    numbered = _NUMBERED.fullmatch(folder.name)
    return numbered is None, int(numbered[1]) if numbered else 0, folder.name
