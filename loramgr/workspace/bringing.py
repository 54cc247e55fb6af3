"""Brings the files of versions from a remote, for several adapters at once, and takes them in with their logs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loramgr.errors import IntegrityError, LoramgrError, NotFoundError
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import MissingThere, Remote, mending
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

    `entries` is the log as it will be, `here` as it is; `wanted` are the entries that published the versions,
    `there` the digests of the versions that the remote has by its log.
    """

    name: str
    entries: list[Entry]
    here: list[Entry]
    wanted: list[Entry]
    notes: tuple[str, ...] = ()
    there: frozenset[str] = frozenset()

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
    withheld: list[tuple[str, LoramgrError]] = []
    sorted_out = each(home.jobs, partial(tried, partial(_whole, home, remote, files)), adapters)
    for (adapter, moved), found in zip(expected, sorted_out, strict=True):
        if isinstance(found, LoramgrError):
            yield adapter.name, found
            continue
        good, arrival, errors = found
        ready.append((good, arrival, good.moved(home, ()) if errors else moved))
        withheld += [(adapter.name, _withheld(adapter, errors))] if errors else []
    yield from _taken_in(home, label, ready)
    yield from withheld


def read_manifest(remote: Remote, name: str, entry: Entry) -> bytes:
    """Return the manifest of the version that an entry published; IntegrityError unless it says what the entry says."""
    number, digest, summary = entry.content["number"], entry.content["version"], entry.content["summary"]
    where = f"{remote.url}: manifest of {name}@v{number}"
    try:
        data = remote.read_manifest(name, number, digest)
    except NotFoundError as error:
        raise MissingThere(f"{where} is missing there", mending(name, remote.url)) from error
    except IntegrityError as error:
        raise IntegrityError(error.message, error.hint or mending(name, remote.url)) from error
    told = parse_manifest(where, digest, data)
    said = {key: summary[key] for key in ("method", "base", "files")}
    if {key: told.get(key) for key in said} != said:
        raise IntegrityError(f"{where} does not say what its log entry says", mending(name, remote.url))
    return data


def _fetched(remote: Remote, folder: Path, observe: Callable[[int], object], wanted: Wanted) -> Path:
    return fetch(remote, wanted, folder, observe)


def _whole(
    home: Home, remote: Remote, files: dict[str, Path | LoramgrError], adapter: Bringing
) -> tuple[Bringing, Arrival, dict[int, LoramgrError]]:
    """Put together what came for an adapter, but for versions that are damaged there, told by number with the error.

    Raises the first error where no version came, or it is no damage of a file.
    """
    arrival, errors = Arrival(adapter.entries, adapter.here, adapter.there), dict[int, LoramgrError]()
    lacking = adapter.lacking(home)
    for entry in lacking:
        came = {digest: files[digest] for digest in files_of_entry(entry) if digest in files}
        manifest = _manifest(home, remote, adapter.name, entry)
        wrong = [found for found in (*came.values(), manifest) if isinstance(found, LoramgrError)]
        for error in wrong:
            if not isinstance(error, IntegrityError):
                raise error
        if wrong:
            errors[entry.content["number"]] = wrong[0]
            continue
        arrival.files |= {digest: found for digest, found in came.items() if isinstance(found, Path)}
        arrival.manifests |= {entry.content["version"]: manifest} if isinstance(manifest, bytes) else {}
    if errors and len(errors) == len(lacking):
        raise next(iter(errors.values()))
    wanted = [entry for entry in adapter.wanted if entry.content["number"] not in errors]
    return replace(adapter, wanted=wanted), arrival, errors


def _manifest(home: Home, remote: Remote, name: str, entry: Entry) -> bytes | MissingThere | None:
    """Return the manifest of a version, None where it is here, the error where it is not there; raises any other."""
    if home.store.manifests.contains(entry.content["version"]):
        return None
    try:
        return read_manifest(remote, name, entry)
    except MissingThere as error:
        return error


def _withheld(adapter: Bringing, errors: dict[int, LoramgrError]) -> IntegrityError:
    """Return one error for the versions of an adapter that did not come while the rest did."""
    name = adapter.entries[-1].name
    told = "".join(f"\n{name}@v{number}: {error.message}" for number, error in errors.items())
    return IntegrityError(
        f"{len(errors)} of {len(adapter.wanted)} versions of {name} did not come:{told}",
        next(iter(errors.values())).hint,
    )


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
