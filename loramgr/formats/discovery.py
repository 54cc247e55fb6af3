"""Adapters in a folder and in those beneath it, in the order in which they came to be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loramgr.errors import LoramgrError, UncheckedError
from loramgr.formats.folder import CONFIGURATION, candidates
from loramgr.formats.registry import told_instead

__all__ = ["DEPTH", "Found", "find_adapters", "is_checkpoint"]

DEPTH = 3
_NUMBERED = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Found:
    """The adapters that were found, and what each file is that might have been one: path → a sentence."""

    adapters: list[Path]
    skipped: dict[str, str] = field(default_factory=dict)


def find_adapters(folder: Path, depth: int = DEPTH) -> Found:
    """Find the adapters in a folder and at most `depth` folders beneath it.

    An adapter is a folder with a configuration or with one file of weights alone, and where several such files lie side
    by side every file that a format recognises, or that is damaged. They are sorted by name, the checkpoints of a run
    by their numbers, and a folder comes after those in it: a run's checkpoints, then its end. Hidden folders and links
    to folders are passed over, and files beneath a folder with a configuration. Raises UncheckedError for a folder that
    cannot be read.
    """
    found = Found([])
    found.adapters.extend(_walk(folder, depth, found, is_of_adapter=False))
    return found


def is_checkpoint(folder: Path) -> bool:
    """Say whether a folder is a state of the run whose folder it lies in."""
    return folder.name.startswith("checkpoint-")


def _walk(folder: Path, depth: int, found: Found, *, is_of_adapter: bool) -> Iterator[Path]:
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
        folders = [path for path in entries if path.is_dir() and not path.is_symlink()] if depth else []
    except OSError as error:
        raise UncheckedError(f"{folder}: cannot be read: {error.strerror}") from error
    has_configuration = any(path.name == CONFIGURATION for path in entries)
    for below in sorted(folders, key=_order):
        yield from _walk(below, depth - 1, found, is_of_adapter=is_of_adapter or has_configuration)
    if has_configuration:
        yield folder
    elif not is_of_adapter:
        yield from _single_files(folder, found)


def _single_files(folder: Path, found: Found) -> Iterator[Path]:
    """Yield the files of a folder that are adapters by themselves, or the folder where it holds no other weights."""
    names = candidates(folder)
    for path in (folder / name for name in names):
        try:
            told = told_instead(path)
        except LoramgrError:  # what is damaged is told by whoever reads it
            told = None
        if told is not None:
            found.skipped[str(path)] = told.sentence
        else:
            yield folder if len(names) == 1 else path


def _order(folder: Path) -> tuple[bool, int, str]:
    numbered = _NUMBERED.fullmatch(folder.name)
    return numbered is None, int(numbered[1]) if numbered else 0, folder.name
