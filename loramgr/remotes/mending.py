"""Puts right what is damaged of a log at a remote over a key store, by a home that has the entries."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from loramgr.errors import IntegrityError
from loramgr.log import Entry
from loramgr.remotes.layout import entry_key, log_prefix, parse_entry_key
from loramgr.remotes.parallel import each
from loramgr.remotes.reading import LogReader

__all__ = ["EntrySizes", "entry_sizes", "mend_log"]


EntrySizes = dict[tuple[str, str], int]  # the bytes of entries by the name they stand under and their digest


def mend_log(
    reader: LogReader, name: str, entries: Sequence[Entry], *, thorough: bool, listed: EntrySizes | None = None
) -> int:
    """Store those of the entries of a log anew that are missing there or are not what their keys name; return how many.

    `thorough` reads all of them, else those whose length is another. Under former names of the log only what stands
    there is looked at. `listed` is what the remote has where that is known, else it is asked.
    """

    def mended(placed: tuple[str, Entry]) -> bool:
        name, entry = placed
        with suppress(IntegrityError):
            reader.entry(name, entry.digest)
            return False
        key = entry_key(name, entry.digest)
        reader.store.delete(key)  # no store replaces a key that is there
        reader.store.put_if_absent(key, entry.encode())
        return True

    names = dict.fromkeys([name, *(entry.name for entry in entries)])
    if listed is None:
        listed = {}
        for each_name in names:
            listed |= entry_sizes(reader, log_prefix(each_name))
    if reader.rule == "branches" and (name, entries[-1].digest) not in listed:
        return 0  # somebody is deleting the log, its last entries first
    places = [(each_name, entry) for each_name in names for entry in entries]
    there = [(at, entry, listed.get((at, entry.digest))) for at, entry in places]
    wrong = (
        (at, entry)
        for at, entry, size in there
        if (at == name or size is not None) and (thorough or size != len(entry.encode()))
    )
    return sum(each(reader.jobs, mended, wrong))


def entry_sizes(reader: LogReader, prefix: str) -> dict[tuple[str, str], int]:
    """Return what the remote lists of entries below a prefix."""
    parsed = ((parse_entry_key(stored.key), stored.size) for stored in reader.store.list(prefix))
    return {place: size for place, size in parsed if place is not None}
