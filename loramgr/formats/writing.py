"""Adapters written in the formats that other tools read, by a table of writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter, LowRank
from loramgr.errors import IncompatibleError, UsageError
from loramgr.formats.diffusers_writer import write_diffusers
from loramgr.formats.gguf_writer import write_gguf
from loramgr.formats.kohya_writer import write_kohya, write_lycoris
from loramgr.formats.loralib_writer import write_loralib
from loramgr.formats.mlx_writer import write_mlx
from loramgr.formats.peft_export import export_peft

__all__ = ["WRITERS", "Written", "write_adapter"]


@dataclass(frozen=True, slots=True)
class Written:
    """Where an adapter is written, an empty folder, and its base: digest and config.json, None where unknown."""

    folder: Path
    base_digest: str | None = None
    config: Mapping[str, Any] | None = None


Writer = Callable[[Adapter, Written], list[str]]

WRITERS: dict[str, Writer] = {
    "peft": lambda adapter, to: export_peft(adapter, to.folder, to.base_digest),
    "kohya": lambda adapter, to: write_kohya(adapter, to.folder, to.base_digest),
    "lycoris": lambda adapter, to: write_lycoris(adapter, to.folder, to.base_digest),
    "diffusers": lambda adapter, to: write_diffusers(adapter, to.folder, to.base_digest),
    "mlx": lambda adapter, to: write_mlx(adapter, to.folder),
    "gguf": lambda adapter, to: write_gguf(adapter, to.folder, to.config),
    "loralib": lambda adapter, to: write_loralib(adapter, to.folder),
}


def write_adapter(adapter: Adapter, format: str, to: Written) -> list[str]:
    """Write the adapter, its names those of its base, and return notes for a person.

    Raises UsageError for a format that is not written, and IncompatibleError, naming it, for what the format cannot
    hold, and for an adapter whose own names mean nothing without its base.
    """
    if format not in WRITERS:
        raise UsageError(f"{format!r} is not a format that is written", f"--format {' or '.join(sorted(WRITERS))}")
    if adapter.obstacle is not None:
        raise IncompatibleError(
            f"it is kept as it is and only exported so: {adapter.obstacle}", "export without --format"
        )
    if adapter.naming is not None and adapter.naming.is_needed:
        raise IncompatibleError(
            f"its modules have {adapter.naming.described}, which only its base turns into those of {format}",
            "give the base with --base",
        )
    uncut = [name for name, each in adapter.updates.items() if isinstance(each, LowRank) and each.shared]
    if uncut:
        raise IncompatibleError(
            f"{uncut[0]}: how much of the shared projections the layer takes only the base says",
            "give the base with --base",
        )
    return WRITERS[format](adapter, to)
