"""Use case: is everything there and sound, and is the catalog what the logs say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from loramgr.catalog.chains import follow
from loramgr.catalog.query import VersionQuery
from loramgr.catalog.reader import Reader
from loramgr.digests import PREFIX, is_digest
from loramgr.errors import IntegrityError, LoramgrError, UncheckedError, UsageError
from loramgr.forks import set_aside
from loramgr.log import Entry
from loramgr.needs import Needs, mentioned, needs_of
from loramgr.records import BaseRecord, StoreVerification, VersionRecord
from loramgr.store.blobs import BlobStore
from loramgr.workspace.adapters import reference
from loramgr.workspace.home import Home
from loramgr.workspace.outputs import changed_outputs
from loramgr.workspace.promises import check_here, promised_versions, written

__all__ = ["Finding", "Findings", "Scope", "examine", "verify"]

State = Literal["corrupt", "missing", "unchecked"]
Check = Callable[[], object]
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Scope:
    """How much of the store is read.

    `quick` looks at names and sizes only; `sample` (N, T) takes the N-th of T parts of the manifests and blobs, None
    all of them. Log entries are read always.
    """

    quick: bool = False
    sample: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.sample is not None and not 1 <= self.sample[0] <= self.sample[1]:
            raise UsageError(f"there is no part {self.sample[0]} of {self.sample[1]}", "loramgr verify --sample 1/10")

    def has(self, digest: str) -> bool:
        """Say whether a file is in the part that is looked at."""
        if self.sample is None:
            return True
        number, parts = self.sample
        return int(digest.removeprefix(PREFIX), 16) % parts == number - 1


class Finding(NamedTuple):
    """A file that is not as it should be, and what is wrong with it."""

    collection: BlobStore
    digest: str
    state: State
    message: str


@dataclass
class Findings:
    """What a verification has found so far: files, and lines about the catalog, merged folders and the rest."""

    checked: int = 0
    files: list[Finding] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def report(self, repaired: Sequence[str] = ()) -> StoreVerification:
        """Return the findings as a record."""
        said: dict[State, list[str]] = {"corrupt": [], "missing": [], "unchecked": []}
        for finding in self.files:
            said[finding.state].append(finding.message)
        return StoreVerification(
            self.checked,
            [*said["corrupt"], *(f"catalog {row}" for row in self.rows), *self.outputs],
            said["missing"],
            self.notes,
            [*said["unchecked"], *self.unchecked],
            [*repaired],
        )


def verify(home: Home, refs: Sequence[str], scope: Scope) -> StoreVerification:
    """Read blobs, manifests and log entries again, and compare the catalog with the logs.

    What removed versions need counts too, in the trash of gc as well, as long as it is there; so do the merged folders
    that were made from here. With references only what these versions are made of.
    """
    return examine(home, refs, scope).report()


def examine(home: Home, refs: Sequence[str], scope: Scope) -> Findings:
    """Return what `verify` finds, in a form that a repair can work with."""
    findings = Findings()
    if refs:
        with home.catalog.reading() as reader:
            versions = [reader.version(ref) for ref in refs]
        for version in versions:
            check_here(home.store, version)
        needs = _needed_by(versions)
        _check_files(home, needs, scope, findings)
    else:
        with home.catalog.reading() as reader:
            needs, removed = _check_logs(home, reader, findings)
        _check_files(home, needs, scope, findings)
        _check_removed(home, removed, scope, findings)
        _check_outputs(home, scope, findings)
    _name_versions(home, findings)
    return findings


def _check_logs(home: Home, reader: Reader, findings: Findings) -> tuple[Needs, Needs]:
    """Read every log entry, compare the catalog with them, and return what they need and what removed versions did."""
    known = _asked(home, lambda: [str(digest) for digest in reader.entry_digests()], findings)
    entries = _read_entries(home, known or [], findings)
    if known is None:
        counted = list(entries.values())
    else:
        counted = [entries[digest] for digest in known if digest in entries]
        findings.notes += [
            f"log entry {digest}: of no log in the catalog, left by a killed command or of one that is running"
            for digest in sorted(entries.keys() - {*known} - set_aside(entries.values()))
        ]
    if known is not None and len(counted) == len(known):
        findings.rows += _asked(home, lambda: reader.compare(counted), findings) or []
    try:
        logs = follow(counted).logs
        promised = promised_versions(home.store, logs)
        needs = needs_of(logs, promised)
        findings.notes += [
            f"{ref}: its files are at {remote}, loramgr pull {ref} brings them"
            for ref, remote in written(logs, promised).items()
        ]
        return needs, mentioned(counted).without(needs)
    except IntegrityError:  # the gap is reported already; then the catalog may know
        told = _asked(home, lambda: _needed_by(reader.versions(_ALL), reader.bases()), findings)
    if told is None:
        findings.unchecked.append("manifests and blobs: neither the logs nor the catalog tell which there should be")
    return told or Needs(), Needs()


_ALL = VersionQuery(all_versions=True)


def _asked(home: Home, ask: Callable[[], Answer], findings: Findings) -> Answer | None:
    """Ask the catalog; None, and a finding, when its rows are damaged or the logs make no sense."""
    try:
        with home.catalog.suspecting():
            return ask()
    except IntegrityError as error:
        findings.rows.append(error.message)
        return None


def _read_entries(home: Home, known: Iterable[str], findings: Findings) -> dict[str, Entry]:
    """Return the log entries that can be read, in the order of their digests."""
    store, entries = home.store.entries, dict[str, Entry]()
    for digest in sorted({*known, *store.digests()}):
        findings.checked += 1
        if not is_digest(digest):
            findings.rows.append(f"entries: {digest!r} is no digest")
            continue
        try:
            entries[digest] = Entry.decode(store.get(digest))
        except LoramgrError as error:
            findings.files.append(_finding(store, digest, error))
    return entries


def _needed_by(versions: Iterable[VersionRecord], bases: Iterable[BaseRecord] = ()) -> Needs:
    needs = Needs()
    for version in versions:
        base = None if version.base is None else version.base.digest
        needs.add_version(version.digest, version.method, base, [asdict(file) for file in version.files])
    for base_record in bases:
        needs.add_base(base_record.digest)
    return needs


def _check_files(home: Home, needs: Needs, scope: Scope, findings: Findings) -> None:
    store = home.store
    for collection, checks in (
        (store.manifests, {digest: _manifest_check(home, digest, needs, scope) for digest in needs.manifests}),
        (store.blobs, {digest: _blob_check(home, digest, needs, scope) for digest in needs.blobs}),
    ):
        _check_all(home, collection, {digest: check for digest, check in checks.items() if scope.has(digest)}, findings)


def _check_removed(home: Home, removed: Needs, scope: Scope, findings: Findings) -> None:
    """Check what a `restore` would take, where it still is: in the store, or in the trash."""
    store = home.store
    for collection, digests in ((store.manifests, removed.manifests), (store.blobs, removed.blobs)):
        found: dict[Path, tuple[BlobStore, dict[str, Check]]] = {}
        for digest in filter(scope.has, digests):
            for place in (collection, *store.trash.holding(collection, digest)):
                if place.contains(digest):
                    _, checks = found.setdefault(place.folder, (place, {}))
                    checks[digest] = partial(place.size if scope.quick else place.check, digest)
        for place, checks in found.values():
            _check_all(home, place, checks, findings)


def _check_outputs(home: Home, scope: Scope, findings: Findings) -> None:
    """Read the merged folders that were made from this home again; a quick look and a sample leave them out."""
    if scope.quick or scope.sample is not None:
        return
    for folder, found in changed_outputs(home):
        findings.checked += 1
        if isinstance(found, UncheckedError):
            findings.unchecked.append(found.message)
        elif isinstance(found, LoramgrError):
            findings.outputs.append(f"merged folder {folder}: {found.message}")
        elif found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            findings.outputs.append(f"merged folder {folder}: changed since it was made: {', '.join(found[:3])}{more}")


def _manifest_check(home: Home, digest: str, needs: Needs, scope: Scope) -> Check:
    manifests = home.store.manifests
    if scope.quick:
        return lambda: manifests.size(digest)

    def check() -> None:
        told = json.loads(manifests.get(digest))
        if {key: told[key] for key in needs.manifests[digest]} != needs.manifests[digest]:
            raise IntegrityError(f"manifest {digest} is not what the log says of its version")

    return check


def _blob_check(home: Home, digest: str, needs: Needs, scope: Scope) -> Check:
    blobs = home.store.blobs
    if not scope.quick:
        return lambda: blobs.check(digest)

    def check() -> None:
        size = blobs.size(digest)
        if needs.blobs[digest] not in (None, size):
            raise IntegrityError(f"blob {digest} is damaged: it has {size:,} bytes")

    return check


def _check_all(home: Home, collection: BlobStore, checks: dict[str, Check], findings: Findings) -> None:
    from tqdm import tqdm

    def problem(digest: str) -> Finding | None:
        try:
            checks[digest]()
        except LoramgrError as error:
            return _finding(collection, digest, error)
        except (ValueError, KeyError, TypeError) as error:
            return Finding(collection, digest, "corrupt", f"{collection.kind} {digest} cannot be understood: {error}")
        return None

    ordered = sorted(checks)
    with ThreadPoolExecutor(home.jobs) as pool:
        problems = tqdm(
            pool.map(problem, ordered), total=len(ordered), desc=f"{collection.kind}s", delay=1, file=sys.stderr,
            disable=None if home.progress else True,
        )  # fmt: skip
        findings.files += [found for found in problems if found is not None]
    findings.checked += len(ordered)


def _finding(collection: BlobStore, digest: str, error: LoramgrError) -> Finding:
    if isinstance(error, UncheckedError):
        return Finding(collection, digest, "unchecked", error.message)
    state: State = "corrupt" if collection.contains(digest) else "missing"
    return Finding(collection, digest, state, error.message)


def _name_versions(home: Home, findings: Findings) -> None:
    """Say which versions cannot be used, since a digest tells a person nothing."""
    hit = {finding.digest for finding in findings.files}
    if not hit:
        return
    with home.catalog.reading() as reader:
        versions = _asked(home, lambda: reader.versions(_ALL), Findings()) or []
    findings.notes += [
        f"{reference(version)} needs {digest}"
        for version in versions
        for digest in (version.digest, *(file.digest for file in version.files))
        if digest in hit
    ]
