"""Use case: who did what when, as the logs have it."""

from __future__ import annotations

from collections.abc import Callable

from loramgr.catalog.reader import Reader
from loramgr.errors import NotFoundError
from loramgr.log import Entry
from loramgr.records import HistoryEntry
from loramgr.references import Reference, parse_reference
from loramgr.workspace.home import Home

__all__ = ["history"]


def history(home: Home, ref: str | None, limit: int | None) -> list[HistoryEntry]:
    """Return log entries, newest first: all, those of an adapter's log, or those about one version.

    A bare name is the adapter, removed or not; any other reference is a version, and entries about it are those that
    name its number, move a tag to or from it, or publish a version with it as a parent. `limit` None returns all.
    """
    with home.catalog.reading() as reader:
        if ref is None:
            digests = reader.newest_entries(None, limit)
        elif "@" in ref or ref.startswith("sha256:"):
            return _about_version(home, reader, ref)[:limit]
        else:
            digests = reader.newest_entries(_root(reader, parse_reference(ref)), limit)
    return [_shown(_load(home, digest)) for digest in digests]


def _root(reader: Reader, ref: Reference) -> str:
    state = reader.log_state("adapter", str(ref.name))
    if state is None:
        reader.version(str(ref.name))  # says what there is instead
        raise NotFoundError(f"there is no adapter {ref.name!r}", "loramgr list")
    return state.root


def _about_version(home: Home, reader: Reader, ref: str) -> list[HistoryEntry]:
    parsed = parse_reference(ref)
    if parsed.number is not None:
        root, number = _root(reader, parsed), parsed.number
    else:
        version = reader.version(ref)
        root, number = _root(reader, Reference(version.name)), version.version
    log = [_load(home, digest) for digest in reversed(reader.newest_entries(root, None))]
    published = next((entry for entry in log if entry.kind == "publish" and entry.content["number"] == number), None)
    if published is None:
        raise NotFoundError(f"there is no version {ref}, and there never was", f"loramgr log {parsed.name}")
    children = [_load(home, d) for d in reader.children_entries(root, published.content["version"], number)]
    own = _mentions(log, number)
    known = {entry.digest for entry in own}
    found = [*own, *(entry for entry in children if entry.digest not in known)]
    positions = {entry.digest: position for position, entry in enumerate(log)}
    found.sort(key=lambda entry: (entry.time, positions.get(entry.digest, -1)), reverse=True)
    return [_shown(entry) for entry in found]


def _mentions(log: list[Entry], number: int) -> list[Entry]:
    """Return the entries of a log, first to last, that are about one of its versions."""
    found, tags = [], set[str]()
    for entry in log:
        content = entry.content
        held = content.get("tag") in tags
        if _names(entry, number) or held:
            found.append(entry)
        if entry.kind == "publish" and content["number"] == number:
            tags.update(content["tags"])
        elif entry.kind == "publish":
            tags.difference_update(content["tags"])
        elif "tag" in content:
            _move(tags, content["tag"], here=content.get("number") == number)
    return found


def _move(tags: set[str], tag: str, *, here: bool) -> None:
    change: Callable[[str], None] = tags.add if here else tags.discard
    change(tag)


def _names(entry: Entry, number: int) -> bool:
    return number == entry.content.get("number") or number in entry.content.get("numbers", ())


def _load(home: Home, digest: str) -> Entry:
    return Entry.decode(home.store.entries.get(digest))


def _shown(entry: Entry) -> HistoryEntry:
    return HistoryEntry(entry.digest, entry.log, entry.kind, entry.name, entry.time, entry.author, entry.content)
