"""Reads the log that a commit of a hub's repository holds and proves it; what is known of it is not fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramgr.errors import ConflictError, IntegrityError, NotFoundError
from loramgr.log import Entry
from loramgr.remotes.hub_client import HubClient
from loramgr.remotes.hub_snapshot import Snapshot, entry_path
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import KnownEntry, RemoteLog, ends
from loramgr.remotes.proving import ENTRY_LIMIT, check_log, prove_entry
from loramgr.remotes.reading import LOG_BYTES, LOG_ENTRIES

__all__ = ["HubState", "Top", "read_log", "top_of"]


@dataclass(frozen=True, slots=True)
class HubState:
    """A repository as it was read: its commit, and the entries there by their digests, each after its predecessor."""

    snapshot: Snapshot
    entries: Mapping[str, Entry]

    @property
    def name(self) -> str | None:
        """What the log is called, None where there is none; of a fork, by the head that is the newest."""
        heads = [self.entries[digest] for digest in ends([*self.entries.values()])]
        return max(heads, key=lambda entry: (entry.time, entry.digest)).name if heads else None

    def log(self, name: str) -> RemoteLog | None:
        """Return the log as that of a name; None where there is none, or where it is called otherwise."""
        heads = ends([*self.entries.values()])
        if not any(self.entries[digest].name == name for digest in heads):
            return None
        return RemoteLog(name, tuple(self.entries.values()), heads, self.snapshot.commit)


@dataclass(frozen=True, slots=True)
class Top:
    """The version whose files lie at the top of a commit, with what was said of it since."""

    published: Entry
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    removed: bool


def read_log(client: HubClient, snapshot: Snapshot, known: KnownEntry, jobs: int) -> HubState:
    """Read all entries of a commit; IntegrityError where they are not whole, sound, and each after its predecessor."""
    where = f"{snapshot.repository}: log"
    digests = snapshot.entries
    if len(digests) > LOG_ENTRIES:
        raise IntegrityError(f"{where}: more than {LOG_ENTRIES} entries")

    def read(digest: str) -> Entry:
        path = entry_path(digest)
        at = f"{snapshot.repository}: log entry {digest}"
        try:
            try:
                return prove_entry(at, digest, client.read(snapshot.repository, snapshot.commit, path, ENTRY_LIMIT))
            except IntegrityError:  # damaged on its way, or there
                return prove_entry(at, digest, client.read(snapshot.repository, snapshot.commit, path, ENTRY_LIMIT))
        except NotFoundError as error:
            raise IntegrityError(f"{at} is listed, and is not there") from error

    entries = {digest: entry for digest in digests if (entry := known(digest)) is not None}
    size = 0
    for entry in each(jobs, read, [digest for digest in digests if digest not in entries]):
        entries[entry.digest] = entry
        size += len(entry.encode())
        if size > LOG_BYTES:
            raise IntegrityError(f"{where}: more than {LOG_BYTES >> 20} MiB")
    ordered = _ordered(where, entries)
    check_log(where, [*ordered.values()])
    return HubState(snapshot, ordered)


def top_of(entries: Mapping[str, Entry], manifests: set[str]) -> Top | None:
    """Return which version lies at the top: the one with the highest number whose manifest is there."""
    published = [
        entry for entry in entries.values() if entry.kind == "publish" and entry.content["version"] in manifests
    ]
    if not published:
        return None
    top = max(published, key=lambda entry: (int(entry.content["number"]), entry.digest))
    number = top.content["number"]
    metrics: dict[str, Any] = dict(top.content["metrics"])
    tags = set(top.content["tags"])
    removed = False
    for entry in entries.values():
        content = entry.content
        if entry.kind == "metric" and content["number"] == number:
            metrics.update(content["metrics"])
        elif entry.kind == "tag":
            tags = tags | {content["tag"]} if content["number"] == number else tags - {content["tag"]}
        elif entry.kind == "untag":
            tags.discard(content["tag"])
        elif entry.kind == "remove" and (content["whole"] or number in content["numbers"]):
            removed, tags = True, set()
        elif entry.kind == "restore" and number in content["numbers"]:
            removed = False
    kept = {key: float(value) for key, value in metrics.items() if value is not None}
    return Top(top, kept, tuple(sorted(tags)), removed)


def _ordered(where: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Put each entry after its predecessor; IntegrityError where one is missing."""
    ordered: dict[str, Entry] = {}
    for digest in sorted(entries, key=lambda digest: (entries[digest].time, digest)):
        branch: list[Entry] = []
        following: str | None = digest
        while following is not None and following not in ordered:
            if following not in entries:
                raise IntegrityError(f"{where}: the entry {following} is missing", "push it from a home that has it")
            branch.append(entries[following])
            following = entries[following].predecessor
        ordered.update((entry.digest, entry) for entry in reversed(branch))
    roots = [entry for entry in ordered.values() if entry.predecessor is None]
    if len(roots) > 1:
        raise ConflictError(f"{where}: holds the logs of several adapters: {', '.join(sorted(e.name for e in roots))}")
    return ordered
