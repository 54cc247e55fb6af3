"""Pushes and fetches over the `Remote` protocol alone: what a home holds goes there, and comes back proved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loramgr.digests import digest_bytes
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.records import FileRecord
from loramgr.remotes.protocol import Remote, RemoteLog, VersionContent
from loramgr.workspace.workspace import Workspace


def nothing(_: str) -> Entry | None:
    return None


def log_of(workspace: Workspace, name: str) -> list[Entry]:
    """Return the log of an adapter, from its first entry on."""
    store = workspace._opened.store
    entries = {digest: Entry.decode(store.entries.get(digest)) for digest in store.entries.digests()}
    followed = {entry.predecessor for entry in entries.values()}
    for entry in entries.values():
        if entry.digest not in followed and entry.name == name and entry.log == "adapter":
            chain = [entry]
            while chain[0].predecessor is not None:
                chain.insert(0, entries[chain[0].predecessor])
            return chain
    raise KeyError(name)


@dataclass(frozen=True)
class Parcel:
    """What a push of a log brings."""

    entries: Sequence[Entry]
    versions: Sequence[VersionContent]

    @property
    def files(self) -> dict[str, FileRecord]:
        return {file.digest: file for version in self.versions for file in version.files}


def parcel(workspace: Workspace, entries: Sequence[Entry], whole: Sequence[Entry]) -> Parcel:
    """Say what has to go for these entries of a whole log."""
    store, going = workspace._opened.store, {entry.digest for entry in entries}
    versions = []
    for entry in live(whole):
        if entry.digest in going:
            files = tuple(FileRecord(**file) for file in entry.content["summary"]["files"])
            digest = entry.content["version"]
            versions.append(VersionContent(entry.content["number"], digest, store.manifests.get(digest), files))
    return Parcel(entries, versions)


def push(workspace: Workspace, remote: Remote, name: str, after: RemoteLog | str | None = "") -> tuple[RemoteLog, int]:
    """Push what the remote lacks of a log; return the log there and the number of blobs that were brought."""
    whole = log_of(workspace, name)
    found = remote.log(name, nothing) if isinstance(after, str) else after
    there = {entry.digest for entry in found.entries} if found else set()
    entries = [entry for entry in whole if entry.digest not in there]
    if not entries and found is not None:
        return found, 0
    going = parcel(workspace, entries, whole)
    lacking = remote.missing(name, {digest: file.bytes for digest, file in going.files.items()})
    blobs = workspace._opened.store.blobs
    for digest in sorted(lacking):
        remote.put_blob(name, going.files[digest], blobs.path(digest))
    return remote.append(found, going.entries, going.versions, blobs.path), len(lacking)


def fetched(remote: Remote, name: str) -> dict[str, Any]:
    """Fetch a log and all its live versions, and compare every byte with its name."""
    log = remote.log(name, nothing)
    assert log is not None
    versions = {}
    for entry in live(log.entries):
        number, digest = entry.content["number"], entry.content["version"]
        assert digest_bytes(remote.read_manifest(name, number, digest)) == digest
        for told in entry.content["summary"]["files"]:
            file = FileRecord(**told)
            data = b"".join(remote.read_blob(name, number, file))
            assert (digest_bytes(data), len(data)) == (file.digest, file.bytes), file.path
            middle = file.bytes // 2
            assert b"".join(remote.read_blob(name, number, file, middle)) == data[middle:]
            versions[number, file.path] = data
    return {"log": [entry.digest for entry in log.entries], "heads": log.heads, "files": versions}
