"""Puts right what is damaged of a log at a remote over a key store, by a home that has the entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from loramgr.errors import IntegrityError
from loramgr.log import Entry
from loramgr.remotes.layout import entry_key, log_prefix, parse_entry_key
from loramgr.remotes.parallel import each
from loramgr.remotes.reading import LogReader

__all__ = ["mend_log"]


def mend_log(reader: LogReader, name: str, entries: Sequence[Entry], *, thorough: bool) -> int:
    """Store those of the entries of a log anew that are missing there or are not what their keys name; return how many.

    `thorough` reads all of them, else those whose length is another. Under former names of the log only what stands
    there is looked at.
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

    return sum(each(reader.jobs, mended, _suspects(reader, name, entries, thorough=thorough)))


def _suspects(reader: LogReader, now: str, entries: Sequence[Entry], *, thorough: bool) -> Iterator[tuple[str, Entry]]:
    """Yield what has to be read, each entry with the name that it stands under."""
    for name in dict.fromkeys([now, *(entry.name for entry in entries)]):
        parsed = ((parse_entry_key(stored.key), stored.size) for stored in reader.store.list(log_prefix(name)))
        sizes = {found[1]: size for found, size in parsed if found is not None and found[0] == name}
        if name == now and reader.rule == "branches" and entries[-1].digest not in sizes:
            return  # somebody is deleting the log, its last entries first
        for entry in entries:
            if name != now and entry.digest not in sizes:
                continue
            if thorough or sizes.get(entry.digest) != len(entry.encode()):
                yield name, entry
