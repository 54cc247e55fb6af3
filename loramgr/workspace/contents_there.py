"""What a remote lacks, or has damaged, of the versions that a push sees to: files and manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from loramgr.errors import IntegrityError, LoramgrError
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import MissingThere, Remote, VersionContent
from loramgr.workspace.bringing import read_manifest
from loramgr.workspace.fetching import Wanted, read_proved
from loramgr.workspace.home import Home
from loramgr.workspace.transfers import tried

__all__ = ["Lacking", "Versions", "put_manifests", "survey"]


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions of an adapter that a push sees to, by what published them.

    `name` is what the adapter is called at the remote; `old` are those that its log there has, `new` those to come;
    `files` are the files of both, by digest.
    """

    name: str
    old: Sequence[Entry]
    new: Sequence[Entry]
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Lacking:
    """What a push has to bring: files by digest, those of them that take the place of damaged ones, and manifests.

    The manifests are those of old versions, by the entries that published them.
    """

    files: list[str]
    damaged: set[str]
    manifests: list[Entry]

    def of_old(self, versions: Versions) -> set[str]:
        """Return the files of versions that the remote's log has: it should have had these too."""
        return {file["digest"] for entry in versions.old for file in _files(entry)}.intersection(self.files)


def survey(home: Home, remote: Remote, versions: Versions, *, thorough: bool) -> Lacking:
    """Find out what the remote lacks, by presence and length; `thorough` also reads what is there and hashes it."""
    sizes = {digest: file.bytes for digest, file in versions.files.items()}
    missing = remote.missing(versions.name, sizes) if sizes else set[str]()
    by_version = {entry.content["version"]: entry for entry in versions.old}
    known = {digest: _size(home, digest) for digest in by_version}
    lacking = remote.missing_manifests(versions.name, known) if known else set[str]()
    damaged = set[str]()
    if thorough:
        wrong = _wrong_files(home, remote, versions, missing)
        damaged = {digest for digest, error in wrong.items() if not isinstance(error, MissingThere)}
        missing |= wrong.keys()
        lacking |= _wrong_manifests(home, remote, versions.name, by_version, lacking)
    return Lacking(sorted(missing), damaged, [by_version[digest] for digest in sorted(lacking)])


def put_manifests(home: Home, remote: Remote, versions: Versions, lacking: Lacking) -> None:
    """Bring the manifests that are lacking; IntegrityError where one is not here either."""
    for entry in lacking.manifests:
        number, digest = entry.content["number"], entry.content["version"]
        if not home.store.manifests.contains(digest):
            raise IntegrityError(
                f"{remote.url}: the manifest of {versions.name}@v{number} is missing or damaged there, and not here",
                f"loramgr push --repair {versions.name} from a home that has its files",
            )
        files = tuple(FileRecord(**file) for file in _files(entry))
        remote.put_manifest(versions.name, VersionContent(number, digest, home.store.manifests.get(digest), files))


def _wrong_files(home: Home, remote: Remote, versions: Versions, missing: set[str]) -> dict[str, LoramgrError]:
    """Read the files that are there and return the errors of those that are not what they should be."""
    wanted = {
        file["digest"]: Wanted(versions.name, entry.content["number"], FileRecord(**file))
        for entry in (*versions.new, *versions.old)
        for file in _files(entry)
        if file["digest"] not in missing
    }
    found = each(home.jobs, partial(tried, partial(read_proved, remote)), wanted.values())
    wrong = {digest: error for digest, error in zip(wanted, found, strict=True) if isinstance(error, LoramgrError)}
    return _integrity(wrong)


def _wrong_manifests(
    home: Home, remote: Remote, name: str, entries: Mapping[str, Entry], missing: set[str]
) -> set[str]:
    there = {digest: entry for digest, entry in entries.items() if digest not in missing}
    found = each(home.jobs, partial(tried, partial(read_manifest, remote, name)), there.values())
    wrong = {digest: error for digest, error in zip(there, found, strict=True) if isinstance(error, LoramgrError)}
    return {*_integrity(wrong)}


def _integrity(errors: dict[str, LoramgrError]) -> dict[str, LoramgrError]:
    """Return the errors, all of which are IntegrityErrors; raises the first other one."""
    for error in errors.values():
        if not isinstance(error, IntegrityError):
            raise error
    return errors


def _size(home: Home, digest: str) -> int | None:
    return home.store.manifests.size(digest) if home.store.manifests.contains(digest) else None


def _files(entry: Entry) -> list[dict[str, Any]]:
    return list(entry.content["summary"]["files"])
