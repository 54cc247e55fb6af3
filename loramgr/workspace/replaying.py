"""The adapters of a recorded merge, found again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from loramgr.errors import IntegrityError, LoramgrError
from loramgr.records import MergedAdapter
from loramgr.references import is_path
from loramgr.workspace.contributions import Pick
from loramgr.workspace.home import Home
from loramgr.workspace.merged import MergedFolder

__all__ = ["check_picks", "replayed"]


def replayed(home: Home, adapter: MergedAdapter) -> str:
    """Return how to find a merged adapter again: by its reference where that still means the same, else by digest."""
    if is_path(adapter.ref):
        return adapter.ref
    with home.catalog.reading() as reader, suppress(LoramgrError):
        if reader.version(adapter.ref).digest == adapter.digest:
            return adapter.ref
    return adapter.digest


def check_picks(record: MergedFolder, picks: Sequence[Pick]) -> None:
    """Raise IntegrityError unless the adapters are those that were merged."""
    for adapter, pick in zip(record.report.adapters, picks, strict=True):
        if pick.version.digest != adapter.digest:
            raise IntegrityError(
                f"{adapter.ref} is now {pick.version.digest}, and {adapter.digest} was merged",
                "add the adapter that was merged to the catalog",
            )
