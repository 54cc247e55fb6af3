"""Which shards of a model folder in the making are complete and durable, so that a killed run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

from loramgr.digests import TensorDigest, digest_file
from loramgr.durable import sync_folder

__all__ = ["JOURNAL", "Journal"]

JOURNAL = ".loramgr-finished"


class Journal:
    """The notes in a folder, for one plan: a text that differs for everything that would be written differently."""

    def __init__(self, folder: Path, plan: str) -> None:
        self._folder = folder
        self._path = folder / JOURNAL
        self._plan = plan
        self._lock = Lock()

    def begin(self) -> dict[str, list[TensorDigest]]:
        """Return the tensors of the shards that a killed run of this plan noted, and empty the folder of all else.

        Their further files are as they were noted; the shards themselves are to be hashed again.
        """
        noted = self._noted()
        kept = {self._folder / name for shard, files, _ in noted for name in (shard, *files)}
        for root, folders, names in os.walk(self._folder, topdown=False):
            for path in (Path(root, name) for name in (*names, *folders)):
                if path.is_dir() and not path.is_symlink():
                    with suppress(OSError):  # it has something that is kept
                        path.rmdir()
                elif path not in kept:
                    path.unlink()  # never written to: it may be a second name of a file that is in use
        self._path.write_text(self._plan + "\n" + "".join(f"{json.dumps(note)}\n" for note in noted))
        sync_folder(self._folder)
        return {shard: tensors for shard, _, tensors in noted}

    def note(self, shard: str, files: Sequence[str], tensors: Sequence[TensorDigest]) -> None:
        """Note that a shard is complete: its further files, durable as it is, and the digests of its tensors."""
        digests = {name: digest_file(self._folder / name) for name in files}
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps([shard, digests, tensors]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """Take the journal out of the folder: everything is written."""
        self._path.unlink(missing_ok=True)

    def _noted(self) -> list[_Note]:
        try:
            plan, *lines = self._path.read_text().splitlines()
        except (OSError, ValueError):  # there is none, or a power cut left something else; either way nothing counts
            return []
        noted = [note for line in lines if (note := _parsed(line)) is not None] if plan == self._plan else []
        return [note for note in noted if self._is_there(*note)]

    def _is_there(self, shard: str, files: dict[str, str], _: object) -> bool:
        paths = {self._folder / name: digest for name, digest in files.items()}
        whole = all(path.is_file() and digest_file(path) == digest for path, digest in paths.items())
        return whole and (self._folder / shard).is_file()


_Note = tuple[str, dict[str, str], list[TensorDigest]]


def _parsed(line: str) -> _Note | None:
    """Read a line back; None for one that a kill cut short."""
    try:
        shard, files, tensors = json.loads(line)
        return shard, files, [TensorDigest(name, dtype, tuple(shape), sha) for name, dtype, shape, sha in tensors]
    except (ValueError, TypeError):
        return None
