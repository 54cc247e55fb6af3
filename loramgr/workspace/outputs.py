"""The merged folders that were made from a home: remembered in it, so that a verification can look at them again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from loramgr.errors import LoramgrError, UncheckedError
from loramgr.store.store import SCRATCH
from loramgr.workspace.home import Home
from loramgr.workspace.merged import read_record
from loramgr.workspace.standing import modified

__all__ = ["changed_outputs", "remember"]

_FOLDER = "merged"


def remember(home: Home, output: Path, digest: str) -> None:
    """Note that a merged folder of that output digest was written.

    A home that cannot be written to keeps no note: the merge itself is done, and its folder says what it is.
    """
    folder = home.path / _FOLDER
    path = output.absolute()
    name = hashlib.sha256(os.fsencode(path)).hexdigest()
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=home.store.root / SCRATCH)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"path": str(path), "output_digest": digest}, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave a note that says nothing
        Path(temporary).replace(folder / f"{name}.json")


def changed_outputs(home: Home) -> Iterator[tuple[Path, list[str] | LoramgrError]]:
    """Yield the remembered folders, each with the names of what is not as it was written, or why that cannot be told.

    A folder that is gone, or that is another merge or none by now, is somebody's decision: it is forgotten.
    """
    for note in sorted((home.path / _FOLDER).glob("*.json")):
        try:
            said = json.loads(note.read_bytes())
            path, digest = Path(said["path"]), str(said["output_digest"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield note, UncheckedError(f"{note}: which merged folder this is cannot be read: {error}")
            continue
        if (found := _look(home, path, digest)) is None:
            with suppress(OSError):
                note.unlink()
        else:
            yield path, found


def _look(home: Home, path: Path, digest: str) -> list[str] | LoramgrError | None:
    """Return what is not as it was written, or why that cannot be told; None for a folder to be forgotten."""
    try:
        record = read_record(path)
        if record is None or record.report.output_digest != digest:
            return None
        return modified(home, path, record)
    except LoramgrError as error:
        return error
    except OSError as error:
        return UncheckedError(f"{path}: cannot be read: {error.strerror}")
