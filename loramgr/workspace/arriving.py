"""Takes in what came from a remote: files, manifests, log entries, then the catalog, all of it or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loramgr.catalog.catalog import Writer
from loramgr.errors import ConflictError, RacedError
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.store.batch import StagedFiles, batch
from loramgr.workspace.home import Home
from loramgr.workspace.promises import files_of_entry

__all__ = ["Arrival", "take_in"]


@dataclass
class Arrival:
    """A log that came, first entry to last; `here` is the log that it takes the place of, empty for none.

    `manifests` are by their digests, `files` too, each a finished one that is proved. Live versions whose files are
    neither among them nor in the store are promised, if they are among those that the remote has by its log, `there`.
    """

    entries: list[Entry]
    here: list[Entry]
    there: frozenset[str]
    manifests: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def swaps(self) -> bool:
        """Whether entries that count here now will not."""
        common = len(self.here)
        return [entry.digest for entry in self.entries[:common]] != [entry.digest for entry in self.here]


def take_in(home: Home, arrivals: Sequence[Arrival], remote: str) -> int:
    """Take logs in, in one transaction, and return how many log entries were new.

    Raises ConflictError when a log here went on meanwhile, or a name is another log's, and IntegrityError when an entry
    makes no sense; then nothing has changed.
    """
    with home.provisional() as new, batch(home.store) as staged:
        for arrival in arrivals:
            for entry in arrival.entries:
                if not home.store.entries.contains(entry.digest):
                    staged.entries.put_bytes(entry.encode())
            for data in arrival.manifests.values():
                staged.manifests.put_bytes(data)
            for digest, path in arrival.files.items():
                _adopt(staged.blobs, digest, path)
        with ExitStack() as group, home.writing() as writer:
            fresh = [[entry.digest for entry in log] for log in _joined(writer, arrivals)]
            arriving = [digest for log in fresh for digest in log]
            group.enter_context(home.store.groups.announced(arriving, home.store.entries))
            home.store.promised.add(_lacking(home, arrivals), remote)
            new.adopt(staged.settle_files())
            staged.settle_entries(fresh)
    home.store.promised.drop(_complete(home, arrivals))
    for path in (path for arrival in arrivals for path in arrival.files.values()):
        path.unlink(missing_ok=True)
    return len(arriving)


def _joined(writer: Writer, arrivals: Sequence[Arrival]) -> list[list[Entry]]:
    for arrival in arrivals:
        _check_unmoved(writer, arrival)
    swapped = [arrival for arrival in arrivals if arrival.swaps]
    fresh = writer.swap([each.here[0].digest for each in swapped], [each.entries for each in swapped])
    return [*fresh, *writer.join([arrival.entries for arrival in arrivals if not arrival.swaps])]


def _check_unmoved(writer: Writer, arrival: Arrival) -> None:
    """Refuse to replace what somebody else has changed since it was compared."""
    if not arrival.here:
        return
    last = arrival.here[-1]
    state = writer.log_state("adapter", last.name)
    if state is None or state.head != last.digest:
        raise RacedError(f"the log of adapter {last.name!r} has moved on", "run the command again")


def _adopt(blobs: StagedFiles, digest: str, path: Path) -> None:
    try:
        blobs.adopt(digest, path)
    except FileNotFoundError as error:
        raise ConflictError(
            f"{path}: another process took the file, which it was fetching too", "run the command again"
        ) from error


def _lacking(home: Home, arrivals: Sequence[Arrival]) -> list[str]:
    """Return the digests of the live versions there whose files neither came nor are here."""
    there = {version for arrival in arrivals for version in arrival.there}
    brought = {digest for arrival in arrivals for digest in (*arrival.files, *arrival.manifests)}

    def is_here(version: str, files: Sequence[str]) -> bool:
        manifest = version in brought or home.store.manifests.contains(version)
        return manifest and all(digest in brought or home.store.blobs.contains(digest) for digest in files)

    versions = _versions(arrivals)
    return [version for version, files in versions.items() if version in there and not is_here(version, files)]


def _complete(home: Home, arrivals: Sequence[Arrival]) -> list[str]:
    """Return the digests of the versions that were promised and are here."""
    marked = home.store.promised.all()
    versions = {version: files for version, files in _versions(arrivals).items() if version in marked}
    return [version for version, files in versions.items() if home.store.holds(version, files)]


def _versions(arrivals: Sequence[Arrival]) -> dict[str, list[str]]:
    return {entry.content["version"]: files_of_entry(entry) for each in arrivals for entry in live(each.entries)}
