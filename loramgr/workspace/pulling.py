"""Use case: bring adapters from a remote, their logs as a whole and the files of the versions that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from loramgr.errors import ConflictError, LoramgrError, NotFoundError
from loramgr.forks import covers, set_aside
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.records import TransferReport
from loramgr.references import Reference, parse_reference
from loramgr.remotes.protocol import DamagedLogs, KnownEntry, Remote, RemoteLog
from loramgr.workspace.branches import Branch
from loramgr.workspace.bringing import Bringing, bring
from loramgr.workspace.home import Home
from loramgr.workspace.options import PullOptions
from loramgr.workspace.rebasing import rebase_here
from loramgr.workspace.remote_logs import (
    Comparison,
    compare,
    find_log,
    known_entries,
    local_log,
    log_of_root,
    says_the_same,
    versions_there,
    went_apart,
)
from loramgr.workspace.remotes import ORIGIN, Place, add_remote, resolve
from loramgr.workspace.transfers import Failures, Moved, tried

__all__ = ["clone", "pull"]

HUB_SCHEME = "hf://"
_TOGETHER = 64  # adapters that are taken in at once
_TOGETHER_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Pulling:
    """A pull that runs; `references` are those that were given, by adapter, None when everything is to come."""

    home: Home
    remote: Remote
    place: Place
    options: PullOptions
    references: dict[str, list[Reference]] | None


def pull(home: Home, refs: Sequence[str], options: PullOptions) -> TransferReport:
    """Bring adapters from a remote; none named means everything that is there.

    A bare name brings the files of the latest version there, `name@…` those of that one; the others of its log are
    promised. `hf://org/name[@revision]` makes a version of a repository that loramgr did not write. Raises
    NotFoundError for what is not there, ConflictError when both sides went on or the name is another adapter's here,
    and IntegrityError for what is not what its digest says; of several adapters the others are brought all the same.
    """
    foreign = [ref for ref in refs if ref.startswith(HUB_SCHEME)]
    if foreign:
        from loramgr.workspace.hub_pulling import pull_foreign

        reports = [pull_foreign(home, ref, options) for ref in foreign]
        rest = [ref for ref in refs if ref not in foreign]
        return _together([*reports, *([pull(home, rest, options)] if rest else [])])
    place = resolve(home, options.source)
    references = _references(home, refs) if refs else None
    pulling = _Pulling(home, place.open(home.jobs), place, options, references)
    failures, done, names = Failures(0), Moved(), set[str]()
    for name, result in _results(pulling):
        names.add(name)
        failures.total = len(names)
        if isinstance(result, LoramgrError):
            failures.errors[name] = result
        else:
            done += result
    failures.check("pulled")
    return done.report(place.label)


def clone(home: Home, url: str, name: str | None) -> TransferReport:
    """Register a remote, as `origin` where no name is given, and bring everything that is there."""
    place = resolve(home, url)
    place.open(home.jobs).names()  # an address where nothing answers is not registered
    remote = add_remote(home, ORIGIN if name is None else name, place.url, f"loramgr clone {place.url} --name NAME")
    return pull(home, (), PullOptions(remote.name, all_versions=True))


def _together(reports: Sequence[TransferReport]) -> TransferReport:
    total = Moved()
    for each in reports:
        counts = (each.transferred, each.skipped, each.bytes, each.entries)
        total += Moved(*counts, tuple(each.versions), tuple(each.notes))
    return total.report(", ".join(dict.fromkeys(each.remote for each in reports)))


def _references(home: Home, refs: Sequence[str]) -> dict[str, list[Reference]]:
    """Return the references by their adapters; a digest alone is one of a version that is known here."""
    references: dict[str, list[Reference]] = {}
    for ref in refs:
        parsed = parse_reference(ref)
        if parsed.name is None:
            with home.catalog.reading() as reader:
                version = reader.version(ref)
            parsed = replace(parsed, name=version.name, digest=version.digest)
        references.setdefault(str(parsed.name), []).append(parsed)
    return references


def _results(pulling: _Pulling) -> Iterator[tuple[str, Moved | LoramgrError]]:
    """Yield of each adapter what was moved, or why it was not; several are worked on together."""
    waiting: list[tuple[Bringing, Moved]] = []
    coming: set[str] = set()
    for name, log in _logs(pulling):
        adapter = log if isinstance(log, LoramgrError) else tried(partial(_plan, pulling, name), log)
        if isinstance(adapter, LoramgrError):
            yield name, adapter
            continue
        moved = adapter.moved(pulling.home, coming)
        coming.update(adapter.files(pulling.home))
        if pulling.options.dry_run:
            yield name, moved
            continue
        waiting.append((adapter, moved))
        if len(waiting) == _TOGETHER or sum(each.bytes for _, each in waiting) > _TOGETHER_BYTES:
            yield from bring(pulling.home, pulling.remote, pulling.place.label, waiting)
            waiting, coming = [], set()
    if waiting:
        yield from bring(pulling.home, pulling.remote, pulling.place.label, waiting)


def _logs(pulling: _Pulling) -> Iterable[tuple[str, RemoteLog | LoramgrError | None]]:
    """Yield the logs that are meant, None for one that is not there, an error for one that cannot be read."""
    known = known_entries(pulling.home)
    if pulling.references is None:
        try:
            for log in pulling.remote.logs(known):
                yield log.name, log
        except DamagedLogs as damaged:
            yield from damaged.errors.items()
        return
    for name in pulling.references:
        with pulling.home.catalog.reading() as reader:
            here = local_log(pulling.home, reader, name)
        yield name, tried(partial(_find, pulling.remote, name, here), known)


def _find(remote: Remote, name: str, here: Sequence[Entry], known: KnownEntry) -> RemoteLog | None:
    return find_log(remote, name, here, known) or _renamed(remote, here, known)


def _renamed(remote: Remote, here: Sequence[Entry], known: KnownEntry) -> RemoteLog | None:
    """Look through all logs for one that is known here by a name which it had earlier."""
    if not here:
        return None
    with suppress(DamagedLogs):  # they are not asked for
        return next((log for log in remote.logs(known) if log.entries[0].digest == here[0].digest), None)
    return None


def _plan(pulling: _Pulling, name: str, log: RemoteLog | None) -> Bringing:
    """Find out what of an adapter has to come."""
    label = pulling.place.label
    if log is None:
        raise NotFoundError(f"there is no adapter {name!r} at {label}", f"loramgr remote list-adapters {label}")
    with pulling.home.catalog.reading() as reader:
        here = log_of_root(pulling.home, reader, log.entries[0].digest) or local_log(pulling.home, reader, log.name)
    found = compare(here, log)
    entries, notes = _settled(pulling, log, here, found)
    if pulling.options.rebase and not pulling.options.dry_run:
        with pulling.home.catalog.reading() as reader:
            here = log_of_root(pulling.home, reader, entries[0].digest)  # the rebase has changed it
    if name not in (entries[-1].name, log.name):
        notes = [*notes, f"{name} is called {log.name} at {label}"]
    wanted = _wanted(pulling, name, Branch([*entries]), found)
    _check_there(pulling, log, wanted, found)
    return Bringing(log.name, entries, here, wanted, tuple(notes), versions_there(log))


def _settled(pulling: _Pulling, log: RemoteLog, here: list[Entry], found: Comparison) -> tuple[list[Entry], list[str]]:
    """Return the log as it will be here, and notes about it; ConflictError when both sides went on."""
    label, name = pulling.place.label, log.name
    if found.state in ("same", "ahead"):
        return here, []
    if found.state in ("there", "behind"):
        return found.there, []
    if found.ahead:
        return _apart(pulling, log, here, found)
    return found.there, [_forked(name, label, log)]


def _forked(name: str, label: str, log: RemoteLog) -> str:
    return f"{name} went on in {len(log.heads)} ways at {label}: loramgr push --rebase {name}"


def _apart(pulling: _Pulling, log: RemoteLog, here: list[Entry], found: Comparison) -> tuple[list[Entry], list[str]]:
    """Return the same where there are entries on both sides that the other one lacks: one may say all of the other."""
    label, name = pulling.place.label, log.name
    ahead = {entry.digest for entry in found.ahead}
    if ahead <= set_aside([*here, *found.there]) or says_the_same(here, found):
        return found.there, [f"{name} was rebased at {label}: its log here is now the one there"]
    if found.state == "diverged" and covers(here, found.there):
        return here, [f"{name} has more here than at {label}, in a log with other numbers or in another order"]
    if pulling.options.rebase:
        return rebase_here(pulling.home, here, log, label, dry_run=pulling.options.dry_run)
    if ahead <= {entry.digest for entry in log.entries}:
        return here, [_forked(name, label, log)]
    if here[0].digest != found.there[0].digest:
        raise ConflictError(
            f"the name {name!r} is another adapter's here than at {label}",
            f"loramgr rename {name} NEW, or loramgr pull --rebase {name} to have both in one",
        )
    raise went_apart(name, label, found, log.heads)


def _wanted(pulling: _Pulling, name: str, branch: Branch, found: Comparison) -> list[Entry]:
    """Return the entries that published the versions whose files are to come."""
    published = {entry.content["number"]: entry for entry in live(branch.entries)}
    there = {entry.content["number"] for entry in live(found.there)}
    if not {entry.digest for entry in found.there} <= {entry.digest for entry in branch.entries}:
        published = _as_numbered_there(published, found)
        there = {*published}
    if pulling.references is None or pulling.options.all_versions:
        return [published[number] for number in sorted(published.keys() & there)]
    if there and not published:
        raise NotFoundError(f"the adapter {name!r} was removed here", f"loramgr restore {name}")
    wanted: dict[int, Entry] = {}
    for reference in pulling.references[name]:
        number = _number(reference, branch, published.keys() & there)
        if number in published:
            wanted[number] = published[number]
        elif not _is_bare(reference):
            raise NotFoundError(
                f"there is no version {_written(reference)} at {pulling.place.label}",
                f"loramgr remote list-adapters {pulling.place.label}",
            )
    return list(wanted.values())


def _as_numbered_there(published: dict[int, Entry], found: Comparison) -> dict[int, Entry]:
    """Return the versions, by their numbers here, with the entries that published them in the remote's own log."""
    there = {entry.content["version"]: entry for entry in live(found.there)}
    versions = {number: entry.content["version"] for number, entry in published.items()}
    return {number: there[version] for number, version in versions.items() if version in there}


def _number(reference: Reference, branch: Branch, there: set[int]) -> int:
    """Return the number of the version that a reference means, 0 for none."""
    if reference.number is not None:
        return reference.number
    if reference.tag is not None:
        return branch.tags.get(reference.tag, 0)
    if reference.digest is not None:
        fitting = [number for number in sorted(branch.live) if branch.versions[number].startswith(reference.digest)]
        return fitting[-1] if fitting else 0
    return max(there, default=0)


def _is_bare(reference: Reference) -> bool:
    return (reference.number, reference.tag, reference.digest) == (None, None, None)


def _written(reference: Reference) -> str:
    selector = f"v{reference.number}" if reference.number is not None else reference.tag or reference.digest
    return f"{reference.name}@{selector}"


def _check_there(pulling: _Pulling, log: RemoteLog, wanted: Sequence[Entry], found: Comparison) -> None:
    """Refuse to look for the files of a version that is neither here nor in the remote's log."""
    there = {(entry.content["number"], entry.content["version"]) for entry in live(found.there)}
    for entry in Bringing(log.name, [], [], [*wanted]).lacking(pulling.home):
        if (entry.content["number"], entry.content["version"]) not in there:
            raise NotFoundError(
                f"{log.name}@v{entry.content['number']} is not at {pulling.place.label}", "loramgr remote status"
            )
