"""Many files put into a store at once: written first, made durable together, then given their names.

A file of a batch costs at most one sync and its share of the folders', instead of two; nothing of it has a name before
its bytes are durable, as with a single file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from loramgr.digests import digest_bytes
from loramgr.durable import BatchSync
from loramgr.errors import IntegrityError, NotFoundError, UncheckedError
from loramgr.store.blobs import BlobStore, Observer, Readable, StoredFile, copy
from loramgr.store.store import SCRATCH, Store
from loramgr.temporary import temporary_folder

__all__ = ["StagedFiles", "StoreBatch", "batch"]


class StagedFiles(BlobStore):
    """A collection whose new files wait in `scratch` until they are named; till then only it knows them.

    Several threads may put files at once; naming is for one.
    """

    def __init__(self, collection: BlobStore, scratch: Path) -> None:
        super().__init__(collection.folder, collection.kind, scratch)
        self._numbers = count()
        self._waiting: dict[str, Path] = {}
        self._found: set[Path] = set()

    @property
    def waiting(self) -> dict[str, Path]:
        """The digests of the staged files, and where these are."""
        return dict(self._waiting)

    def put_bytes(self, data: bytes) -> str:
        """Stage the bytes and return their digest; nothing is written when a sound copy is there."""
        digest = digest_bytes(data)
        if not self._is_known(digest):
            temporary = self._temporary()
            with temporary.open("xb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o444)
            self._wait(digest, temporary)
        return digest

    def put_file(self, source: Path, *, expected: str | None = None, observe: Observer | None = None) -> StoredFile:
        """Stage a file's content, as `BlobStore.put_file` stores it; `observe` sees every piece of it.

        Raises UncheckedError when the file cannot be read.
        """
        try:
            stream = source.open("rb", buffering=0)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotFoundError(f"{source}: no such file") from error
        except OSError as error:
            raise UncheckedError(f"{source}: cannot be read: {error.strerror}") from error
        with stream:
            return self.put_stream(_Source(source, stream), expected=expected, observe=observe)

    def put_stream(
        self, source: Readable, *, expected: str | None = None, observe: Observer | None = None
    ) -> StoredFile:
        """Stage what the stream gives to its end; IntegrityError when that is not `expected`."""
        temporary = self._temporary()
        with temporary.open("xb") as file:
            digest, size = copy(source, file, observe)
            os.fchmod(file.fileno(), 0o444)
        if expected not in (None, digest):
            temporary.unlink()
            raise IntegrityError(f"the content is {digest}, expected was {expected}")
        return StoredFile(digest, size, self._wait(digest, temporary))

    def adopt(self, digest: str, source: Path) -> None:
        """Stage a finished file that was hashed while it was written, where nothing has it yet.

        The source stays, read-only, so that nothing is lost when the batch is not settled. FileNotFoundError when it is
        gone.
        """
        if self._is_known(digest):
            return
        temporary = self._temporary()
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, temporary)
        temporary.chmod(0o444)
        self._wait(digest, temporary)

    def name(self, digests: Sequence[str]) -> tuple[list[str], set[Path]]:
        """Give staged files, durable by now, their names.

        Returns the digests of those that are new, and the folders whose entries are not durable yet: theirs, and those
        of files that were found where they belong, because whoever put them may not have come to that.
        """
        created, touched = [], self._found
        self._found = set()
        for digest in digests:
            temporary = self._waiting.pop(digest)
            target = self._location(digest)
            touched.add(target.parent)
            if self._appear(temporary, target):
                created.append(digest)
        return created, touched

    def _temporary(self) -> Path:
        return self.scratch / f"{self.folder.name}-{next(self._numbers)}"

    def _wait(self, digest: str, temporary: Path) -> bool:
        """Let a file wait for its name; False, and it is gone, when another one has it or waits for it."""
        waits = not self._is_known(digest) and self._waiting.setdefault(digest, temporary) is temporary
        if not waits:
            temporary.unlink()
        return waits

    def _is_known(self, digest: str) -> bool:
        if digest in self._waiting:
            return True
        known = self._is_sound(digest)
        if known:
            self._found.add(self._location(digest).parent)
        return known

    def _location(self, digest: str) -> Path:
        return self._waiting.get(digest) or super()._location(digest)


class StoreBatch(Store):
    """A store as it will be when the batch is settled; until then only whoever has it sees the new files."""

    blobs: StagedFiles
    manifests: StagedFiles
    entries: StagedFiles

    def __init__(self, store: Store, scratch: Path, sync: BatchSync) -> None:
        super().__init__(store.root, store.uuid)
        self.blobs = StagedFiles(store.blobs, scratch)
        self.manifests = StagedFiles(store.manifests, scratch)
        self.entries = StagedFiles(store.entries, scratch)
        self._sync = sync

    def settle_files(self, wanted: Container[str] | None = None) -> list[tuple[BlobStore, str]]:
        """Make staged blobs and manifests durable under their names; return the new ones with their collection.

        `wanted` are the digests that count, None for all.
        """
        chosen = [
            (collection, [digest for digest in collection.waiting if wanted is None or digest in wanted])
            for collection in (self.blobs, self.manifests)
        ]
        self._sync.sync([collection.path(digest) for collection, digests in chosen for digest in digests])
        settled: list[tuple[BlobStore, str]] = []
        folders: set[Path] = set()
        for collection, digests in chosen:
            created, touched = collection.name(digests)
            settled += [(collection, digest) for digest in created]
            folders |= touched
        self._sync.sync(folders)
        return settled

    def settle_entries(self, logs: Sequence[Sequence[str]]) -> None:
        """Make the staged entries, given log by log in their order, durable under their names.

        None has its name before the one it follows has a durable one: whatever is there is whole from its beginning.
        """
        self._sync.sync(list(self.entries.waiting.values()))
        for position in range(max(map(len, logs), default=0)):
            step = [log[position] for log in logs if position < len(log)]
            waiting = self.entries.waiting
            _, folders = self.entries.name([digest for digest in step if digest in waiting])
            self._sync.sync(folders)


class _Source(NamedTuple):
    """A file that is read; what goes wrong with it is told apart from what goes wrong with the store."""

    path: Path
    stream: Readable

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the buffer as the stream does; UncheckedError, naming the file, where it cannot be read."""
        try:
            return self.stream.readinto(buffer)
        except OSError as error:
            raise UncheckedError(f"{self.path}: cannot be read: {error.strerror}") from error


@contextmanager
def batch(store: Store) -> Iterator[StoreBatch]:
    """Give a batch for the duration of the block; what is not settled by then is gone."""
    with BatchSync(store.root) as sync, temporary_folder(store.root / SCRATCH) as scratch:
        yield StoreBatch(store, scratch, sync)
