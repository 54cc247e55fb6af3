"""Use case: another adapter in place of the one that a model folder was merged with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loramgr.checkpoints.staging import settle
from loramgr.errors import IncompatibleError, UsageError
from loramgr.records import MergeReport
from loramgr.workspace.home import Home
from loramgr.workspace.merged import MergedFolder
from loramgr.workspace.merging import Asked, Destination, merge_onto
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.recovering import has_residual
from loramgr.workspace.restoring import merged_folder, with_base
from loramgr.workspace.sources import OpenBase

__all__ = ["switch"]


def switch(home: Home, folder: Path, adapters: Sequence[Asked], options: MergeOptions) -> MergeReport:
    """Take what is merged out of a folder and merge other adapters in its place, in one pass and one step.

    The dtype is that of the merge before; the base comes out of the folder's residual, else from its own files.
    Raises IncompatibleError for a folder that is no merge, and else as `merge` and `unmerge`; then nothing changed.
    """
    if not adapters:
        raise UsageError("no adapter to switch to", f"loramgr unmerge {folder}")
    target = folder.resolve()
    settle(target)
    record = merged_folder(folder)
    chosen = replace(options, dtype=_dtype(record, options), reversible=has_residual(folder))

    def merged(base: OpenBase) -> MergeReport:
        return merge_onto(home, base, adapters, Destination(target, replaces=target), chosen)

    return with_base(home, folder, record, options.device, recovered=merged, registered=merged)[0]


def _dtype(record: MergedFolder, options: MergeOptions) -> str | None:
    """Return the dtype that the folder is in, None for the base's."""
    before: str | None = record.options["dtype"]
    if options.dtype is not None and options.dtype != before:
        raise IncompatibleError(
            f"the folder was merged in {before or 'the dtype of its base'}", "loramgr merge … -o DIR"
        )
    return before
