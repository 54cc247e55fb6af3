"""Use case: mend what a verification finds, from the trash, from other files or from the logs; put the rest aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from loramgr.catalog.query import VersionQuery
from loramgr.catalog.rebuild import rebuild
from loramgr.checkpoints.fingerprint import FingerprintCache, fingerprint
from loramgr.digests import digest_bytes, tensor_lines
from loramgr.errors import IntegrityError, LoramgrError, NotFoundError, UncheckedError
from loramgr.formats import read_adapter
from loramgr.records import StoreVerification
from loramgr.store.blobs import BlobStore
from loramgr.store.locks import locked
from loramgr.workspace.adapters import manifest
from loramgr.workspace.health import counting_entries, rebuild_catalog
from loramgr.workspace.home import Home
from loramgr.workspace.sources import open_source
from loramgr.workspace.verifying import Finding, Findings, Scope, examine

__all__ = ["Source", "open_home", "repair"]

_PASSES = 2  # a log entry that is mended may tell of files that nobody knew of before


class Source(NamedTuple):
    """Where a lost file may be had again.

    `find` takes a collection and a digest and returns the file, or its content, or None; what it returns is hashed
    before it counts, and LoramgrErrors and OSErrors mean that it has nothing.
    """

    name: str
    find: Callable[[BlobStore, str], Path | bytes | None]


def open_home(path: Path, jobs: int, progress: bool) -> tuple[Home, list[str]]:
    """Open a home, and make its catalog anew where that is missing or damaged; say what was done.

    Errors as in `Home.open` when the store itself is damaged, or the logs have a gap.
    """
    try:
        return Home.open(path, jobs, progress), []
    except IntegrityError:
        report = rebuild_catalog(path)
    return Home.open(path, jobs, progress), [f"catalog: made again from {report.entries} log entries"]


def repair(home: Home, refs: Sequence[str], scope: Scope, sources: Sequence[Source] = ()) -> StoreVerification:
    """Verify, mend what can be mended, and report what remains.

    A damaged or missing file is taken from the trash, made again where it follows from other files, or had from one
    of `sources`; a damaged one that is nowhere is moved into the quarantine. Rows that differ from complete logs are
    made again from these. Raises ConflictError when writers take too long.
    """
    findings, done = examine(home, refs, scope), list[str]()
    for _ in range(_PASSES):
        if not (findings.files or findings.rows):
            break
        with locked(home.store.root, exclusive=True):
            mended = _mend(home, findings, [*_own_sources(home), *sources])
        if not mended:
            break
        done += mended
        findings = examine(home, refs, scope)
    return findings.report(done)


def _mend(home: Home, findings: Findings, sources: Sequence[Source]) -> list[str]:
    """Mend the logs, then what is told from them: the rows, the blobs, and the manifests, which need the blobs."""
    store = home.store

    def mended(collection: BlobStore) -> Iterable[str]:
        damaged = [each for each in findings.files if each.collection is collection]
        return filter(None, (_mend_file(home, each, sources) for each in damaged))

    done = [*mended(store.entries), *_mend_rows(home, findings)]
    done += [*mended(store.blobs), *mended(store.manifests)]
    trashed = [each for each in findings.files if each.collection not in store.collections]
    return [*done, *filter(None, (_mend_file(home, each, sources) for each in trashed))]


def _mend_file(home: Home, finding: Finding, sources: Sequence[Source]) -> str | None:
    """Return what was done about a file, None when nothing can be or, by now, need be."""
    collection, digest = finding.collection, finding.digest
    try:
        collection.check(digest)
        return None
    except UncheckedError:
        return None
    except IntegrityError:
        source = _fetch(collection, digest, sources)
    if source is not None:
        return f"{collection.kind} {digest}: had again from {source}"
    if not collection.contains(digest):
        return None
    home.store.quarantine.take(collection, [digest], datetime.now(UTC))
    return f"{collection.kind} {digest}: moved into {home.store.quarantine.folder}"


def _fetch(collection: BlobStore, digest: str, sources: Sequence[Source]) -> str | None:
    """Put a file back from the first source that has it, and return the source's name; None when none has it."""
    for source in sources:
        found: Path | bytes | None = None
        with suppress(LoramgrError, OSError):
            found = source.find(collection, digest)
        with suppress(IntegrityError, NotFoundError):
            if isinstance(found, bytes) and digest_bytes(found) == digest:
                collection.put_bytes(found)
                return source.name
            if isinstance(found, Path):
                collection.put_file(found, expected=digest)
                return source.name
    return None


def _mend_rows(home: Home, findings: Findings) -> list[str]:
    """Make a damaged catalog anew, if the logs have everything that it knows of.

    An entry that is there but for its digest is a damaged row, any other that is not there a lost entry.
    """
    with suppress(IntegrityError):
        entries = {entry.digest: entry for entry in counting_entries(home.store)}
        absent = [facts for digest, facts in _recorded(home) if digest not in entries]
        told = {(each.predecessor, each.kind, each.name, each.time, each.author) for each in entries.values()}
        if (findings.rows or absent) and told.issuperset(absent):
            report = rebuild(home.catalog.path, home.store.uuid, entries.values())
            return [f"catalog: made again from {report.entries} log entries"]
    return []


def _recorded(home: Home) -> list[tuple[str, tuple[str | None, ...]]]:
    """Return the digest and the rest of each entry that the catalog knows; none when its rows are past reading."""
    try:
        with home.catalog.reading() as reader, home.catalog.suspecting():
            return [(entry.digest, entry[1:]) for entry in reader.recorded_entries()]
    except IntegrityError:
        return []


def _own_sources(home: Home) -> list[Source]:
    return [
        Source("the trash", lambda collection, digest: _from_trash(home, collection, digest)),
        Source("the files of its base", lambda collection, digest: _from_base(home, collection, digest)),
        Source("the files of its version", lambda collection, digest: _from_version(home, collection, digest)),
    ]


def _from_trash(home: Home, collection: BlobStore, digest: str) -> Path | None:
    for place in home.store.trash.holding(collection, digest):
        with suppress(IntegrityError):
            place.check(digest)
            return place.path(digest)
    return None


def _from_base(home: Home, collection: BlobStore, digest: str) -> bytes | None:
    """Fingerprint the registered bases of that digest again; their tensor list is a blob that the digest names."""
    if collection is not home.store.blobs:
        return None
    with home.catalog.reading() as reader:
        records = reader.bases_with_digest(digest)
    for record in records:
        with suppress(LoramgrError, OSError):
            checkpoint, _, _ = open_source(record.source, record.revision)
            found = fingerprint(checkpoint, home.jobs, home.progress, FingerprintCache(home.cache))
            lines = tensor_lines(found.values())
            if digest_bytes(lines) == digest:
                return lines
    return None


def _from_version(home: Home, collection: BlobStore, digest: str) -> bytes | None:
    """Write the manifest of a version again, which follows from its files and its base."""
    if collection is not home.store.manifests:
        return None
    with home.catalog.reading() as reader:
        versions = reader.versions(VersionQuery(all_versions=True))
    version = next((version for version in versions if version.digest == digest), None)
    if version is None:
        raise NotFoundError(f"no version has the manifest {digest}")
    with home.laid_out(version) as folder:
        return manifest(read_adapter(folder), version.files, version.base.digest if version.base else None)
