"""An adapter's JSON configuration, checked before it is believed, and typed access to its keys."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramgr.digests import canonical_json
from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError, UsageError
from loramgr.tensorfile import LFS_MAGIC

__all__ = ["Fields", "load_configuration", "parse_object"]


def load_configuration(path: Path) -> dict[str, Any]:
    """Read a configuration file as a JSON object that has a canonical form.

    Raises NotFoundError, IncompatibleError for a Git LFS pointer, for JSON that is no object or that holds values
    without a canonical form, and IntegrityError for what is not JSON: an empty file, NaN, a key that stands twice.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    if data.startswith(LFS_MAGIC):
        raise IncompatibleError(
            f"{path}: this is a Git LFS pointer, not the configuration itself", "git lfs pull, then add it again"
        )
    return parse_object(path, data)


def parse_object(path: Path | str, data: bytes) -> dict[str, Any]:
    """Parse a JSON object that has a canonical form; `path` is what its errors, `load_configuration`'s, name."""
    if not data.strip():
        raise IntegrityError(f"{path}: the configuration is empty", "save the adapter again")
    try:
        content = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: the configuration is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise IncompatibleError(f"{path}: the configuration is a {type(content).__name__}, not a JSON object")
    try:
        canonical_json(content)
    except UsageError as error:
        raise IncompatibleError(f"{path}: {error.message}") from error
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


@dataclass(frozen=True, slots=True)
class Fields:
    """The keys of a configuration, read with the type they must have; a missing key and null mean the default.

    Every method raises IncompatibleError, naming file and key, for a value of another type.
    """

    path: Path
    content: dict[str, Any]

    def refused(self, key: str, expected: str) -> IncompatibleError:
        """Return the error for a key whose value is not what it must be."""
        return IncompatibleError(f"{self.path}: {key} is {self.content.get(key)!r}, it must be {expected}")

    def flag(self, key: str) -> bool:
        """Return a boolean, False by default."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refused(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        """Return a text, None by default and for an empty one."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refused(key, "a text or null")
        return value or None

    def names(self, key: str) -> tuple[str, ...]:
        """Return the names of a list, in its order, or the one name given alone; none by default."""
        value = self.content.get(key)
        if value is None:
            return ()
        names = [value] if isinstance(value, str) else value
        if not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
            raise self.refused(key, "a name or a list of names")
        return tuple(names)

    def rank(self, key: str) -> int:
        """Return a rank, which has no default."""
        value = self.content.get(key)
        if not is_rank(value):
            raise self.refused(key, "a whole number above 0")
        return int(value)  # type: ignore[arg-type]  # is_rank says so

    def number(self, key: str) -> float:
        """Return a number, which has no default."""
        value = self.content.get(key)
        if not is_number(value):
            raise self.refused(key, "a number")
        return float(value)  # type: ignore[arg-type]  # is_number says so

    def mapping(self, key: str) -> dict[str, Any]:
        """Return an object, empty by default."""
        value = self.content.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refused(key, "an object")
        return value


def is_rank(value: object) -> bool:
    """Say whether the value is a whole number above 0; JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """Say whether the value is a finite number; JSON's true is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
