"""Versions that were computed from others: where they are made, what is said of them, and what made them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from loramgr import __version__
from loramgr.records import AddedVersion, DerivedVersion, ModuleError
from loramgr.store.store import SCRATCH
from loramgr.temporary import temporary_folder
from loramgr.workspace.home import Home

__all__ = ["derived", "overall", "scratch_folder", "versions_used"]


def derived(
    added: AddedVersion, method: str, errors: Sequence[ModuleError], notes: Sequence[str] = ()
) -> DerivedVersion:
    """Return the record of a version that was computed, with the errors of its modules."""
    known = {each.name: getattr(added, each.name) for each in fields(AddedVersion)}
    return DerivedVersion(
        **{**known, "method": method}, relative_error=overall(errors), errors=[*errors], notes=[*notes]
    )


def overall(errors: Sequence[ModuleError]) -> float:
    """Return the relative error of all modules together, 0 where there are none."""
    norm = math.hypot(*(each.norm for each in errors))
    return math.hypot(*(each.relative_error * each.norm for each in errors)) / norm if norm else 0.0


@contextmanager
def scratch_folder(home: Home) -> Iterator[Path]:
    """Give a folder on the store's file system, where it may be written to, for the duration of the block."""
    scratch = home.store.root / SCRATCH
    with temporary_folder(scratch if os.access(scratch, os.W_OK) else None) as folder:
        yield folder


def versions_used() -> dict[str, str]:
    """Return the versions of what computes."""
    import torch

    return {"loramgr": __version__, "torch": str(torch.__version__)}
