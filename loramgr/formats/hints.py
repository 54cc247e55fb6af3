"""The note that a version keeps beside its files of what a person had to say before they could be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loramgr.digests import canonical_json
from loramgr.formats.configuration import Fields, load_configuration
from loramgr.hints import ReadHints

__all__ = ["HINTS", "ReadHints", "encode_hints", "unscaled", "with_those_beside"]

HINTS = "loramgr_hints.json"


def with_those_beside(hints: ReadHints, folder: Path) -> ReadHints:
    """Return the hints, and where one is missing that of the note in the folder, if there is a note."""
    path = folder / HINTS
    if not path.is_file():
        return hints
    fields = Fields(path, load_configuration(path))
    return replace(
        hints,
        alpha=hints.alpha if hints.alpha is not None else _alpha(fields),
        enable_lora=hints.enable_lora if hints.enable_lora is not None else _slices(fields),
    )


def unscaled(format_name: str, alpha: float | None) -> dict[str, Any]:
    """Return the fields of an `Adapter` that say that its alpha is not known; none where it is."""
    if alpha is not None:
        return {}
    return {
        "is_unscaled": True,
        "obstacle": f"its scaling is alpha / r, and the alpha of a {format_name} checkpoint stands in no file",
        "warnings": ("alpha, the scaling and what follows from it are not known: say it with --alpha N",),
    }


def encode_hints(hints: Mapping[str, Any]) -> bytes:
    """Return the note for hints that were used."""
    return canonical_json(dict(hints))


def _alpha(fields: Fields) -> float | None:
    return None if fields.content.get("alpha") is None else fields.number("alpha")


def _slices(fields: Fields) -> tuple[bool, ...] | None:
    value = fields.content.get("enable_lora")
    if value is None:
        return None
    if not (isinstance(value, list) and value and all(isinstance(each, bool) for each in value)):
        raise fields.refused("enable_lora", "a list of true and false")
    return tuple(value)
