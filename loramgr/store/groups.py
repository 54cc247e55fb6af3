"""Log entries that arrive together: a kill in the middle leaves all of them to count, or none.

The digests are written down before the first of the entries appears, and struck out once the catalog has them. Where
the catalog is made anew, a group of which something is missing does not count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loramgr.digests import is_digest
from loramgr.durable import make_folder, sync_folder
from loramgr.store.blobs import BlobStore

__all__ = ["Groups"]


class Groups:
    """The groups of entries that are on their way into a store; the folder is made when it is needed."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder = folder
        self._scratch = scratch

    @contextmanager
    def announced(self, digests: Sequence[str], entries: BlobStore) -> Iterator[None]:
        """Announce entries for the block, which stores them and has the catalog take them; a single one needs none.

        When the block fails and cannot take all of them back, the announcement stays.
        """
        if len(digests) < 2:
            yield
            return
        data = "".join(f"{digest}\n" for digest in digests).encode()
        make_folder(self._folder)
        path = self._folder / hashlib.sha256(data).hexdigest()
        temporary = self._scratch / f"group-{path.name}"
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(self._folder)
        try:
            yield
        except BaseException:
            if not any(map(entries.contains, digests)):
                path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)

    def incomplete(self, entries: BlobStore) -> set[str]:
        """Return the digests in groups of which the collection lacks an entry."""
        groups = self._groups().values()
        return {digest for group in groups if not all(map(entries.contains, group)) for digest in group}

    def drop_settled(self, strays: Collection[str]) -> None:
        """Forget the groups that have none of the entries which do not count."""
        for path, digests in self._groups().items():
            if not set(digests).intersection(strays):
                path.unlink(missing_ok=True)

    def _groups(self) -> dict[Path, list[str]]:
        if not self._folder.is_dir():
            return {}
        texts = {path: path.read_text(errors="replace") for path in sorted(self._folder.iterdir())}
        return {path: [line for line in text.splitlines() if is_digest(line)] for path, text in texts.items()}
