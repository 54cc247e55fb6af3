"""What can be asked of the catalog within one transaction; answers are records, never rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, and_, exists, func, select, tuple_

from loramgr.catalog import statements
from loramgr.catalog.bases import find_base, load_bases
from loramgr.catalog.family import children_elsewhere
from loramgr.catalog.history import children_entries, entries_by_adapter, names_of_log, newest_entries
from loramgr.catalog.query import VersionQuery
from loramgr.catalog.selection import ordering, selection
from loramgr.catalog.tables import Base, EntryRow, Log, Parent, Remote, Tag, Version, VersionFile
from loramgr.catalog.usage import BlobUse, blob_uses
from loramgr.catalog.versions import load_versions, reference
from loramgr.digests import is_digest
from loramgr.errors import NotFoundError, UsageError
from loramgr.log import Entry, LogKind
from loramgr.records import BaseRecord, FileRecord, RemoteRecord, VersionRecord
from loramgr.references import Reference, parse_reference

if TYPE_CHECKING:
    from loramgr.catalog.versions import Keys

__all__ = ["LogState", "Reader", "RecordedEntry"]


@dataclass(frozen=True, slots=True)
class LogState:
    """Where a log stands: digests of its first and last entry, the number of its next version, whether it is hidden."""

    root: str
    head: str
    next_number: int
    removed: bool


class RecordedEntry(NamedTuple):
    """What the catalog has of a log entry: all but its content."""

    digest: str
    predecessor: str | None
    kind: str
    name: str
    time: str
    author: str


class Reader:
    """A consistent view of the catalog; removed versions, adapters and bases are not in it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def bases(self) -> list[BaseRecord]:
        """Return all bases, by name."""
        return load_bases(self._connection)

    def base(self, text: str) -> BaseRecord:
        """Return a base by name, digest or prefix; NotFoundError, or UsageError when it is ambiguous."""
        return find_base(self._connection, text)

    def bases_with_digest(self, digest: str) -> list[BaseRecord]:
        """Return the bases of that digest, by name; empty when there is none."""
        return load_bases(self._connection, Base.digest == digest)

    def remotes(self) -> list[RemoteRecord]:
        """Return all remotes, by name."""
        columns = select(Log.name, Remote.url, Remote.created_at).join(Log, Log.root == Remote.root)
        rows = self._connection.execute(columns.where(~Log.removed).order_by(Log.name))
        return [RemoteRecord(str(name), url, created_at) for name, url, created_at in rows]

    def adapters(self) -> dict[str, str]:
        """Return the names of all adapters that are not removed, in their order, each with the root of its log."""
        rows = select(Log.name, Log.root).where(Log.kind == "adapter", ~Log.removed).order_by(Log.name)
        return {str(name): root for name, root in self._connection.execute(rows)}

    def removed_adapters(self) -> list[str]:
        """Return the names of the adapters that are removed as a whole, in their order."""
        rows = select(Log.name).where(Log.kind == "adapter", Log.removed).order_by(Log.name)
        return [str(name) for name in self._connection.scalars(rows)]

    def log_state(self, kind: LogKind, name: str) -> LogState | None:
        """Return the state of the log of that name, removed or not; None when the name is free."""
        row = self._connection.execute(statements.STATE_OF_LOG, {"log_kind": kind, "log_name": name}).one_or_none()
        return None if row is None else LogState(*row)

    def versions(self, query: VersionQuery | None = None) -> list[VersionRecord]:
        """Return the versions that a query selects; None selects the newest one of every adapter.

        Raises UsageError for a malformed filter; NotFoundError when the query's base is not registered, unless it is
        given as a whole digest.
        """
        query = query or VersionQuery()
        if query.base is not None and not is_digest(query.base):
            query = replace(query, base=self.base(query.base).digest)
        return load_versions(self._connection, selection(query), ordering(query.sort))

    def version(self, ref: str) -> VersionRecord:
        """Return the one version that a reference means.

        Raises NotFoundError when there is none, UsageError when it is malformed or fits several versions.
        """
        parsed = parse_reference(ref)
        found = load_versions(self._connection, _meant(parsed))
        if not found:
            raise self._absent(ref, parsed)
        if len(found) > 1:
            candidates = ", ".join(reference(version.name, version.version) for version in found)
            raise UsageError(f"{ref!r} fits several versions: {candidates}", "give the name and number of one")
        return found[0]

    def log(self, name: str) -> list[VersionRecord]:
        """Return the versions of an adapter, newest first; NotFoundError when there is no such adapter."""
        state = self.log_state("adapter", name)
        if state is None or state.removed:
            raise self._absent(name, parse_reference(name))
        return load_versions(self._connection, _live().where(Version.root == state.root))

    def versions_called(self, references: Sequence[str]) -> dict[str, VersionRecord]:
        """Return the versions that are there of those written as `name@vN`, by these references."""
        parsed = [parse_reference(ref) for ref in references]
        named = tuple_(Log.name, Version.number).in_([(ref.name, ref.number) for ref in parsed])
        keys = _live().where(Log.kind == "adapter", Log.name.in_({ref.name for ref in parsed}), named)
        return {reference(found.name, found.version): found for found in load_versions(self._connection, keys)}

    def newest(self, name: str) -> tuple[int, str] | None:
        """Return number and digest of an adapter's newest version, None when there is no such adapter."""
        adapter = {"log_kind": "adapter", "log_name": name}
        row = self._connection.execute(statements.NEWEST_VERSION, adapter).one_or_none()
        return None if row is None else (row.number, row.digest)

    def versions_of_base(self, digest: str) -> list[VersionRecord]:
        """Return every version that belongs to the base of that digest, by name, newest first."""
        return self.versions(VersionQuery(base=digest, all_versions=True))

    def find_version_by_files(self, name: str, files: Sequence[FileRecord]) -> VersionRecord | None:
        """Return the newest version of an adapter that has exactly these files, None when there is none."""
        of_version = and_(VersionFile.root == Version.root, VersionFile.number == Version.number)
        keys = _live().where(Log.name == name).where(
            select(func.count()).where(of_version).scalar_subquery() == len(files)
        )  # fmt: skip
        for file in files:
            same = and_(VersionFile.path == file.path, VersionFile.digest == file.digest)
            keys = keys.where(exists().where(of_version, same))
        found = load_versions(self._connection, keys.order_by(Version.number.desc()).limit(1))
        return found[0] if found else None

    def children(self, ref: str) -> list[str]:
        """Return the versions of any adapter that have this one as a parent, as `name@vN`, sorted by name.

        A parent recorded under an earlier name of the adapter counts. Errors as in `version`.
        """
        version = self.version(ref)
        names = self._connection.scalars(
            select(EntryRow.name).join(Log, Log.root == EntryRow.root).where(_named("adapter", version.name)).distinct()
        ).all()
        recorded = [reference(name, version.version) for name in names]
        of_child = and_(Parent.root == Version.root, Parent.number == Version.number)
        child = exists().where(of_child, Parent.digest == version.digest, Parent.ref.in_(recorded))
        rows = self._connection.execute(
            select(Log.name, Version.number)
            .join(Log, Log.root == Version.root)
            .where(~Version.removed, child)
            .order_by(Log.name, Version.number)
        )
        return [reference(str(name), number) for name, number in rows]

    def children_elsewhere(self) -> dict[str, list[str]]:
        """Return the versions that are parents of other adapters' versions, each with these, all as `name@vN`."""
        return children_elsewhere(self._connection)

    def entry_digests(self) -> Iterator[str]:
        """Yield the digest of every log entry that the catalog knows, sorted."""
        yield from self._connection.scalars(select(EntryRow.digest).order_by(EntryRow.digest))

    def recorded_entries(self) -> list[RecordedEntry]:
        """Return what the catalog has of every log entry, in the order of their digests."""
        columns = [getattr(EntryRow, name) for name in RecordedEntry._fields]
        return [RecordedEntry(*row) for row in self._connection.execute(select(*columns).order_by(EntryRow.digest))]

    def heads(self) -> dict[str, str]:
        """Return the digest of each log's last entry, by that of its first."""
        return {root: head for root, head in self._connection.execute(select(Log.root, Log.head))}

    def removed(self, ref: str) -> list[VersionRecord]:
        """Return the removed versions that a reference means, a bare name those of its adapter; newest first.

        Removed versions have no tags. Empty when there are none; UsageError when the reference is malformed.
        """
        parsed = parse_reference(ref)
        keys = select(Version.root, Version.number).join(Log, Log.root == Version.root).where(Version.removed)
        if parsed.name is not None:
            keys = keys.where(Log.name == parsed.name)
        if parsed.digest is not None:
            keys = keys.where(Version.digest >= parsed.digest, Version.digest < f"{parsed.digest}g")
        if parsed.number is not None:
            keys = keys.where(Version.number == parsed.number)
        return load_versions(self._connection, keys)

    def live_publications(self) -> Iterator[str]:
        """Yield the digests of the entries that published the versions that are not removed."""
        yield from self._connection.scalars(select(Version.entry).where(~Version.removed))

    def newest_entries(self, root: str | None, limit: int | None) -> list[str]:
        """Return the digests of a log's entries, or of all logs' where `root` is None, newest first."""
        return newest_entries(self._connection, root, limit)

    def entries_by_adapter(self) -> dict[str, list[str]]:
        """Return the digests of the entries of each adapter's log, removed or not, first to last, by its name."""
        return entries_by_adapter(self._connection)

    def children_entries(self, root: str, digest: str, number: int) -> list[str]:
        """Return the entries that published a version with this version of the log `root` as a parent."""
        references = [reference(name, number) for name in names_of_log(self._connection, root)]
        return children_entries(self._connection, digest, references)

    def blob_uses(self) -> Iterator[BlobUse]:
        """Yield which adapter's and base's versions consist of which blobs, removed versions included."""
        return blob_uses(self._connection)

    def compare(self, entries: Iterable[Entry]) -> list[str]:
        """Return what differs between the rows and those that these entries give, empty when nothing does.

        The entries are those that `entry_digests` names, read from the store. Raises IntegrityError when they have
        no rows to give: a predecessor is missing, or an entry makes no sense.
        """
        from loramgr.catalog.comparison import differences

        return differences(self._connection, entries)

    def _absent(self, ref: str, parsed: Reference) -> NotFoundError:
        if parsed.name is None:
            return NotFoundError(f"there is no version {ref}", "loramgr list --all-versions")
        names = self._connection.scalars(select(Log.name).where(Log.kind == "adapter", ~Log.removed)).all()
        if parsed.name in names:
            return NotFoundError(f"there is no version {ref}", f"loramgr log {parsed.name}")
        close = get_close_matches(parsed.name, [str(name) for name in names], n=3)
        hint = f"did you mean {' or '.join(close)}? loramgr list shows all" if close else "loramgr list"
        return NotFoundError(f"there is no adapter {parsed.name!r}", hint)


def _named(kind: LogKind, name: str) -> ColumnElement[bool]:
    return and_(Log.kind == kind, Log.name == name)


def _live() -> Keys:
    return select(Version.root, Version.number).join(Log, Log.root == Version.root).where(~Version.removed)


def _meant(ref: Reference) -> Keys:
    keys: Select[str, int] = _live()
    if ref.name is not None:
        keys = keys.where(Log.name == ref.name)
    if ref.digest is not None:
        return keys.where(Version.digest >= ref.digest, Version.digest < f"{ref.digest}g")
    if ref.number is not None:
        return keys.where(Version.number == ref.number)
    if ref.tag is not None:
        named = and_(Tag.root == Version.root, Tag.number == Version.number, Tag.tag == ref.tag)
        return keys.join(Tag, named)
    return keys.order_by(Version.number.desc()).limit(1)
