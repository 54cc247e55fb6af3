"""What a log entry says, in a few words for a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loramgr.digests import short

__all__ = ["phrase"]


def phrase(content: dict[str, Any]) -> str:
    """Return the numbers, names and values of an entry's content; what is written for programs only is left out."""
    return " ".join(word(content[key]) for key, word in _WORDS.items() if content.get(key))


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"-{key}" if value is None else f"{key}={_value(value)}" for key, value in values.items())


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _numbers(numbers: list[int]) -> str:
    return ", ".join(f"v{number}" for number in numbers)


# in the order in which they are told
_WORDS: dict[str, Callable[[Any], str]] = {
    "from": lambda name: f"from {name}",
    "number": lambda number: f"v{number}",
    "numbers": _numbers,
    "tag": str,
    "version": short,
    "digest": short,
    "source": str,
    "url": str,
    "replaces": lambda digests: f"{len(digests)} entries said nothing new",
    "tags": ", ".join,
    "labels": _pairs,
    "metrics": _pairs,
    "message": str,
}
