"""Use case: bring adapters to a remote, their logs and the files of their versions that it lacks."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from loramgr.errors import IntegrityError, LoramgrError, NotFoundError, RacedError
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.records import FileRecord, TransferReport
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import DamagedLogs, MissingThere, Remote, RemoteLog, VersionContent
from loramgr.workspace.contents_there import Lacking, Versions, put_manifests, survey
from loramgr.workspace.home import Home
from loramgr.workspace.options import PushOptions
from loramgr.workspace.promises import files_of_entry
from loramgr.workspace.racing import until_won
from loramgr.workspace.rebasing import rebase_here
from loramgr.workspace.recovering_there import recover
from loramgr.workspace.remote_logs import (
    chain_to,
    compare,
    find_log,
    known_entries,
    live_there,
    local_log,
    went_apart,
)
from loramgr.workspace.remotes import Place, resolve
from loramgr.workspace.transfers import Failures, Moved, bar, tried

__all__ = ["push"]

_FEW = 3  # adapters that are asked for one by one
_SHORT = 100  # entries of a log that are read again with every push of it


@dataclass(frozen=True, slots=True)
class _Plan:
    """What an adapter lacks at the remote: log entries, and the versions that come to be there.

    `old` are the versions that the log there has, `files` those of all versions, by digest.
    """

    name: str
    expected: RemoteLog | None
    entries: list[Entry]
    versions: list[Entry]
    old: list[Entry]
    files: dict[str, FileRecord]
    notes: tuple[str, ...]

    @property
    def there(self) -> str:
        """What the adapter is called at the remote until the entries are there."""
        return self.name if self.expected is None else self.expected.name

    @property
    def contents(self) -> Versions:
        """The versions, as the remote is asked for their files."""
        return Versions(self.there, self.old if self.expected is not None else [], self.versions, self.files)


@dataclass
class _Sending:
    """A push that runs: which digests went under which name, so that shared files travel once.

    `names` is what the adapters are called since a rebase, `raced` are those whose log is no more as `logs` has it.
    `damaged` are the logs that were not to be read with the others, `removed` the adapters that are so here as a whole.
    """

    home: Home
    remote: Remote
    place: Place
    options: PushOptions
    logs: dict[str, RemoteLog] | None = None
    damaged: dict[str, LoramgrError] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    sent: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    raced: set[str] = field(default_factory=set)
    locks: defaultdict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))


def push(home: Home, refs: Sequence[str], options: PushOptions) -> TransferReport:
    """Bring adapters to a remote; none named means all of them.

    A reference names the adapter, whose whole log goes, and the files of all its versions that are not removed. Raises
    NotFoundError for an adapter that is not here or whose files are not, ConflictError when the log went on there, and
    IntegrityError for damaged files; of several adapters the others are brought all the same.
    """
    place = resolve(home, options.target)
    names, removed = _named(home, refs)
    remote = place.open(home.jobs)
    sending = _Sending(home, remote, place, options, removed=removed)
    notes = _whole_logs(refs) + (remote.revive() if options.repair and not options.dry_run else [])
    if len(names) > _FEW:
        sending.logs = _all_logs(sending)
    failures, done = Failures(len(names)), Moved(notes=tuple(notes))
    one = partial(_push_one, sending, home.jobs if len(names) == 1 else 1)
    for name, result in zip(names, each(home.jobs, partial(tried, one), names), strict=True):
        if isinstance(result, LoramgrError):
            failures.errors[name] = result
        else:
            done += result
    failures.check("pushed")
    return done.report(place.label)


def _named(home: Home, refs: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return the adapters that are meant, and those of them that are removed: their tombstones may have to go."""
    with home.catalog.reading() as reader:
        removed = reader.removed_adapters()
        if not refs:
            return [*reader.adapters(), *removed], {*removed}
        names = [ref if ref in removed else reader.version(ref).name for ref in refs]
    return list(dict.fromkeys(names)), set()


def _whole_logs(refs: Sequence[str]) -> list[str]:
    """Say of references to one version that more than it goes."""
    return [f"{ref}: the log of an adapter goes as a whole, with all its versions" for ref in refs if "@" in ref]


def _all_logs(sending: _Sending) -> dict[str, RemoteLog]:
    """Return the remote's logs by their names and by the digests of their first entries; note those not to be read."""
    logs: dict[str, RemoteLog] = {}
    try:
        for log in sending.remote.logs(known_entries(sending.home)):
            logs[log.name] = logs[log.entries[0].digest] = log
    except DamagedLogs as error:
        sending.damaged = error.errors
    names = sending.remote.astray()
    sending.damaged |= {name: MissingThere(f"{sending.place.url}: the head of {name!r} is missing") for name in names}
    return logs


def _push_one(sending: _Sending, jobs: int, name: str) -> Moved:
    """Push an adapter; with a rebase, again and again when another client was first."""
    once = partial(_push_once, sending, jobs, name)
    return until_won(once) if sending.options.rebase and not sending.options.dry_run else once()


def _push_once(sending: _Sending, jobs: int, name: str) -> Moved:
    home, remote = sending.home, sending.remote
    plan = _plan(sending, sending.names.get(name, name))
    sending.names[name] = plan.name
    if plan.expected is None and name in sending.removed:
        return Moved()
    if plan.expected is None and not plan.versions:
        raise NotFoundError(f"there is no adapter {name!r}, neither here nor at {sending.place.label}", "loramgr list")
    sizes = {digest: file.bytes for digest, file in plan.files.items()}
    lacking = survey(home, remote, plan.contents, thorough=sending.options.repair)
    _check_at_hand(home, plan, lacking.files)
    if sending.options.dry_run and plan.entries:
        remote.check(plan.expected, plan.entries)
    if not sending.options.dry_run:
        put_manifests(home, remote, plan.contents, lacking)
    missing = [digest for digest in lacking.files if home.store.blobs.contains(digest)]
    with bar(home, name, sum(sizes[digest] for digest in missing)) as progress:
        sent = []
        for digest, went in zip(missing, each(jobs, partial(_send, sending, plan, lacking), missing), strict=True):
            sent += [digest] if went else []
            progress.update(sizes[digest])
    notes = (*plan.notes, *_mended(sending, plan, lacking))
    notes = notes if sending.options.dry_run else (*notes, *_append(sending, plan))
    _check_whole(sending, plan, lacking)
    size = sum(sizes[digest] for digest in sent)
    versions = tuple(f"{plan.name}@v{entry.content['number']}" for entry in plan.versions)
    return Moved(len(sent), len(plan.files) - len(sent), size, len(plan.entries), versions, notes)


def _append(sending: _Sending, plan: _Plan) -> list[str]:
    """Append what the remote's log lacks, have the remote put in order what belongs to it, and say what that was."""
    home, log = sending.home, plan.expected
    if plan.entries:
        contents = [_content(sending, plan, entry) for entry in plan.versions]
        try:
            log = sending.remote.append(plan.expected, plan.entries, contents, home.store.blobs.path)
        except RacedError:
            log = _moved(sending, plan)
            if log is None:
                raise
        if len(log.heads) > 1 or plan.entries[-1] not in chain_to(log, log.heads[0]):
            sending.raced.add(plan.name)
            sending.remote = sending.place.open(home.jobs)  # which looks anew at what others brought meanwhile
            with home.catalog.reading() as reader:
                found = compare(local_log(home, reader, plan.name), log)
            raise went_apart(plan.name, sending.place.label, found, log.heads)
    if log is None:
        return []
    few = sending.logs is None and (not plan.entries or len(log.entries) <= _SHORT)
    thorough = sending.options.repair or few
    return sending.remote.settle(log, tags=sending.options.tags, thorough=thorough)


def _moved(sending: _Sending, plan: _Plan) -> RemoteLog | None:
    """Return the log of an adapter as another client has left it, None where there is none of its name any more."""
    sending.raced.add(plan.name)
    with sending.home.catalog.reading() as reader:
        here = local_log(sending.home, reader, plan.name)
    return find_log(sending.remote, plan.name, here, known_entries(sending.home))


def _plan(sending: _Sending, name: str) -> _Plan:
    """Find out what the remote lacks of an adapter; where both sides went on, rebase or refuse."""
    home, label = sending.home, sending.place.label
    with home.catalog.reading() as reader:
        here = local_log(home, reader, name)
    log = _log_there(sending, name, here)
    found = compare(here, log)
    notes: list[str] = []
    if log is not None and (found.state in ("diverged", "forked")):
        if not sending.options.rebase:
            raise went_apart(name, label, found, log.heads)
        here, notes = rebase_here(sending.home, here, log, label, dry_run=sending.options.dry_run)
        found = compare(here, log)
    if found.behind:
        notes.append(f"{label} has {len(found.behind)} log entries of {name} that are not here: loramgr pull {name}")
    published = live(here)
    known = live_there(log)
    files = {file["digest"]: FileRecord(**file) for each in published for file in each.content["summary"]["files"]}
    new = [entry for entry in published if (entry.content["number"], entry.content["version"]) not in known]
    new = new if found.ahead else []
    old = [entry for entry in published if entry not in new]
    return _Plan(here[-1].name, log, found.ahead, new, old, files, tuple(notes))


def _log_there(sending: _Sending, name: str, here: Sequence[Entry]) -> RemoteLog | None:
    """Return the log of an adapter at the remote, where it got lost as it can be put together; None for none."""
    if sending.logs is None or name in sending.raced:
        found = None if sending.options.repair else find_log(sending.remote, name, here, known_entries(sending.home))
        if found is None and (found := _recovered(sending, name)) is None and sending.options.repair:
            found = find_log(sending.remote, name, here, known_entries(sending.home))
        return found
    if (error := sending.damaged.get(name)) is not None:
        if not (sending.options.repair or isinstance(error, MissingThere)):
            raise error
        return _recovered(sending, name) or find_log(sending.remote, name, here, known_entries(sending.home))
    return sending.logs.get(here[0].digest) or sending.logs.get(name)


def _recovered(sending: _Sending, name: str) -> RemoteLog | None:
    options = sending.options
    return recover(
        sending.home, sending.remote, sending.place.label, name, rebase=options.rebase, dry_run=options.dry_run
    )


def _check_at_hand(home: Home, plan: _Plan, missing: Collection[str]) -> None:
    """Refuse to push a version whose files are neither here nor at the remote."""
    for entry in plan.versions:
        version = entry.content["version"]
        lacking = [each for each in files_of_entry(entry) if each in missing and not home.store.blobs.contains(each)]
        if plan.expected is None and not home.store.manifests.contains(version):
            lacking.append(version)
        remote = home.store.promised.remote_of(version)
        if lacking and remote is not None:
            ref = f"{plan.name}@v{entry.content['number']}"
            raise NotFoundError(f"the files of {ref} are not here, but at {remote}", f"loramgr pull {ref}")


def _mended(sending: _Sending, plan: _Plan, lacking: Lacking) -> list[str]:
    """Say what of versions that had been pushed before is brought again."""
    again = [digest for digest in lacking.of_old(plan.contents) if sending.home.store.blobs.contains(digest)]
    label, notes = sending.place.label, list[str]()
    if again:
        notes.append(f"{len(again)} files of {plan.name} were missing or damaged at {label}, and go there again")
    if lacking.manifests:
        count = len(lacking.manifests)
        notes.append(f"{count} manifests of {plan.name} were missing or damaged at {label}, and go there again")
    return notes


def _check_whole(sending: _Sending, plan: _Plan, lacking: Lacking) -> None:
    """Raise IntegrityError for a version there whose files are missing, or damaged, and not here."""
    blobs = sending.home.store.blobs
    gone = {digest for digest in lacking.of_old(plan.contents) if not blobs.contains(digest)}
    lost = [entry for entry in plan.old if gone.intersection(files_of_entry(entry))]
    if lost:
        refs = ", ".join(f"{plan.name}@v{entry.content['number']}" for entry in lost)
        raise IntegrityError(
            f"files of {refs} are missing or damaged at {sending.place.label}, and not here",
            f"where a home has them: loramgr push --repair {plan.name} --to {sending.place.given}",
        )


def _send(sending: _Sending, plan: _Plan, lacking: Lacking, digest: str) -> bool:
    """Bring a file, and say whether it went: another adapter that shares it may have brought it meanwhile."""
    file = plan.files[digest]
    with sending.locks[digest]:
        if sending.sent.get(digest, plan.name) != plan.name and (
            sending.options.dry_run or not sending.remote.missing(plan.there, {digest: file.bytes})
        ):
            return False
        if not sending.options.dry_run:
            anew = digest in lacking.damaged
            sending.remote.put_blob(plan.there, file, sending.home.store.blobs.path(digest), anew=anew)
        sending.sent[digest] = plan.name
    return True


def _content(sending: _Sending, plan: _Plan, entry: Entry) -> VersionContent:
    number, digest = entry.content["number"], entry.content["version"]
    manifests = sending.home.store.manifests
    if manifests.contains(digest) or plan.expected is None:
        data = manifests.get(digest)
    else:  # promised, and renumbered by the rebase of a fork: the remote has it under another number
        data = sending.remote.read_manifest(plan.there, number, digest)
    files = tuple(FileRecord(**file) for file in entry.content["summary"]["files"])
    return VersionContent(number, digest, data, files)
