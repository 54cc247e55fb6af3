"""Use cases about the workspace itself: is everything there and sound, and is the catalog what the logs say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from loramgr.catalog import schema
from loramgr.catalog.rebuild import rebuild
from loramgr.errors import IntegrityError, LoramgrError
from loramgr.log import Entry
from loramgr.records import RebuildReport, SchemaReport, StoreVerification
from loramgr.store.blobs import BlobStore
from loramgr.store.store import Store
from loramgr.workspace.home import CATALOG, Home

__all__ = ["current_schema", "rebuild_catalog", "upgrade_schema", "verify"]


@dataclass
class _Findings:
    """What a verification has found so far."""

    checked: int = 0
    corrupt: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(home: Home, refs: Sequence[str], *, quick: bool) -> StoreVerification:
    """Read blobs, manifests and log entries again, and compare the catalog's rows with the logs.

    With references only what these versions are made of; `quick` looks whether files are there, without reading them.
    """
    with home.catalog.reading() as reader:
        versions = [reader.version(ref) for ref in refs]
        files = {file.digest for version in versions for file in version.files} or {*reader.file_digests()}
        manifests = {version.digest for version in versions} or {*reader.version_digests()}
        bases = set() if refs else {base.digest for base in reader.bases()}
        entries = set() if refs else {*reader.entry_digests()}
    findings = _Findings()
    for collection, digests in (
        (home.store.blobs, files | bases),
        (home.store.manifests, manifests),
        (home.store.entries, entries),
    ):
        _check_collection(home, collection, digests, findings, quick=quick)
    if not refs:
        _compare_rows(home, findings)
    return StoreVerification(findings.checked, findings.corrupt, findings.missing, findings.notes)


def current_schema(home: Path) -> SchemaReport:
    """Return the schema revision of the home's catalog, None where there is none yet, and the newest one."""
    return SchemaReport(schema.current(home / CATALOG), schema.HEAD_REVISION)


def upgrade_schema(home: Path) -> SchemaReport:
    """Bring the catalog to the newest schema, or make an empty one in a new home."""
    if (home / CATALOG).exists():
        schema.upgrade(home / CATALOG)
    else:
        Home.open(home, jobs=1, progress=False)
    return current_schema(home)


def rebuild_catalog(home: Path) -> RebuildReport:
    """Make the catalog anew from the log entries of the store; the old one stays when an entry is damaged."""
    store = Store.open(home / "store")
    return rebuild(home / CATALOG, store.uuid, entries_of(store))


def entries_of(store: Store) -> Iterator[Entry]:
    """Yield every log entry of the store, each checked against its digest."""
    for digest in store.entries.digests():
        yield Entry.decode(store.entries.get(digest))


def _check_collection(
    home: Home, collection: BlobStore, digests: Iterable[str], findings: _Findings, *, quick: bool
) -> None:
    from tqdm import tqdm

    ordered = sorted(digests)
    check: Callable[[str], object] = collection.size if quick else collection.check

    def problem(digest: str) -> LoramgrError | None:
        try:
            check(digest)
        except LoramgrError as error:
            return error
        return None

    disable = None if home.progress else True
    with ThreadPoolExecutor(home.jobs) as pool:
        problems = tqdm(
            pool.map(problem, ordered), total=len(ordered), desc=f"{collection.kind}s", delay=1, file=sys.stderr,
            disable=disable,
        )  # fmt: skip
        for digest, error in zip(ordered, problems, strict=True):
            findings.checked += 1
            if error is not None:
                absent = not collection.contains(digest)
                (findings.missing if absent else findings.corrupt).append(f"{collection.kind} {digest}")


def _compare_rows(home: Home, findings: _Findings) -> None:
    """Compare the catalog with a fresh fold of the logs; entries that are not in it are what a killed command left."""
    with home.catalog.reading() as reader:
        known = set(reader.entry_digests())
        stray = [digest for digest in home.store.entries.digests() if digest not in known]
        findings.notes += [
            f"log entry {digest}: of no log in the catalog, left by a killed command" for digest in stray
        ]
        try:
            different = reader.compare(Entry.decode(home.store.entries.get(digest)) for digest in sorted(known))
        except IntegrityError as error:
            findings.notes.append(f"the catalog could not be compared with the logs: {error.message}")
            return
    findings.corrupt += [f"catalog {row}" for row in different]
