"""Where a remote keeps what: the keys of a key store that stand for logs, heads, manifests and blobs.

`docs/remote-layout.md` describes them for readers of other tools. What a listing says is parsed strictly: a key that
this layout has no place for is foreign, and left alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from loramgr.digests import PREFIX, canonical_json, is_digest
from loramgr.errors import IncompatibleError, IntegrityError, LoramgrError
from loramgr.references import check_name

__all__ = [
    "BLOBS",
    "COLLECTING",
    "DESCRIPTION",
    "HEADS",
    "LAYOUT",
    "LOGS",
    "MANIFESTS",
    "Description",
    "Head",
    "HeadRule",
    "content_key",
    "entry_key",
    "head_key",
    "log_prefix",
    "parse_content_key",
    "parse_entry_key",
    "parse_head_key",
]

LAYOUT = 1
DESCRIPTION = "loramgr.json"
BLOBS, MANIFESTS, LOGS, HEADS, COLLECTING = "blobs/", "manifests/", "logs/", "heads/", "collecting/"
HeadRule = Literal["swapped", "branches"]
_CONTENT = re.compile(r"(?:blobs|manifests)/([0-9a-f]{2})/([0-9a-f]{62})")
_ENTRY = re.compile(r"logs/([^/]+)/([0-9a-f]{64})")
_HEAD = re.compile(r"heads/([^/]+)")


@dataclass(frozen=True, slots=True)
class Description:
    """What a remote says of itself: whether its logs end where `heads/` says, or at every end of their branches."""

    heads: HeadRule

    def encode(self) -> bytes:
        """Return the bytes that stand under `loramgr.json`."""
        return canonical_json({"layout": LAYOUT, "heads": self.heads})

    @classmethod
    def decode(cls, where: str, data: bytes) -> Description:
        """Read it back; IncompatibleError for the layout of a newer loramgr, IntegrityError for anything else."""
        said = _json_object(where, data)
        if type(said.get("layout")) is int and said["layout"] > LAYOUT:
            raise IncompatibleError(f"{where}: layout {said['layout']}, of a newer loramgr", "upgrade loramgr")
        if said.get("layout") != LAYOUT or said.get("heads") not in ("swapped", "branches"):
            raise IntegrityError(f"{where}: does not describe a remote of loramgr")
        return cls(said["heads"])


@dataclass(frozen=True, slots=True)
class Head:
    """Where a log ends.

    A log that is here no more leaves a head behind which says so, so that every change of it is a swap: `moved` is the
    name that it has now, or None where the log was deleted; both are without meaning where `gone` is False.
    """

    digest: str
    gone: bool = False
    moved: str | None = None

    def encode(self) -> bytes:
        """Return the bytes that stand under `heads/<name>`."""
        said: dict[str, Any] = {"head": self.digest}
        return canonical_json(said | {"gone": True, "moved": self.moved} if self.gone else said)

    @classmethod
    def decode(cls, where: str, data: bytes) -> Head:
        """Read it back; IntegrityError for anything that `encode` does not write."""
        said = _json_object(where, data)
        digest, gone, moved = said.get("head"), said.get("gone", False), said.get("moved")
        sound = isinstance(digest, str) and is_digest(digest) and isinstance(gone, bool) and _is_name_or_none(moved)
        if not sound or cls(digest, gone, moved).encode() != data:  # type: ignore[arg-type]
            raise IntegrityError(f"{where}: does not name the head of a log")
        return cls(digest, gone, moved)  # type: ignore[arg-type]


def content_key(folder: str, digest: str) -> str:
    """Return the key of a blob or manifest; `folder` is BLOBS or MANIFESTS."""
    bare = digest.removeprefix(PREFIX)
    return f"{folder}{bare[:2]}/{bare[2:]}"


def log_prefix(name: str) -> str:
    """Return what the keys of a log's entries begin with."""
    return f"{LOGS}{name}/"


def entry_key(name: str, digest: str) -> str:
    """Return the key of an entry in the log of that name."""
    return log_prefix(name) + digest.removeprefix(PREFIX)


def head_key(name: str) -> str:
    """Return the key that says where the log of that name ends."""
    return HEADS + name


def parse_content_key(key: str) -> str | None:
    """Return the digest that a blob's or manifest's key stands for, None for a foreign key."""
    match = _CONTENT.fullmatch(key)
    return f"{PREFIX}{match[1]}{match[2]}" if match else None


def parse_entry_key(key: str) -> tuple[str, str] | None:
    """Return the log's name and the digest that an entry's key stands for, None for a foreign key."""
    match = _ENTRY.fullmatch(key)
    return (match[1], PREFIX + match[2]) if match and _is_name(match[1]) else None


def parse_head_key(key: str) -> str | None:
    """Return the name whose head a key holds, None for a foreign key."""
    match = _HEAD.fullmatch(key)
    return match[1] if match and _is_name(match[1]) else None


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except LoramgrError:
        return False
    return True


def _is_name_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _is_name(value))


def _json_object(where: str, data: bytes) -> dict[str, Any]:
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: damaged, not JSON: {error}") from error
    if not isinstance(said, dict):
        raise IntegrityError(f"{where}: damaged, not a JSON object")
    return said
