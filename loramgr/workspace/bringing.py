"""Brings the files of versions from a remote, for several adapters at once, and takes them in with their logs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loramgr.errors import IntegrityError, LoramgrError, NotFoundError
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import Remote
from loramgr.remotes.proving import parse_manifest
from loramgr.workspace.arriving import Arrival, take_in
from loramgr.workspace.fetching import Wanted, fetch, partial_folder
from loramgr.workspace.home import Home
from loramgr.workspace.promises import files_of_entry
from loramgr.workspace.transfers import Moved, bar, tried

__all__ = ["Bringing", "bring", "read_manifest"]


@dataclass(frozen=True, slots=True)
class Bringing:
    """An adapter that is to be brought: what it is called at the remote, its log, and the versions with their files.

    `entries` is the log as it will be, `here` as it is; `wanted` are the entries that published the versions.
    """

    name: str
    entries: list[Entry]
    here: list[Entry]
    wanted: list[Entry]
    notes: tuple[str, ...] = ()

    def lacking(self, home: Home) -> list[Entry]:
        """Return the wanted versions that are not here as a whole."""
        return [each for each in self.wanted if not home.store.holds(each.content["version"], files_of_entry(each))]

    def files(self, home: Home) -> dict[str, Wanted]:
        """Return the files that have to come, by digest."""
        contains = home.store.blobs.contains
        return {
            file["digest"]: Wanted(self.name, entry.content["number"], FileRecord(**file))
            for entry in self.lacking(home)
            for file in entry.content["summary"]["files"]
            if not contains(file["digest"])
        }

    def moved(self, home: Home, coming: Container[str]) -> Moved:
        """Return what bringing it moves, but for the files that come already, given by their digests."""
        files = {digest: wanted for digest, wanted in self.files(home).items() if digest not in coming}
        known = {entry.digest for entry in self.here}
        name = self.entries[-1].name
        return Moved(
            len(files),
            len({digest for entry in self.wanted for digest in files_of_entry(entry)}) - len(files),
            sum(wanted.file.bytes for wanted in files.values()),
            sum(entry.digest not in known for entry in self.entries),
            tuple(f"{name}@v{entry.content['number']}" for entry in self.lacking(home)),
            self.notes,
        )


def bring(
    home: Home, remote: Remote, label: str, expected: Sequence[tuple[Bringing, Moved]]
) -> Iterator[tuple[str, Moved | LoramgrError]]:
    """Fetch what the adapters lack and take them in; yield of each what was moved, as expected, or why it was not."""
    adapters = [adapter for adapter, _ in expected]
    wanted = {digest: file for adapter in adapters for digest, file in adapter.files(home).items()}
    what = adapters[0].name if len(adapters) == 1 else f"{len(adapters)} adapters"
    with bar(home, what, sum(each.file.bytes for each in wanted.values())) as progress:
        work = partial(_fetched, remote, partial_folder(home.cache), progress.update)
        files = dict(zip(wanted, each(home.jobs, partial(tried, work), wanted.values()), strict=True))
    ready: list[tuple[Bringing, Arrival, Moved]] = []
    arrivals = each(home.jobs, partial(tried, partial(_arrival, home, remote, files)), adapters)
    for (adapter, moved), arrival in zip(expected, arrivals, strict=True):
        if isinstance(arrival, LoramgrError):
            yield adapter.name, arrival
        else:
            ready.append((adapter, arrival, moved))
    yield from _taken_in(home, label, ready)


def read_manifest(remote: Remote, name: str, entry: Entry) -> bytes:
    """Return the manifest of the version that an entry published; IntegrityError unless it says what the entry says."""
    number, digest, summary = entry.content["number"], entry.content["version"], entry.content["summary"]
    where = f"{remote.url}: manifest of {name}@v{number}"
    try:
        data = remote.read_manifest(name, number, digest)
    except NotFoundError as error:
        raise IntegrityError(f"{where} is missing there", "loramgr remote verify") from error
    told = parse_manifest(where, digest, data)
    said = {key: summary[key] for key in ("method", "base", "files")}
    if {key: told.get(key) for key in said} != said:
        raise IntegrityError(f"{where} does not say what its log entry says", "loramgr remote verify")
    return data


def _fetched(remote: Remote, folder: Path, observe: Callable[[int], object], wanted: Wanted) -> Path:
    return fetch(remote, wanted, folder, observe)


def _arrival(home: Home, remote: Remote, files: dict[str, Path | LoramgrError], adapter: Bringing) -> Arrival:
    """Put together what came for an adapter; raises the error of the first file that did not come."""
    arrival = Arrival(adapter.entries, adapter.here)
    for digest in {digest for entry in adapter.wanted for digest in files_of_entry(entry)} & files.keys():
        found = files[digest]
        if isinstance(found, LoramgrError):
            raise found
        arrival.files[digest] = found
    for entry in adapter.lacking(home):
        if not home.store.manifests.contains(entry.content["version"]):
            arrival.manifests[entry.content["version"]] = read_manifest(remote, adapter.name, entry)
    return arrival


def _taken_in(
    home: Home, label: str, ready: Sequence[tuple[Bringing, Arrival, Moved]]
) -> Iterator[tuple[str, Moved | LoramgrError]]:
    """Take in all at once; where one of them is refused, one by one."""
    if not ready:
        return
    try:
        take_in(home, [arrival for _, arrival, _ in ready], label)
    except LoramgrError as error:
        if len(ready) == 1:
            yield ready[0][0].name, error
            return
        for single in ready:
            yield from _taken_in(home, label, [single])
        return
    yield from ((adapter.name, moved) for adapter, _, moved in ready)
