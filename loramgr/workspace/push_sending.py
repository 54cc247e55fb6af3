"""Brings what a push has planned: files, and then the entries that name them."""

from __future__ import annotations

from loramgr.errors import RacedError
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.remotes.protocol import RemoteLog, VersionContent
from loramgr.workspace.contents_there import Lacking
from loramgr.workspace.push_planning import Plan, Sending
from loramgr.workspace.remote_logs import chain_to, compare, find_log, known_entries, local_log, went_apart

__all__ = ["append", "send"]

_SHORT = 100  # entries of a log that are read again with every push of it


def send(sending: Sending, plan: Plan, lacking: Lacking, digest: str) -> bool:
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


def append(sending: Sending, plan: Plan) -> list[str]:
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


def _moved(sending: Sending, plan: Plan) -> RemoteLog | None:
    """Return the log of an adapter as another client has left it, None where there is none of its name any more."""
    sending.raced.add(plan.name)
    with sending.home.catalog.reading() as reader:
        here = local_log(sending.home, reader, plan.name)
    return find_log(sending.remote, plan.name, here, known_entries(sending.home))


def _content(sending: Sending, plan: Plan, entry: Entry) -> VersionContent:
    number, digest = entry.content["number"], entry.content["version"]
    manifests = sending.home.store.manifests
    if manifests.contains(digest) or plan.expected is None:
        data = manifests.get(digest)
    else:  # promised, and renumbered by the rebase of a fork: the remote has it under another number
        data = sending.remote.read_manifest(plan.there, number, digest)
    files = tuple(FileRecord(**file) for file in entry.content["summary"]["files"])
    return VersionContent(number, digest, data, files)
