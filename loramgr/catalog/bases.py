"""Finds bases: by name, digest, or the start of a digest."""

from __future__ import annotations

import re
from difflib import get_close_matches

from sqlalchemy import ColumnElement, Connection, select

from loramgr.catalog.tables import Base, Log
from loramgr.digests import PREFIX, short
from loramgr.errors import NotFoundError, UsageError
from loramgr.records import BaseRecord

__all__ = ["find_base", "load_bases"]

_PREFIX = re.compile(r"sha256:(?P<tagged>[0-9a-f]{1,64})|(?P<bare>[0-9a-f]{6,64})")
_COLUMNS = (
    *("digest", "source", "revision", "tensors", "parameters", "bytes", "dtype", "architecture"),
    "created_at",
)


def load_bases(connection: Connection, *conditions: ColumnElement[bool]) -> list[BaseRecord]:
    """Return the bases that are not removed and meet the conditions, by name."""
    columns = [getattr(Base, column) for column in _COLUMNS]
    rows = connection.execute(
        select(Log.name, *columns).join(Log, Log.root == Base.root).where(~Log.removed, *conditions).order_by(Log.name)
    )
    return [BaseRecord(**row._mapping) for row in rows]


def find_base(connection: Connection, text: str) -> BaseRecord:
    """Return the base of that name, digest, `sha256:` prefix, or bare prefix of at least 6 hex digits.

    A name goes before a prefix; of several names of one digest the first counts. Raises NotFoundError when there is
    none and UsageError when the prefix fits several digests.
    """
    found = load_bases(connection, Log.name == text)
    prefix = _PREFIX.fullmatch(text)
    if not found and prefix:
        start = PREFIX + (prefix["tagged"] or prefix["bare"])
        found = load_bases(connection, Base.digest >= start, Base.digest < f"{start}g")
    if not found:
        raise _absent(connection, text)
    if len({base.digest for base in found}) > 1:
        candidates = ", ".join(f"{base.name} ({short(base.digest)})" for base in found)
        raise UsageError(f"{text!r} fits several bases: {candidates}", "give the name or more digits")
    return found[0]


def _absent(connection: Connection, text: str) -> NotFoundError:
    names = [base.name for base in load_bases(connection)]
    close = get_close_matches(text, names, n=3)
    hint = f"did you mean {' or '.join(close)}? loramgr base list shows all" if close else "loramgr base list"
    return NotFoundError(f"there is no base {text!r}", hint)
