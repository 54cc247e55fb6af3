"""Who refers to which blob: every file of every version, with the adapter and the base it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import Connection, and_, func, select

from loramgr.catalog.tables import Log, Version, VersionFile
from loramgr.catalog.versions import base_name

__all__ = ["BlobUse", "blob_uses"]


class BlobUse(NamedTuple):
    """One reference to a blob; `base` is the base's name, else its digest, and None for a version without one."""

    digest: str
    bytes: int
    adapter: str
    base: str | None
    removed: bool


def blob_uses(connection: Connection) -> Iterator[BlobUse]:
    """Yield the references of all versions to their files, each once for an adapter, removed versions included."""
    of_version = and_(VersionFile.root == Version.root, VersionFile.number == Version.number)
    statement = (
        select(
            VersionFile.digest,
            VersionFile.bytes,
            Log.name,
            func.coalesce(base_name(), Version.base_digest),
            Version.removed,
        )
        .join(Version, of_version)
        .join(Log, Log.root == Version.root)
        .distinct()
    )
    yield from (BlobUse(*row) for row in connection.execute(statement))
