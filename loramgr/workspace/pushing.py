"""Use case: bring adapters to a remote, their logs and the files of their versions that it lacks."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from functools import partial

from loramgr.errors import IntegrityError, LoramgrError, NotFoundError
from loramgr.records import TransferReport
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import DamagedLogs, MissingThere, RemoteLog
from loramgr.workspace.contents_there import Lacking, put_manifests, survey
from loramgr.workspace.home import Home
from loramgr.workspace.options import PushOptions
from loramgr.workspace.promises import files_of_entry
from loramgr.workspace.push_planning import Plan, Sending, planned
from loramgr.workspace.push_sending import append, send
from loramgr.workspace.racing import until_won
from loramgr.workspace.remote_logs import known_entries
from loramgr.workspace.remotes import ORIGIN, resolve
from loramgr.workspace.transfers import Failures, Moved, bar, tried

__all__ = ["push"]

_FEW = 3  # adapters that are asked for one by one


def push(home: Home, refs: Sequence[str], options: PushOptions) -> TransferReport:
    """Bring adapters to a remote; none named means all of them.

    A reference names the adapter, whose whole log goes, and the files of all its versions that are not removed. Raises
    NotFoundError for an adapter that is not here or whose files are not, ConflictError when the log went on there, and
    IntegrityError for damaged files; of several adapters the others are brought all the same.
    """
    place = resolve(home, options.target)
    names, removed = _named(home, refs)
    remote = place.open(home.jobs)
    sending = Sending(home, remote, place, options, removed=removed)
    notes = _whole_logs(refs) + (remote.revive() if options.repair and not options.dry_run else [])
    if len(names) > _FEW:
        sending.logs = _all_logs(sending)
        with home.catalog.reading() as reader:
            sending.chains = reader.entries_by_adapter()
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


def _all_logs(sending: Sending) -> dict[str, RemoteLog]:
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


def _push_one(sending: Sending, jobs: int, name: str) -> Moved:
    """Push an adapter; with a rebase, again and again when another client was first."""
    once = partial(_push_once, sending, jobs, name)
    return until_won(once) if sending.options.rebase and not sending.options.dry_run else once()


def _push_once(sending: Sending, jobs: int, name: str) -> Moved:
    home, remote = sending.home, sending.remote
    plan = planned(sending, sending.names.get(name, name))
    sending.names[name] = plan.name
    if plan.expected is None and name in sending.removed:
        return Moved()
    if plan.expected is None and not plan.versions:
        raise NotFoundError(f"there is no adapter {name!r}, neither here nor at {sending.place.label}", "loramgr list")
    sizes = {digest: file.bytes for digest, file in plan.files.items()}
    lacking = survey(home, remote, plan.contents, thorough=sending.options.repair)
    _check_at_hand(sending, plan, lacking.files)
    if sending.options.dry_run and plan.entries:
        remote.check(plan.expected, plan.entries)
    if not sending.options.dry_run:
        put_manifests(home, remote, plan.contents, lacking)
    missing = [digest for digest in lacking.files if home.store.blobs.contains(digest)]
    with bar(home, name, sum(sizes[digest] for digest in missing)) as progress:
        sent = []
        for digest, went in zip(missing, each(jobs, partial(send, sending, plan, lacking), missing), strict=True):
            sent += [digest] if went else []
            progress.update(sizes[digest])
    notes = (*plan.notes, *_mended(sending, plan, lacking))
    notes = notes if sending.options.dry_run else (*notes, *append(sending, plan))
    _check_whole(sending, plan, lacking)
    size = sum(sizes[digest] for digest in sent)
    versions = tuple(f"{plan.name}@v{entry.content['number']}" for entry in plan.versions)
    return Moved(len(sent), len(plan.files) - len(sent), size, len(plan.entries), versions, notes)


def _check_at_hand(sending: Sending, plan: Plan, missing: Collection[str]) -> None:
    """Refuse to push a version whose files are neither here nor at the remote."""
    home = sending.home
    for entry in plan.versions:
        version = entry.content["version"]
        lacking = [each for each in files_of_entry(entry) if each in missing and not home.store.blobs.contains(each)]
        if plan.expected is None and not home.store.manifests.contains(version):
            lacking.append(version)
        remote = home.store.promised.remote_of(version)
        if lacking and remote is not None:
            ref = f"{plan.name}@v{entry.content['number']}"
            source = "" if remote in (ORIGIN, sending.place.label) else f" --from {shlex.quote(remote)}"
            raise NotFoundError(f"the files of {ref} are not here, but at {remote}", f"loramgr pull {ref}{source}")


def _mended(sending: Sending, plan: Plan, lacking: Lacking) -> list[str]:
    """Say what of versions that had been pushed before is brought again."""
    again = [digest for digest in lacking.of_old(plan.contents) if sending.home.store.blobs.contains(digest)]
    label, notes = sending.place.label, list[str]()
    if again:
        notes.append(f"{len(again)} files of {plan.name} were missing or damaged at {label}, and go there again")
    if lacking.manifests:
        count = len(lacking.manifests)
        notes.append(f"{count} manifests of {plan.name} were missing or damaged at {label}, and go there again")
    return notes


def _check_whole(sending: Sending, plan: Plan, lacking: Lacking) -> None:
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
