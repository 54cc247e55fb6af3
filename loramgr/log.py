"""Log entries: what happened to a name, each naming the one before it, none ever overwritten.

An adapter's, a base's or a remote's log is the chain of its entries; the catalog is an index over all logs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from loramgr.digests import canonical_json, digest_bytes
from loramgr.errors import IntegrityError

__all__ = ["ENTRY_SCHEMA", "KINDS", "Entry", "LogKind"]

ENTRY_SCHEMA = 1
LogKind = Literal["adapter", "base", "remote"]

KINDS: dict[str, frozenset[str]] = {
    "adapter": frozenset({"publish", "tag", "untag", "label", "metric", "rename", "remove", "restore", "rebase"}),
    "base": frozenset({"add", "remove"}),
    "remote": frozenset({"add", "remove"}),
}


@dataclass(frozen=True)
class Entry:
    """One event in a log.

    `name` is what the log is called once the entry counts, `predecessor` the digest of the entry before it, None for
    the first one; `time` is ISO 8601 UTC. `content` by kind:

    publish  number, version (digest of the manifest), parents [{ref, digest}], message, tags [], labels {},
             metrics {}, recipe (None for a version that came from a file), summary (see `catalog.tables.Version`)
    tag      tag, number: the tag names that version from now on, wherever it was
    untag    tag
    label    number, labels {key: text, or None to drop it}
    metric   number, metrics {key: number, or None to drop it}
    rename   from
    remove   adapter: numbers [] of the versions that are gone, whole (the adapter itself is); base, remote: nothing
    restore  numbers [] of the removed versions that are back, without their tags, whole (the adapter itself is back)
    rebase   replaces [digests of originals]: what they said on another branch says nothing new on this one
    add      base: digest, source, revision, tensors, parameters, bytes, dtype, architecture; remote: url

    A copy that a rebase made has `original` in its content too, the digest of what it is a copy of (see `forks`).
    """

    log: LogKind
    kind: str
    name: str
    predecessor: str | None
    time: str
    author: str
    content: dict[str, Any]

    def encode(self) -> bytes:
        """Return the RFC 8785 bytes that the entry's digest names."""
        return self._encoded

    @cached_property
    def _encoded(self) -> bytes:
        return self._canonical()

    def settled(self) -> Entry:
        """Return the entry as it is read back: keys in canonical order, 1.0 as 1."""
        entry = Entry.decode(self.encode())
        vars(entry)["digest"] = self.digest  # RFC 8785 gives what was read back the same bytes
        return entry

    def _canonical(self) -> bytes:
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return canonical_json({"schema": ENTRY_SCHEMA, **said})

    @cached_property
    def digest(self) -> str:
        """The entry's name: the digest of its encoded bytes."""
        known = vars(self).get("_encoded")  # which is not kept for the many entries that are only followed
        return digest_bytes(self._canonical() if known is None else known)

    @classmethod
    def stored(cls, digest: str, data: bytes) -> Entry:
        """Read back bytes that were hashed and have this digest, which is then not worked out again."""
        entry = cls.decode(data)
        vars(entry).update(digest=digest, _encoded=data)
        return entry

    @classmethod
    def decode(cls, data: bytes) -> Entry:
        """Read an entry back; IntegrityError for anything that is not one of this schema."""
        try:
            content = json.loads(data, parse_int=_number)
            schema = content.pop("schema")
            entry = cls(**{field.name: content.pop(field.name) for field in fields(cls)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"not a log entry: {error}", "loramgr verify") from error
        if schema != ENTRY_SCHEMA or content or entry.kind not in KINDS.get(entry.log, ()):
            raise IntegrityError(
                f"log entry of schema {schema}, kind {entry.kind!r}: written by another version of loramgr",
                "upgrade loramgr",
            )
        return entry


def _number(digits: str) -> int | float:
    """Read an integer beyond 2^53 as the float it was: RFC 8785 writes 1e20 as its digits and takes no such integer."""
    number = int(digits)
    return number if abs(number) < 1 << 53 else float(number)
