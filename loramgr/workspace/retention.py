"""Use cases about what is kept: drop old versions by a rule, and bring removed ones back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from loramgr.catalog.catalog import Writer
from loramgr.catalog.query import VersionQuery
from loramgr.errors import IntegrityError, NotFoundError, UsageError
from loramgr.log import Entry
from loramgr.records import Removal, VersionRecord
from loramgr.references import parse_reference
from loramgr.store.blobs import BlobStore
from loramgr.workspace.adapters import reference
from loramgr.workspace.home import Home
from loramgr.workspace.options import Retention
from loramgr.workspace.promises import is_elsewhere

__all__ = ["prune", "restore"]

Versions = Sequence[VersionRecord]


def prune(home: Home, name: str | None, keep: Retention, *, dry_run: bool) -> Removal:
    """Drop all versions of an adapter, of every adapter where `name` is None, but those that are to be kept.

    All are dropped in one transaction, or none. Raises UsageError when no version would have to stay, and
    NotFoundError when no version has a metric whose best is to stay.
    """
    if keep.last < 1:
        raise UsageError("prune keeps at least one version of an adapter", "loramgr remove NAME")
    with home.writing() as writer:
        versions = writer.versions(VersionQuery(all_versions=True)) if name is None else writer.log(name)
        logs: dict[str, list[VersionRecord]] = {}
        for version in versions:
            logs.setdefault(version.name, []).append(version)
        _check_metrics(versions, keep)
        kept = {reference(version) for log in logs.values() for version in _kept(log, keep)}
        dropped = [version for version in versions if reference(version) not in kept]
        if not keep.force:
            dropped = _unused(writer, dropped)
        if not dry_run:
            for adapter in logs:
                _remove(home, writer, adapter, [each.version for each in dropped if each.name == adapter])
    return Removal([reference(version) for version in dropped])


def restore(home: Home, ref: str) -> VersionRecord:
    """Bring a removed version back, or by a bare name what the newest removal took from that adapter.

    Labels and metrics come back, tags do not. A version that is there is returned as it is. Returns the newest of
    several. Raises NotFoundError when there is nothing to bring back, and IntegrityError, naming it, when a file is
    neither in the store nor in its trash any more; then nothing has changed.
    """
    parsed = parse_reference(ref)
    if "@" in ref and (parsed.number, parsed.digest) == (None, None):
        raise UsageError(f"{ref}: removed versions have no tags", f"loramgr restore {parsed.name}@v1")
    with home.writing() as writer:
        gone: Versions = writer.removed(ref)
        bare = parsed.name is not None and "@" not in ref
        if bare:
            gone = _newest_removal(home, writer, str(parsed.name), gone)
        elif len(gone) > 1:
            found = ", ".join(map(reference, gone))
            raise UsageError(f"{ref!r} fits several removed versions: {found}", "give the name and number of one")
        if gone:
            _bring_back(home, gone)
            _record_restore(home, writer, gone)
        return writer.version(reference(gone[0]) if gone else ref)


def _check_metrics(versions: Versions, keep: Retention) -> None:
    for metric in keep.best:
        key = metric.removeprefix("-")
        if versions and not any(key in version.metrics for version in versions):
            raise NotFoundError(f"no version has the metric {key!r}", "loramgr list --all-versions")


def _kept(log: Versions, keep: Retention) -> Iterator[VersionRecord]:
    """Yield what stays of an adapter, newest first, by the rule alone."""
    yield from log[: keep.last]
    if keep.tagged or not keep.force:
        yield from (version for version in log if version.tags)
    for metric in keep.best:
        key, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
        values = [sign * version.metrics[key] for version in log if key in version.metrics]
        yield from (version for version in log if key in version.metrics and sign * version.metrics[key] == max(values))


def _unused(writer: Writer, dropped: Versions) -> list[VersionRecord]:
    """Return those that no version of another adapter that stays has as a parent.

    The versions of one adapter, each the parent of the next, would otherwise keep each other.
    """
    elsewhere = writer.children_elsewhere()
    children = {ref: elsewhere.get(ref, []) for ref in map(reference, dropped)}
    while held := {ref for ref, found in children.items() if any(child not in children for child in found)}:
        children = {ref: found for ref, found in children.items() if ref not in held}
    return [version for version in dropped if reference(version) in children]


def _remove(home: Home, writer: Writer, name: str, numbers: list[int]) -> None:
    if numbers:
        home.record(writer, "adapter", "remove", name, {"numbers": sorted(numbers), "whole": False})


def _newest_removal(home: Home, writer: Writer, name: str, gone: Versions) -> Versions:
    """Return the versions that the newest removal took which is not undone."""
    state = writer.log_state("adapter", name)
    if state is not None and gone:
        for digest in writer.newest_entries(state.root, None):
            entry = Entry.decode(home.store.entries.get(digest))
            numbers = entry.content["numbers"] if entry.kind == "remove" else ()
            if taken := [version for version in gone if version.version in numbers]:
                return taken
    if state is None or state.removed:
        writer.log(name)  # says what there is instead
    raise NotFoundError(f"no version of {name} is removed", f"loramgr log {name}")


def _record_restore(home: Home, writer: Writer, versions: Versions) -> None:
    name = versions[0].name
    state = writer.log_state("adapter", name)
    whole = state is not None and state.removed
    numbers = sorted(version.version for version in versions)
    home.record(writer, "adapter", "restore", name, {"numbers": numbers, "whole": whole})


def _bring_back(home: Home, versions: Versions) -> None:
    """Move what the versions consist of out of the trash, hashed again; nothing when a part is lost.

    What was only promised before it was removed is so again.
    """
    store = home.store
    versions = [version for version in versions if not is_elsewhere(store, version)]
    parts = {(store.manifests, version.digest): f"the manifest of {reference(version)}" for version in versions}
    for version in versions:
        parts |= {(store.blobs, file.digest): f"{file.path} of {reference(version)}" for file in version.files}
    places = {part: _sound_place(home, *part) for part in parts}
    lost = [f"{parts[part]} ({part[1]})" for part, place in places.items() if place is None]
    if lost:
        raise IntegrityError(
            f"gone from the store and its trash: {', '.join(lost)}", "add the adapter again from its own files"
        )
    for (collection, digest), place in places.items():
        if place is not None and place is not collection:
            place.move([digest], collection)


def _sound_place(home: Home, collection: BlobStore, digest: str) -> BlobStore | None:
    """Return where a file is whole, the collection itself or a place in the trash; None when it is nowhere."""
    for place in (collection, *home.store.trash.holding(collection, digest)):
        with suppress(IntegrityError):
            place.check(digest)
            return place
    return None
