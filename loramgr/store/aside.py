"""Files taken out of a store's collections and kept: the trash of gc, and the quarantine of damaged files.

Each time of taking has a folder of its own, named by that time, in which the files are as they were in the store:
`trash/20260830T120000.000000Z/blobs/aa/bbcc…`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from loramgr.durable import sync_folder
from loramgr.store.blobs import BlobStore

__all__ = ["Aside"]

_NAME = "%Y%m%dT%H%M%S.%fZ"


class Aside:
    """A folder for files that were taken out of collections of the same file system; it is made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, collection: BlobStore, digests: Iterable[str], when: datetime) -> None:
        """Move files out of a collection, in this order, into the folder of that time in UTC; durable at the end."""
        collection.move(digests, _inside(self.folder / when.strftime(_NAME), collection))

    def holding(self, collection: BlobStore, digest: str) -> Iterator[BlobStore]:
        """Yield the places where there is a file of that name, sound or not, the last one taken first."""
        for _, batch in reversed(self._batches()):
            place = _inside(batch, collection)
            if place.contains(digest):
                yield place

    def taken_before(self, when: datetime) -> list[Path]:
        """Return the folders of what was taken at that time or before it, the oldest first."""
        return [batch for time, batch in self._batches() if time <= when]

    def contents(self, batch: Path, collections: Sequence[BlobStore]) -> Iterator[tuple[BlobStore, str]]:
        """Yield the files in the folder of one time, each with its place there."""
        for place in (_inside(batch, collection) for collection in collections):
            yield from ((place, digest) for digest in place.digests())

    def purge(self, batch: Path) -> None:
        """Delete the folder of one time for good."""
        shutil.rmtree(batch)
        sync_folder(self.folder)

    def _batches(self) -> list[tuple[datetime, Path]]:
        """Return the folders by their times; what has no time as its name is not ours."""
        if not self.folder.is_dir():
            return []
        times = [(_time(path.name), path) for path in self.folder.iterdir()]
        return sorted((time, path) for time, path in times if time is not None)


def _inside(batch: Path, collection: BlobStore) -> BlobStore:
    return BlobStore(batch / collection.folder.name, collection.kind, collection.scratch)


def _time(name: str) -> datetime | None:
    try:
        return datetime.strptime(name, _NAME).replace(tzinfo=UTC)
    except ValueError:
        return None
