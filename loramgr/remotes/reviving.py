"""Puts right what a remote over a key store needs to be read at all: what it says of itself, and where logs end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import suppress

from loramgr.errors import IntegrityError, NotFoundError
from loramgr.log import Entry
from loramgr.remotes.layout import DESCRIPTION, HEADS, LOGS, Description, Head, head_key
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import KeyStore, KnownEntry, MissingThere, RemoteLog, ends
from loramgr.remotes.reading import LogReader, read_bounded

__all__ = ["lost_log", "read_description", "restore_head", "revive_description"]

_DESCRIPTION_LIMIT = 64 << 10


def read_description(store: KeyStore) -> Description | None:
    """Return what a remote says of itself, None where nothing was ever pushed; IntegrityError where it got lost."""
    try:
        return _description(store)
    except NotFoundError:
        store.head(DESCRIPTION)  # says so where not only the key is missing, but the whole store
    if not _has_logs(store):
        return None
    with suppress(NotFoundError):  # somebody may just have pushed there for the first time
        return _description(store)
    raise MissingThere(f"{store.url}: {DESCRIPTION} is missing, although there are logs", _hint(store))


def revive_description(store: KeyStore) -> list[str]:
    """Say anew what a remote is, where that is lost or damaged, by what is there; a line for what was done."""
    with suppress(IntegrityError):  # a damaged one is written anew
        if read_description(store) is not None or not _has_logs(store):
            return []
    swapped = any(True for _ in store.list(HEADS)) or store.capabilities().compare_and_swap
    store.delete(DESCRIPTION)
    store.put_if_absent(DESCRIPTION, Description("swapped" if swapped else "branches").encode())
    return [f"{DESCRIPTION} was lost or damaged there, and was written anew"]


def lost_log(reader: LogReader, name: str, known: KnownEntry) -> RemoteLog | None:
    """Return the log of a name whose head is missing, damaged or leads nowhere, as the entries there tell it.

    Entries that are known count as they are here. None where the head is sound, or where there is nothing at all; a
    log without entries where there is only a damaged head.
    """
    if reader.rule == "branches" or _ends_well(reader, name, known):
        return None
    entries = _closed(dict(_readable(reader, name, known)))
    try:
        stored = reader.store.head(head_key(name))
    except IntegrityError:  # a link or the like has the head's name
        return RemoteLog(name, tuple(entries), ends(entries), "")
    if not (entries or stored):
        return None
    return RemoteLog(name, tuple(entries), ends(entries), "" if stored is None else stored.token)


def restore_head(reader: LogReader, log: RemoteLog, head: str) -> RemoteLog:
    """Have a log that was lost end there; ConflictError where its head changed meanwhile."""
    key = head_key(log.name)
    if not log.state:
        reader.store.delete(key)
    state = reader.store.put_if_match(key, Head(head).encode(), log.state or None)
    by_digest = {entry.digest: entry for entry in log.entries}
    chain, following = list[Entry](), by_digest.get(head)
    while following is not None:
        chain.append(following)
        following = by_digest.get(following.predecessor or "")
    return RemoteLog(log.name, tuple(reversed(chain)), (head,), state)


def _description(store: KeyStore) -> Description:
    where = f"{store.url}: {DESCRIPTION}"
    try:
        return Description.decode(where, read_bounded(store, DESCRIPTION, _DESCRIPTION_LIMIT))
    except IntegrityError as error:
        raise IntegrityError(error.message, error.hint or _hint(store)) from error


def _hint(store: KeyStore) -> str:
    return f"where a home has the adapters: loramgr push --repair --all --to {shlex.quote(store.url)}"


def _has_logs(store: KeyStore) -> bool:
    return any(True for folder in (HEADS, LOGS) for _ in store.list(folder))


def _ends_well(reader: LogReader, name: str, known: KnownEntry) -> bool:
    try:
        head = reader.head(name)
        if head is not None and not head.gone and known(head.digest) is None:
            reader.entry(name, head.digest)
    except IntegrityError:
        return False
    return head is not None


def _readable(reader: LogReader, name: str, known: KnownEntry) -> Iterator[tuple[str, Entry]]:
    def read(digest: str) -> Entry | None:
        with suppress(IntegrityError):
            return known(digest) or reader.entry(name, digest)
        return None

    listed = reader.listed_log(name)
    for digest, entry in zip(listed, each(reader.jobs, read, listed), strict=True):
        if entry is not None:
            yield digest, entry


def _closed(entries: dict[str, Entry]) -> list[Entry]:
    """Return those of the entries that can be followed back to a first one, each after its predecessor."""
    ordered: dict[str, Entry] = {}
    for entry in entries.values():
        branch: list[Entry] = []
        following: Entry | None = entry
        while following is not None and following.digest not in ordered:
            branch.append(following)
            before = following.predecessor
            if before is not None and before not in entries:
                branch = []
                break
            following = entries[before] if before is not None else None
        ordered.update((each_entry.digest, each_entry) for each_entry in reversed(branch))
    return list(ordered.values())
