"""What a key of a store may look like, the same in all of them."""

from __future__ import annotations

import re

from loramgr.errors import IntegrityError

__all__ = ["HIDDEN", "check_key", "folder_of"]

HIDDEN = "."  # what a store keeps for itself begins with it, and is not listed
_KEY = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,255}(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]{1,255})*")
_LONGEST = 900  # stores take 1024 bytes, the prefix of the remote included


def check_key(key: str) -> str:
    """Return the key; IntegrityError when it is empty, absolute, too long, hidden, or leaves its place."""
    if len(key) > _LONGEST or not _KEY.fullmatch(key):
        raise IntegrityError(f"{key[:_LONGEST]!r} is not a key of a remote")
    return key


def folder_of(prefix: str) -> str:
    """Return the whole parts at the beginning of a prefix of keys, without the last slash."""
    return prefix.rpartition("/")[0]
