"""What a push of an adapter brings to a remote: the log entries, and the versions that come to be there with them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from loramgr.errors import LoramgrError
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.records import FileRecord
from loramgr.remotes.protocol import MissingThere, Remote, RemoteLog
from loramgr.workspace.contents_there import Versions
from loramgr.workspace.home import Home
from loramgr.workspace.options import PushOptions
from loramgr.workspace.rebasing import rebase_here
from loramgr.workspace.recovering_there import recover
from loramgr.workspace.remote_logs import (
    compare,
    find_log,
    known_entries,
    live_there,
    local_log,
    says_the_same,
    stored,
    went_apart,
)
from loramgr.workspace.remotes import Place

__all__ = ["Plan", "Sending", "planned"]


@dataclass(frozen=True, slots=True)
class Plan:
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
class Sending:
    """A push that runs: which digests went under which name, so that shared files travel once.

    `names` is what the adapters are called since a rebase, `raced` are those whose log is no more as `logs` has it.
    `chains` are the digests of the logs here, of several adapters read at once, each for the first try of its push.
    `damaged` are the logs that were not to be read with the others, `removed` the adapters that are so here as a whole.
    """

    home: Home
    remote: Remote
    place: Place
    options: PushOptions
    logs: dict[str, RemoteLog] | None = None
    chains: dict[str, list[str]] = field(default_factory=dict)
    damaged: dict[str, LoramgrError] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    sent: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    raced: set[str] = field(default_factory=set)
    locks: defaultdict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))


def planned(sending: Sending, name: str) -> Plan:
    """Find out what the remote lacks of an adapter; where both sides went on, rebase or refuse."""
    label = sending.place.label
    here = _log_here(sending, name)
    log = _log_there(sending, name, here)
    found = compare(here, log)
    notes: list[str] = []
    if log is not None and says_the_same(here, found):
        notes.append(f"{label} has all of {name} already, in a log with other numbers or in another order")
        here = found.there
        found = compare(here, log)
    elif log is not None and (found.state in ("diverged", "forked")):
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
    return Plan(here[-1].name, log, found.ahead, new, old, files, tuple(notes))


def _log_here(sending: Sending, name: str) -> list[Entry]:
    chain = sending.chains.pop(name, None)
    if chain is not None:
        return stored(sending.home, chain)
    with sending.home.catalog.reading() as reader:
        return local_log(sending.home, reader, name)


def _log_there(sending: Sending, name: str, here: Sequence[Entry]) -> RemoteLog | None:
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


def _recovered(sending: Sending, name: str) -> RemoteLog | None:
    options = sending.options
    return recover(
        sending.home, sending.remote, sending.place.label, name, rebase=options.rebase, dry_run=options.dry_run
    )
