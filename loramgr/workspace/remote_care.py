"""Use cases that look after a remote: read all of it, delete an adapter there, take out what nothing refers to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

from loramgr.errors import LoramgrError, NotFoundError, UncheckedError
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.records import FileRecord, GcReport, RemoteVerification, Removal
from loramgr.references import check_name
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import MissingThere, Remote, RemoteLog, mending
from loramgr.workspace.bringing import read_manifest
from loramgr.workspace.fetching import Wanted, read_proved
from loramgr.workspace.home import Home
from loramgr.workspace.remote_logs import chain_to
from loramgr.workspace.remotes import resolve
from loramgr.workspace.transfers import bar, tried

__all__ = ["collect_remote", "delete_there", "verify_remote"]


@dataclass
class _Findings:
    checked: int = 0
    corrupt: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, name: str, what: str, found: object) -> None:
        """Count something of an adapter that was looked at, and keep the error that it ended with."""
        self.checked += 1
        if isinstance(found, UncheckedError):
            self.unchecked.append(found.message)
        elif isinstance(found, LoramgrError):
            self.damaged.add(name)
            kept = self.missing if isinstance(found, MissingThere) else self.corrupt
            kept.append(found.message if what in found.message else f"{what}: {found.message}")

    def lack(self, name: str, what: Iterable[str]) -> None:
        """Keep what of an adapter is not there."""
        told = [*what]
        self.missing += told
        self.damaged |= {name} if told else set()


def verify_remote(home: Home, remote: str | None, *, quick: bool) -> RemoteVerification:
    """Read every log, manifest and file of a version that is at a remote, and hash it; `quick` compares sizes only.

    Log entries are read from there, not from this home's store. Errors of a single log or file are findings; raises
    UncheckedError when the remote cannot be reached at all.
    """
    place = resolve(home, remote)
    opened, findings = place.open(home.jobs), _Findings()
    wanted: dict[str, Wanted] = {}
    for name in opened.names():
        log = tried(lambda each_name: opened.log(each_name, lambda _: None), name)
        if not isinstance(log, RemoteLog):
            findings.take(name, name, log)
            continue
        findings.checked += len(log.entries)
        if len(log.heads) > 1:
            findings.notes.append(f"{name} went on in {len(log.heads)} ways: loramgr push --rebase {name}")
        published = list({entry.digest: entry for head in log.heads for entry in live(chain_to(log, head))}.values())
        files = dict(_files(name, published))
        if quick:
            _look(opened, name, published, files, findings)
            continue
        for entry in published:
            manifest = tried(partial(read_manifest, opened, name), entry)
            findings.take(name, f"{name}@v{entry.content['number']}", manifest)
        wanted |= files
    _read_all(home, opened, wanted, findings)
    for name in opened.astray():  # asked last: a push that ran meanwhile has written its head by now
        findings.lack(name, [f"{place.url}: the head of {name!r} is missing, its log entries are there"])
    mended = [f"{name}: {mending(name, place.label)}" for name in sorted(findings.damaged)]
    notes = [*findings.notes, *mended]
    return RemoteVerification(findings.checked, findings.corrupt, findings.missing, notes, findings.unchecked)


def delete_there(home: Home, remote: str | None, name: str, *, dry_run: bool) -> Removal:
    """Delete an adapter's log at a remote; what it referred to is for its gc. NotFoundError where there is none."""
    check_name(name)
    place = resolve(home, remote)
    opened = place.open(home.jobs)
    if dry_run:
        if name not in opened.names() and name not in opened.astray():
            raise NotFoundError(
                f"there is no adapter {name!r} at {place.label}", f"loramgr remote list-adapters {place.label}"
            )
    else:
        opened.delete(name)
    return Removal([name])


def collect_remote(home: Home, remote: str | None, grace: timedelta, *, dry_run: bool) -> GcReport:
    """Delete what no log at a remote refers to and is older than the grace."""
    collected = resolve(home, remote).open(home.jobs).collect(grace, dry_run=dry_run)
    return GcReport([*collected.removed], collected.bytes, [], 0)


def _files(name: str, published: list[Entry]) -> Iterator[tuple[str, Wanted]]:
    for entry in published:
        for file in entry.content["summary"]["files"]:
            yield file["digest"], Wanted(name, entry.content["number"], FileRecord(**file))


def _look(opened: Remote, name: str, published: list[Entry], files: dict[str, Wanted], findings: _Findings) -> None:
    """Compare sizes of files, and look for manifests, without reading either."""
    lacking = opened.missing(name, {digest: wanted.file.bytes for digest, wanted in files.items()})
    manifests = {entry.content["version"]: entry.content["number"] for entry in published}
    absent = opened.missing_manifests(name, dict.fromkeys(manifests))
    findings.checked += len(files) + len(manifests)
    findings.lack(name, [f"blob {digest}: {files[digest].file.path} of {name}" for digest in sorted(lacking)])
    findings.lack(name, [f"manifest {digest}: {name}@v{manifests[digest]}" for digest in sorted(absent)])


def _read_all(home: Home, remote: Remote, wanted: dict[str, Wanted], findings: _Findings) -> None:
    with bar(home, "files", sum(each_file.file.bytes for each_file in wanted.values())) as progress:
        work = partial(tried, partial(read_proved, remote))
        for (digest, file), found in zip(wanted.items(), each(home.jobs, work, wanted.values()), strict=True):
            findings.take(file.name, f"blob {digest}", found)
            progress.update(file.file.bytes)
