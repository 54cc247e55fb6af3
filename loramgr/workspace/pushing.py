"""Use case: bring adapters to a remote, their logs and the files of their versions that it lacks."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from loramgr.errors import LoramgrError, NotFoundError
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.records import FileRecord, TransferReport
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import Remote, RemoteLog, VersionContent
from loramgr.workspace.home import Home
from loramgr.workspace.options import PushOptions
from loramgr.workspace.promises import files_of_entry
from loramgr.workspace.rebasing import rebase_here
from loramgr.workspace.remote_logs import (
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

    `files` are those of all its versions, by digest.
    """

    name: str
    expected: RemoteLog | None
    entries: list[Entry]
    versions: list[Entry]
    files: dict[str, FileRecord]
    notes: tuple[str, ...]


@dataclass
class _Sending:
    """A push that runs: which digests went under which name, so that shared files travel once."""

    home: Home
    remote: Remote
    place: Place
    options: PushOptions
    logs: dict[str, RemoteLog] | None
    sent: dict[str, str] = field(default_factory=dict)
    locks: defaultdict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))


def push(home: Home, refs: Sequence[str], options: PushOptions) -> TransferReport:
    """Bring adapters to a remote; none named means all of them.

    A reference names the adapter, whose whole log goes, and the files of all its versions that are not removed. Raises
    NotFoundError for an adapter that is not here or whose files are not, ConflictError when the log went on there, and
    IntegrityError for damaged files; of several adapters the others are brought all the same.
    """
    place = resolve(home, options.target)
    with home.catalog.reading() as reader:
        names = list(dict.fromkeys(reader.version(ref).name for ref in refs)) if refs else list(reader.adapters())
    remote = place.open(home.jobs)
    sending = _Sending(home, remote, place, options, _all_logs(home, remote) if len(names) > _FEW else None)
    failures, done = Failures(len(names)), Moved()
    one = partial(_push_one, sending, home.jobs if len(names) == 1 else 1)
    for name, result in zip(names, each(home.jobs, partial(tried, one), names), strict=True):
        if isinstance(result, LoramgrError):
            failures.errors[name] = result
        else:
            done += result
    failures.check("pushed")
    return done.report(place.label)


def _all_logs(home: Home, remote: Remote) -> dict[str, RemoteLog]:
    """Return the remote's logs by their names and by the digests of their first entries."""
    logs: dict[str, RemoteLog] = {}
    for log in remote.logs(known_entries(home)):
        logs[log.name] = logs[log.entries[0].digest] = log
    return logs


def _push_one(sending: _Sending, jobs: int, name: str) -> Moved:
    home, remote = sending.home, sending.remote
    plan = _plan(sending, name)
    sizes = {digest: plan.files[digest].bytes for entry in plan.versions for digest in files_of_entry(entry)}
    missing = sorted(remote.missing(plan.name, sizes)) if sizes else []
    _check_at_hand(home, plan, missing)
    with bar(home, name, sum(sizes[digest] for digest in missing)) as progress:
        sent = []
        for digest, went in zip(missing, each(jobs, partial(_send, sending, plan), missing), strict=True):
            sent += [digest] if went else []
            progress.update(sizes[digest])
    notes = plan.notes if sending.options.dry_run else (*plan.notes, *_append(sending, plan))
    size = sum(sizes[digest] for digest in sent)
    versions = tuple(f"{plan.name}@v{entry.content['number']}" for entry in plan.versions)
    return Moved(len(sent), len(plan.files) - len(sent), size, len(plan.entries), versions, notes)


def _append(sending: _Sending, plan: _Plan) -> list[str]:
    """Append what the remote's log lacks, have the remote put in order what belongs to it, and say what that was."""
    home, log = sending.home, plan.expected
    if plan.entries:
        contents = [_content(sending, plan, entry) for entry in plan.versions]
        log = sending.remote.append(plan.expected, plan.entries, contents, home.store.blobs.path)
        if len(log.heads) > 1:
            with home.catalog.reading() as reader:
                found = compare(local_log(home, reader, plan.name), log)
            raise went_apart(plan.name, sending.place.label, found, log.heads)
    if log is None:
        return []
    thorough = not plan.entries or len(log.entries) <= _SHORT
    return sending.remote.settle(log, tags=sending.options.tags, thorough=thorough)


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
    return _Plan(here[-1].name, log, found.ahead, new if found.ahead else [], files, tuple(notes))


def _log_there(sending: _Sending, name: str, here: Sequence[Entry]) -> RemoteLog | None:
    if sending.logs is None:
        return find_log(sending.remote, name, here, known_entries(sending.home))
    return sending.logs.get(here[0].digest) or sending.logs.get(name)


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


def _send(sending: _Sending, plan: _Plan, digest: str) -> bool:
    """Bring a file, and say whether it went: another adapter that shares it may have brought it meanwhile."""
    file = plan.files[digest]
    with sending.locks[digest]:
        if sending.sent.get(digest, plan.name) != plan.name and (
            sending.options.dry_run or not sending.remote.missing(plan.name, {digest: file.bytes})
        ):
            return False
        if not sending.options.dry_run:
            sending.remote.put_blob(plan.name, file, sending.home.store.blobs.path(digest))
        sending.sent[digest] = plan.name
    return True


def _content(sending: _Sending, plan: _Plan, entry: Entry) -> VersionContent:
    number, digest = entry.content["number"], entry.content["version"]
    manifests = sending.home.store.manifests
    if manifests.contains(digest) or plan.expected is None:
        data = manifests.get(digest)
    else:  # promised, and renumbered by the rebase of a fork: the remote has it under another number
        data = sending.remote.read_manifest(plan.name, number, digest)
    files = tuple(FileRecord(**file) for file in entry.content["summary"]["files"])
    return VersionContent(number, digest, data, files)
