"""The store of a workspace: blobs, manifests and log entries below one folder, and the UUID that names it."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from loramgr.durable import make_folder, sync_folder
from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError
from loramgr.store.aside import Aside
from loramgr.store.blobs import FANOUT, BlobStore
from loramgr.store.groups import Groups
from loramgr.store.promised import Promises
from loramgr.temporary import temporary_folder

__all__ = ["LAYOUT", "Store"]

LAYOUT = 1
COLLECTIONS = {"blobs": "blob", "manifests": "manifest", "entries": "log entry"}
SCRATCH = "scratch"
DESCRIPTION = "workspace.json"
PREFIX = ".store-"


class Store:
    """A store that exists; opening it writes nothing, so it can be read from a read-only mount.

    `blobs` holds the files of versions, `manifests` what versions are, `entries` what happened to names; `trash` what
    gc took out of them, `quarantine` what was damaged; `groups` are entries that count only together, `promised` the
    versions whose files are at a remote. `uuid` pairs the store with its catalog.
    """

    def __init__(self, root: Path, uuid: str) -> None:
        self.root = root
        self.uuid = uuid
        self.blobs, self.manifests, self.entries = (
            BlobStore(root / folder, kind, root / SCRATCH) for folder, kind in COLLECTIONS.items()
        )
        self.groups = Groups(root / "groups", root / SCRATCH)
        self.promised = Promises(root / "promised", root / SCRATCH)
        self.trash, self.quarantine = Aside(root / "trash"), Aside(root / "quarantine")

    def unkept_promises(self, versions: Mapping[str, Collection[str]]) -> dict[str, str]:
        """Return which of the versions are not here as a whole, but at a remote, each with that.

        They are given by their digests, each with the digests of its files.
        """
        marked = self.promised.all()
        return {
            version: remote
            for version, remote in marked.items()
            if version in versions and not self.holds(version, versions[version])
        }

    def holds(self, version: str, files: Iterable[str]) -> bool:
        """Say whether the manifest of a version and its files, given by their digests, are here, sound or not."""
        return self.manifests.contains(version) and all(map(self.blobs.contains, files))

    @property
    def collections(self) -> tuple[BlobStore, BlobStore, BlobStore]:
        """The collections in the order in which files may go: what refers to others first."""
        return self.entries, self.manifests, self.blobs

    @classmethod
    def create(cls, root: Path) -> Store:
        """Make an empty store and return it, or the one that is there already.

        It appears whole, by rename, so of two processes that make it at once the second opens the first one's.
        Raises OSError where the file system refuses.
        """
        if not (root / DESCRIPTION).exists():
            make_folder(root.parent)
            _make(root)
        return cls.open(root)

    @classmethod
    def open(cls, root: Path) -> Store:
        """Open the store.

        Raises NotFoundError when there is none, IntegrityError when its description is damaged, and
        IncompatibleError when a newer loramgr wrote it.
        """
        description = _read_description(root)
        layout, identity = description.get("layout"), description.get("uuid")
        if not isinstance(layout, int) or not isinstance(identity, str):
            raise IntegrityError(f"{root / DESCRIPTION}: the description of the store lacks its layout or UUID")
        if layout != LAYOUT:
            raise IncompatibleError(
                f"{root}: the store has layout {layout}, written by a newer loramgr", "upgrade loramgr"
            )
        return cls(root, identity)


def _read_description(root: Path) -> dict[str, Any]:
    path = root / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if root.is_dir() and any(root.iterdir()):
            raise IntegrityError(f"{root}: the folder is no store, or lost its {DESCRIPTION}") from error
        raise NotFoundError(f"{root}: there is no store", "loramgr add or loramgr base add makes one") from error
    except ValueError as error:
        raise IntegrityError(f"{path}: the description of the store is damaged: {error}") from error
    if not isinstance(description, dict):
        raise IntegrityError(f"{path}: the description of the store is damaged: not a JSON object")
    return description


def _make(root: Path) -> None:
    with temporary_folder(root.parent, PREFIX) as temporary:
        temporary.chmod(0o755)
        _fill(temporary)
        try:
            temporary.rename(root)
        except OSError:
            if not (root / DESCRIPTION).exists():
                raise
        sync_folder(root.parent)


def _fill(root: Path) -> None:
    (root / SCRATCH).mkdir()
    for collection in COLLECTIONS:
        for first in FANOUT:
            (root / collection / first).mkdir(parents=True)
        sync_folder(root / collection)
    with (root / DESCRIPTION).open("w") as file:
        json.dump({"layout": LAYOUT, "uuid": str(uuid.uuid4())}, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(root)
