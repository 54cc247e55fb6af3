"""Versions whose files are not here but at a remote: one marker each, named by the version digest.

A marker is made before the log entries that speak of its version count, and goes when the files are here. It excuses
that they are missing, nothing else; one whose files came by another way means nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from loramgr.digests import PREFIX, is_digest
from loramgr.durable import make_folder, sync_folder

__all__ = ["Promises"]


class Promises:
    """The markers below one folder, which is made when it is needed; each says which remote has the files."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder = folder
        self._scratch = scratch

    def add(self, versions: Iterable[str], remote: str) -> None:
        """Mark versions, given by their digests, as being at that remote; durable when it returns."""
        marked = sorted(set(versions))
        for version in marked:
            self._write(version, remote)
        if marked:
            sync_folder(self._folder)

    def drop(self, versions: Iterable[str]) -> None:
        """Take the markers of versions away, where there are any."""
        if not self._folder.is_dir():
            return
        for version in versions:
            self._path(version).unlink(missing_ok=True)
        sync_folder(self._folder)

    def all(self) -> dict[str, str]:
        """Return the marked versions, each with the name or address of its remote."""
        if not self._folder.is_dir():
            return {}
        marked = {PREFIX + path.name: path for path in sorted(self._folder.iterdir())}
        return {digest: path.read_text(errors="replace") for digest, path in marked.items() if is_digest(digest)}

    def remote_of(self, version: str) -> str | None:
        """Return which remote has the files of a version, None for one that is not marked."""
        try:
            return self._path(version).read_text(errors="replace")
        except FileNotFoundError:
            return None

    def _write(self, version: str, remote: str) -> None:
        make_folder(self._folder)
        descriptor, name = tempfile.mkstemp(dir=self._scratch)
        with os.fdopen(descriptor, "w") as file:
            file.write(remote)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(self._path(version))

    def _path(self, version: str) -> Path:
        return self._folder / version.removeprefix(PREFIX)
