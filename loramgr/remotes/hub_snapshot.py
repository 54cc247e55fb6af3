"""The files of one commit of a hub's repository, and where loramgr keeps what in them.

A version's files lie at the top, as PEFT reads them, those of older versions in the commits that brought them. What
cannot lie there is `loramgr/blobs/<hex>`; manifests and log entries are `loramgr/manifests/<hex>.json` and
`loramgr/log/<hex>.json`, all of them in every commit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loramgr.containment import is_contained
from loramgr.digests import CHUNK, PREFIX
from loramgr.errors import IntegrityError
from loramgr.records import FileRecord
from loramgr.remotes.hub_client import MAIN, HubClient

__all__ = ["CARD", "HubFile", "Snapshot", "blob_id", "entry_path", "is_own", "manifest_path", "place", "read_snapshot"]

CARD = "README.md"
_LOG = re.compile(r"loramgr/log/([0-9a-f]{64})\.json")
_MANIFESTS = re.compile(r"loramgr/manifests/([0-9a-f]{64})\.json")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MOST = 1_000_000  # files of a repository
_OWN_FOLDER = "loramgr"
_OWN_TAG = "loramgr"
_RESERVED = (CARD, ".gitattributes", ".gitignore")  # the card is made anew; the others tell the hub what to do
_REFUSED = (".git", ".cache")  # folders that the hub's client does not upload


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it: size in bytes, git's name of it, and its digest where it is kept by LFS."""

    path: str
    size: int
    oid: str
    digest: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit of a repository, by the name the repository has now, and its files by their paths."""

    repository: str
    commit: str
    files: Mapping[str, HubFile]

    @property
    def entries(self) -> list[str]:
        """The digests of the log entries there."""
        return _named(_LOG, self.files)

    @property
    def manifests(self) -> list[str]:
        """The digests of the manifests there."""
        return _named(_MANIFESTS, self.files)

    @property
    def foreign(self) -> list[str]:
        """The files of a repository without a log that are there for a purpose."""
        return sorted(path for path in self.files if path not in _RESERVED)

    def find(self, file: FileRecord) -> HubFile | None:
        """Return where a file of a version may lie here: under its digest wherever that is, or where it belongs."""
        for there in self.files.values():
            if there.digest == file.digest:
                return there if there.size == file.bytes else None
        there_too = self.files.get(place(file))
        return there_too if there_too and there_too.size == file.bytes and there_too.digest is None else None


def read_snapshot(client: HubClient, repository: str, revision: str = MAIN) -> Snapshot:
    """Ask which commit a revision is and what is in it; NotFoundError where there is no such repository or revision."""
    told = client.get_json(repository, f"api/models/{repository}/revision/{quote(revision, safe='')}")
    told = told if isinstance(told, dict) else {}
    name, commit = told.get("id"), told.get("sha")
    if not (isinstance(name, str) and _REPOSITORY.fullmatch(name) and isinstance(commit, str)):
        raise IntegrityError(f"{repository}: the hub does not say which commit {revision} is")
    if not _COMMIT.fullmatch(commit):
        raise IntegrityError(f"{repository}: the hub gives {commit[:80]!r} for a commit")
    files = {}
    for item in client.get_pages(name, f"api/models/{name}/tree/{commit}", recursive="true"):
        file = _file(name, item)
        if file is not None:
            files[file.path] = file
        if len(files) > _MOST:
            raise IntegrityError(f"{name}: more than {_MOST} files")
    return Snapshot(name, commit, files)


def is_own(told: Mapping[str, Any]) -> bool:
    """Say whether a hub's list of repositories has one with a log, by its files or by the tag in its card."""
    tags, files = told.get("tags"), told.get("siblings")
    if isinstance(tags, list) and _OWN_TAG in tags:
        return True
    paths = (file.get("rfilename") for file in files if isinstance(file, dict)) if isinstance(files, list) else ()
    return any(isinstance(path, str) and _LOG.fullmatch(path) for path in paths)


def entry_path(digest: str) -> str:
    """Return where an entry lies."""
    return f"loramgr/log/{digest.removeprefix(PREFIX)}.json"


def manifest_path(digest: str) -> str:
    """Return where a manifest lies."""
    return f"loramgr/manifests/{digest.removeprefix(PREFIX)}.json"


def place(file: FileRecord) -> str:
    """Return where a file of a version lies: at its own path, unless something else belongs there."""
    parts = file.path.split("/")
    kept_aside = file.path in _RESERVED or parts[0] == _OWN_FOLDER or any(part in _REFUSED for part in parts)
    return f"loramgr/blobs/{file.digest.removeprefix(PREFIX)}" if kept_aside else file.path


def blob_id(source: Path | bytes) -> str:
    """Return git's name of a file that is not kept by LFS (git-hash-object)."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    hasher = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if isinstance(source, bytes):
        hasher.update(source)
        return hasher.hexdigest()
    with source.open("rb") as file:
        while piece := file.read(CHUNK):
            hasher.update(piece)
    return hasher.hexdigest()


def _named(pattern: re.Pattern[str], files: Iterable[str]) -> list[str]:
    return [f"{PREFIX}{found[1]}" for path in files if (found := pattern.fullmatch(path))]


def _file(repository: str, item: Any) -> HubFile | None:
    """Read a line of the hub's listing; None for a folder."""
    told = item if isinstance(item, dict) else {}
    if told.get("type") == "directory":
        return None
    path, size, oid, lfs = told.get("path"), told.get("size"), told.get("oid"), told.get("lfs")
    if not (isinstance(path, str) and is_contained(path) and type(size) is int and size >= 0 and isinstance(oid, str)):
        raise IntegrityError(f"{repository}: the hub lists {str(item)[:80]!r} as a file")
    if lfs is None:
        return HubFile(path, size, oid, None)
    sha256 = (lfs.get("oid") or lfs.get("sha256")) if isinstance(lfs, dict) else None
    if not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise IntegrityError(f"{repository}: the hub gives no sha256 for {path}, which it keeps by LFS")
    return HubFile(path, size, oid, PREFIX + sha256)
