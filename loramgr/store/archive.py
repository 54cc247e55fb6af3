"""A store's content as one plain tar: `loramgr-home.json`, then entries, manifests and blobs, each sorted by digest.

The same content gives the same bytes: members have no times, owners or modes of their own. Reading takes only what
writing writes, header by header and bit by bit, so there is nothing that could be a link, a device, a path that leads
elsewhere, a second member of one name, or a size that is not the content's.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import NamedTuple

from loramgr.digests import CHUNK, PREFIX
from loramgr.errors import IncompatibleError, IntegrityError
from loramgr.store.batch import StagedFiles, StoreBatch
from loramgr.store.blobs import BlobStore
from loramgr.store.store import Store

__all__ = ["FORMAT", "Contents", "read_archive", "write_archive"]

FORMAT = 1
DESCRIPTION = "loramgr-home.json"
KINDS = ("entries", "manifests", "blobs")
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_LONGEST_DESCRIPTION = 4096
_NAME = re.compile(r"(entries|manifests|blobs)/([0-9a-f]{64})")


class Contents(NamedTuple):
    """The digests of what an archive holds, each list sorted, and the sum of their sizes in bytes."""

    entries: Sequence[str]
    manifests: Sequence[str]
    blobs: Sequence[str]
    bytes: int


def write_archive(store: Store, contents: Contents, target: BufferedWriter) -> None:
    """Write the files of a store, each proved by its digest; IntegrityError when one is missing or damaged.

    The `bytes` of the contents are those that the caller counted.
    """
    described = {kind: len(digests) for kind, digests in zip(KINDS, contents[:3], strict=True)}
    description = json.dumps({"format": FORMAT, **described, "bytes": contents.bytes}).encode()
    target.write(_header(DESCRIPTION, len(description)) + description + _padding(len(description)))
    for kind, digests in zip(KINDS, contents[:3], strict=True):
        collection: BlobStore = getattr(store, kind)
        for digest in digests:
            _write_member(collection, kind, digest, target)
    target.write(_END)


def read_archive(archive: Path, batch: StoreBatch) -> Contents:
    """Stage what an archive holds, each file proved by its digest.

    Raises IntegrityError for anything that `write_archive` would not have written, a truncated or continued archive
    among it, and IncompatibleError for the archive of a newer loramgr.
    """
    with archive.open("rb") as file:
        reader = _Archive(archive, file)
        described = _description(reader)
        found: dict[str, list[str]] = {kind: [] for kind in KINDS}
        collections = {"entries": batch.entries, "manifests": batch.manifests, "blobs": batch.blobs}
        before, size = (-1, ""), 0
        for name, member in reader.members():
            kind, digest = _identity(reader, name)
            place = (KINDS.index(kind), digest)
            if place <= before:
                raise reader.refused(f"{name} stands twice, or not in its place")
            _stage(reader, name, collections[kind], digest, member)
            found[kind].append(digest)
            before, size = place, size + member.size
    if {kind: len(digests) for kind, digests in found.items()} | {"bytes": size} != described:
        raise IntegrityError(f"{archive}: the archive does not hold what its description says: truncated or damaged")
    return Contents(found["entries"], found["manifests"], found["blobs"], size)


class _Member:
    """The content of one member, read piece by piece to its end."""

    def __init__(self, archive: _Archive, size: int) -> None:
        self.size = size
        self._archive = archive
        self._left = size

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the buffer with the next bytes and return how many, 0 at the member's end."""
        data = self._archive.take(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


class _Archive:
    """A tar that is read once, from its first byte to its last."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path = path
        self._file = file

    def refused(self, why: str) -> IntegrityError:
        """Return the error for an archive that is not as it was written."""
        return IntegrityError(f"{self._path}: {why}", "loramgr home export writes what can be imported")

    def take(self, size: int) -> bytes:
        """Return the next bytes; IntegrityError when the file ends before."""
        data = self._file.read(size)
        if len(data) != size:
            raise self.refused("the archive is truncated")
        return data

    def members(self) -> Iterator[tuple[str, _Member]]:
        """Yield the name and content of every member; the content has to be read before the next one."""
        while any(block := self.take(_BLOCK)):
            name, size = self._parse(block)
            yield name, _Member(self, size)
            if any(self.take(-size % _BLOCK)):
                raise self.refused(f"{name} is followed by bytes that do not belong there")
        if any(self.take(_BLOCK)) or self._file.read(1):
            raise self.refused("the archive goes on after its end")

    def _parse(self, block: bytes) -> tuple[str, int]:
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise self.refused(f"not a home archive, or a damaged one: {error}") from error
        if info.size < 0 or block != _header(info.name, info.size):
            raise self.refused(f"{info.name!r} is not a plain file as loramgr writes it")
        return info.name, info.size


def _write_member(collection: BlobStore, kind: str, digest: str, target: BufferedWriter) -> None:
    path, hasher, left = collection.path(digest), hashlib.sha256(), collection.size(digest)
    target.write(_header(f"{kind}/{digest.removeprefix(PREFIX)}", left))
    padding = _padding(left)
    with path.open("rb") as file:
        while left and (chunk := file.read(min(CHUNK, left))):
            hasher.update(chunk)
            target.write(chunk)
            left -= len(chunk)
        whole = not left and not file.read(1)
    if not whole or PREFIX + hasher.hexdigest() != digest:
        raise IntegrityError(f"{collection.kind} {digest} is damaged: its bytes are others", "loramgr verify")
    target.write(padding)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _description(reader: _Archive) -> Mapping[str, int]:
    name, member = next(reader.members(), (None, None))
    if member is None or name != DESCRIPTION or member.size > _LONGEST_DESCRIPTION:
        raise reader.refused(f"not a home archive: it does not begin with {DESCRIPTION}")
    try:
        described = json.loads(reader.take(member.size))
        version = described.pop("format")
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise reader.refused(f"{DESCRIPTION} is damaged: {error}") from error
    if version != FORMAT:
        raise IncompatibleError(f"the archive has format {version!r}, written by a newer loramgr", "upgrade loramgr")
    if any(reader.take(-member.size % _BLOCK)):
        raise reader.refused(f"{DESCRIPTION} is followed by bytes that do not belong there")
    counts: Mapping[str, int] = described
    return counts


def _identity(reader: _Archive, name: str) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise reader.refused(f"{name!r} is nothing that a home consists of")
    return match[1], PREFIX + match[2]


def _stage(reader: _Archive, name: str, collection: StagedFiles, digest: str, member: _Member) -> None:
    try:
        collection.put_stream(member, expected=digest)
    except IntegrityError as error:
        raise reader.refused(f"{name}: {error.message}") from error
