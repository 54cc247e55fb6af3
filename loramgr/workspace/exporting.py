"""Use case: an adapter written for another tool, as its files came or in another format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter, LowRank, Rows
from loramgr.checkpoints.staging import staged
from loramgr.errors import IncompatibleError, LoramgrError
from loramgr.formats import adapter_folder, kept_files, read_adapter
from loramgr.formats.hints import HINTS
from loramgr.formats.writing import Written, write_adapter
from loramgr.records import ExportReport
from loramgr.references import is_path
from loramgr.workspace.contributions import without_base_table
from loramgr.workspace.home import Home
from loramgr.workspace.inspecting import open_adapter
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.matching import bind_to, specs_of
from loramgr.workspace.sources import OpenBase, base_of_digest, find_base

__all__ = ["export_adapter"]

_COMPUTED = ("adalora", "vera")  # products of factors that their files do not hold as such


def export_adapter(
    home: Home, ref: str, output: Path, format: str | None = None, base: str | None = None
) -> ExportReport:
    """Write an adapter into a folder that appears whole: its files as they came, or in another format.

    `format` None or the adapter's own: the original bytes, but `peft` makes plain LoRA of VeRA and AdaLoRA; `base` is
    the one whose names and layout count, None for the recorded one. Raises ConflictError when something is there,
    IntegrityError when the store's copy is damaged, and IncompatibleError, naming it, for what the format cannot hold.
    """
    if format is None:
        return _as_it_came(home, ref, output)
    with loading_torch(), open_adapter(home, ref) as (version, adapter, _):
        if adapter.format == format and base is None and adapter.method not in _COMPUTED:
            report = _as_it_came(home, ref, output)
            return replace(report, notes=[f"it is {format} already: the files are those that came", *report.notes])
        digest = None if version.base is None else version.base.digest
        found, doubt = _base(home, base, digest or adapter.base_digest)
        resolved = adapter if found is None else _resolved(adapter, found)
        config = None if found is None else found.checkpoint.config
        notes: Sequence[str]
        with staged(output) as stage:
            if adapter.method in _COMPUTED:
                doubt = [*doubt, f"{adapter.method} written as plain LoRA; its own files: export without --format"]
            notes = write_adapter(resolved, format, Written(stage, None if found is None else found.digest, config))
            files = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file())
    return ExportReport(str(output), files, [*doubt, *notes])


def _as_it_came(home: Home, ref: str, output: Path) -> ExportReport:
    from loramgr.checkpoints.output import copy_files

    if is_path(ref):
        path = Path(ref)
        read_adapter(path, home.hints)
        names, folder = [name for name in kept_files(path, ()) if name != HINTS], adapter_folder(path)
        with staged(output) as stage:
            copy_files(folder, stage, names)
        return ExportReport(str(output), names, [])
    with home.catalog.reading() as reader:
        version = reader.version(ref)
    names = [file.path for file in version.files if file.path != HINTS]
    with home.files_of(version) as folder:
        said = _said(folder / HINTS)
        with staged(output) as stage:
            copy_files(folder, stage, names)
    return ExportReport(str(output), names, [f"the files do not say it: {said}"] if said else [])


def _said(path: Path) -> str:
    """Return what a person had said of the files, empty for nothing."""
    if not path.is_file():
        return ""
    hints: dict[str, Any] = json.loads(path.read_bytes())
    return ", ".join(f"{key} is {json.dumps(value)}" for key, value in sorted(hints.items()))


def _base(home: Home, asked: str | None, digest: str | None) -> tuple[OpenBase | None, list[str]]:
    """Return the base that was asked for, else the recorded one, None and a sentence where its files are not there."""
    if asked is not None:
        return find_base(home, asked), []
    if digest is None:
        return None, []
    try:
        return base_of_digest(home, digest), []
    except LoramgrError as error:
        return None, [f"written without the base: {error.message}"]


def _resolved(adapter: Adapter, base: OpenBase) -> Adapter:
    try:
        resolved = adapter.resolved(specs_of(base), base.checkpoint.config)
        bound = bind_to(resolved, base).updates if _has_tables(resolved) else ()
    except IncompatibleError as error:
        raise IncompatibleError(f"it does not fit the base {base.name or base.source}: {error.message}") from error
    own = {each.name: without_base_table(base, each) for each in bound}
    return replace(resolved, updates=resolved.updates | own)


def _has_tables(adapter: Adapter) -> bool:
    return any(isinstance(update, LowRank | Rows) and update.table is not None for update in adapter.updates.values())
