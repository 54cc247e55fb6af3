"""`loramgr-merge.json`: what a merged folder says of itself, enough to replay the merge and to take it back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loramgr.checkpoints.source import MERGE_RECORD
from loramgr.digests import TensorDigest
from loramgr.errors import IncompatibleError, IntegrityError
from loramgr.records import MergedAdapter, MergeReport, TensorChange
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.sources import OpenBase

__all__ = ["MergedFolder", "read_record", "write_record"]

RECORD_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class MergedFolder:
    """The record in a merged folder.

    `base` has the name, source and revision of the base when it was merged; `options` what a replay needs; `tensors`
    every tensor whose digest changed (bare sha256 hex, before and after); `files` every other file by path, with the
    digests in the base (before; None when it has none) and in the folder (after).
    """

    report: MergeReport
    base: dict[str, str | None]
    options: dict[str, Any]
    tensors: list[TensorChange]
    files: list[dict[str, Any]]

    @classmethod
    def describe(
        cls,
        report: MergeReport,
        base: OpenBase,
        tensors: Mapping[str, TensorDigest],
        files: Sequence[dict[str, Any]],
        options: MergeOptions,
    ) -> MergedFolder:
        """Return the record of a merge that has just been written."""
        changes = [
            TensorChange(name, before.sha256 if before else None, after.sha256)
            for name, after in sorted(tensors.items())
            if (before := base.tensors.get(name)) != after
        ]
        origin = {"name": base.name, "source": base.source, "revision": base.revision}
        kept = {
            "dtype": options.dtype,
            "force": options.force,
            "replacements_of": options.replacements_of,
            "keep_tied": options.keep_tied,
            "numerics": options.numerics,
            "reversible": options.reversible,
        }
        return cls(report, origin, kept, changes, list(files))


def write_record(folder: Path, record: MergedFolder) -> None:
    """Write the record into the folder."""
    content = {
        "schema": RECORD_SCHEMA,
        **asdict(record.report),
        "base": record.base,
        "options": record.options,
        "tensors": [asdict(change) for change in record.tensors],
        "files": record.files,
    }
    (folder / MERGE_RECORD).write_text(json.dumps(content, indent=2) + "\n")


def read_record(folder: Path) -> MergedFolder | None:
    """Read the record of a merged folder; None when it has none, and so is no merged folder.

    Raises IntegrityError for a damaged record and IncompatibleError for one of a newer loramgr.
    """
    path = folder / MERGE_RECORD
    try:
        content = json.loads(path.read_bytes())
        schema = content["schema"]
        if schema == RECORD_SCHEMA:
            known = {field.name: content[field.name] for field in fields(MergeReport)}
            known["adapters"] = [MergedAdapter(**adapter) for adapter in known["adapters"]]
            tensors = [TensorChange(**change) for change in content["tensors"]]
            return MergedFolder(MergeReport(**known), content["base"], content["options"], tensors, content["files"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: the record of the merge is damaged: {error}") from error
    raise IncompatibleError(f"{path}: schema {schema}, written by another loramgr", "upgrade loramgr")
