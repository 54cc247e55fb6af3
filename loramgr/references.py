"""Names and references: how a person writes which version of which adapter is meant.

A reference is `name` (the latest version), `name@v3`, `name@tag`, `name@latest`, `name@sha256:prefix` or
`sha256:prefix`.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from loramgr.digests import PREFIX
from loramgr.errors import UsageError

__all__ = ["LATEST", "Reference", "check_name", "check_tag", "is_path", "parse_reference", "parse_weighted"]

LATEST = "latest"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_NUMBER = re.compile(r"v(0|[1-9][0-9]{0,17})")
_RESERVED = re.compile(r"latest|v[0-9]+")
_DIGEST_PREFIX = re.compile(r"sha256:[0-9a-f]{1,64}")
_NAME_RULE = "a name has 1 to 96 of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit"


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference; at most one of `number`, `tag` and `digest` is set, none of them means the latest version.

    `name` is None for a bare digest; `digest` is `sha256:` and 1 to 64 hex digits.
    """

    name: str | None
    number: int | None = None
    tag: str | None = None
    digest: str | None = None


def check_name(name: str) -> str:
    """Return the name of an adapter, base or remote; UsageError when it is not a valid one."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a valid name", _NAME_RULE)
    return name


def check_tag(tag: str) -> str:
    """Return the tag; UsageError when it is not a valid name or is reserved (`latest`, `v` and a number)."""
    if not _NAME.fullmatch(tag):
        raise UsageError(f"{tag!r} is not a valid tag", _NAME_RULE)
    if _RESERVED.fullmatch(tag):
        raise UsageError(f"the tag {tag!r} is reserved", "`latest` and `v1`, `v2`, … name versions by themselves")
    return tag


def is_path(text: str) -> bool:
    """Say whether the text means a path on disk: it contains a separator or starts with a dot."""
    separators = {"/", os.sep, os.altsep or "/"}
    return text.startswith(".") or any(separator in text for separator in separators)


def parse_reference(text: str) -> Reference:
    """Read a reference; UsageError when it is none."""
    if text.startswith(PREFIX):
        return Reference(None, digest=_digest_prefix(text))
    name, at, selector = text.partition("@")
    check_name(name)
    if not at or selector == LATEST:
        return Reference(name)
    if selector.startswith(PREFIX):
        return Reference(name, digest=_digest_prefix(selector))
    if number := _NUMBER.fullmatch(selector):
        return Reference(name, number=int(number[1]))
    return Reference(name, tag=check_tag(selector))


def _digest_prefix(text: str) -> str:
    if not _DIGEST_PREFIX.fullmatch(text):
        raise UsageError(f"{text!r} is not a digest or the start of one", "write sha256: and up to 64 hex digits")
    return text


def parse_weighted(text: str) -> tuple[str, float]:
    """Split `REF=WEIGHT` at the last `=`; the weight is 1.0 where none is given.

    A path may contain `=` itself: what follows its last `=` is a weight only when it is a number. UsageError for a
    weight that is not a finite number.
    """
    reference, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError as error:
        if is_path(text):
            return text, 1.0
        raise UsageError(f"{weight!r} is not a number", f"{reference}=0.5") from error
    if not math.isfinite(value):
        raise UsageError(f"the weight {weight!r} of {reference} is not finite", f"{reference}=0.5")
    return reference, value
