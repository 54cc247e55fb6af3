"""The base of a merged folder, out of the folder itself: changed tensors are taken back by their residuals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loramgr.checkpoints.fingerprint import fingerprint
from loramgr.checkpoints.residuals import FILES, FOLDER, ORIGINAL, read_residuals
from loramgr.checkpoints.source import Checkpoint, open_checkpoint
from loramgr.digests import TensorDigest, parse_tensor_lines, tensors_digest
from loramgr.errors import IntegrityError, NotFoundError
from loramgr.tensorfile import Data, FileTensor, TensorSpec, TensorView
from loramgr.workspace.computing import Merger
from loramgr.workspace.home import Home
from loramgr.workspace.merged import MergedFolder
from loramgr.workspace.merging import picked
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.planning import MergePlan, plan_merge
from loramgr.workspace.replaying import check_picks, replayed
from loramgr.workspace.sources import OpenBase
from loramgr.workspace.standing import file_digest

if TYPE_CHECKING:
    import torch

__all__ = ["has_residual", "recovered_base"]


def has_residual(folder: Path) -> bool:
    """Say whether a merged folder keeps what gives its base back."""
    return (folder / FOLDER).is_dir()


@contextmanager
def recovered_base(home: Home, folder: Path, record: MergedFolder, device: str) -> Iterator[OpenBase]:
    """Give the base that was merged into the folder, for the block; whoever reads its tensors compares their digests.

    Raises NotFoundError when an adapter that was merged is not at hand, IntegrityError for damaged residuals or a
    folder whose other tensors are no longer the base's.
    """
    checkpoint = open_checkpoint(folder)
    parts = read_residuals(folder)
    views = _Views(Merger(device, force=True, numerics=record.report.numerics))
    own = _own_tensors(checkpoint, record, parts, views)
    known = _digests(home, checkpoint, record, own)
    moved = _moved(folder, record)
    name, source = record.base["name"], str(folder.absolute())
    base = OpenBase(name, record.report.base_digest, source, None, _as_base(checkpoint, own, moved), known, moved)
    adapters = [(replayed(home, adapter), adapter.weight) for adapter in record.report.adapters]
    with picked(home, base, adapters) as (picks, _):
        check_picks(record, picks)
        views.plan = plan_merge(base, picks, MergeOptions(**record.options))
        yield base


@dataclass
class _Views:
    """What all recovered tensors of a folder share; the plan of the merge is known once the base is."""

    merger: Merger
    plan: MergePlan | None = field(default=None)


@dataclass(frozen=True, slots=True)
class _Recovered:
    """A tensor of the base: the merged one with the merge taken out by its residual."""

    spec: TensorSpec
    merged: TensorView
    parts: Mapping[str, FileTensor]
    views: _Views

    def read_bytes(self) -> Data:
        """Return the bytes; IntegrityError for a residual that is damaged or of another tensor."""
        from loramgr.tensors import as_bytes

        return as_bytes(self.load())

    def load(self) -> torch.Tensor:
        """Return the tensor; see `read_bytes`."""
        plan = self.views.plan
        assert plan is not None
        contributions = plan.targets[self.spec.name].contributions
        parts = {name: view.load() for name, view in self.parts.items()}
        return self.views.merger.unmerge(self.spec.name, self.merged.load(), contributions, parts).contiguous()


def _own_tensors(
    checkpoint: Checkpoint, record: MergedFolder, parts: Mapping[str, Mapping[str, FileTensor]], views: _Views
) -> dict[str, TensorView]:
    """Return the tensors that the base has: those that are as they were, and those that are taken back."""
    added = {change.name for change in record.tensors if change.before is None}
    changed = {change.name for change in record.tensors} - added
    lost = sorted(changed - parts.keys())
    if lost:
        raise NotFoundError(
            f"{checkpoint.root / FOLDER} has nothing that gives {lost[0]} back", "loramgr base add PATH"
        )
    own: dict[str, TensorView] = {}
    for name, view in checkpoint.tensors.items():
        if name not in changed and name not in added:
            own[name] = view
    for name in changed:
        original = parts[name].get(ORIGINAL)
        if original is not None:
            own[name] = replace(original, spec=replace(original.spec, name=name))
        elif name in checkpoint.tensors:
            merged = checkpoint.tensors[name]
            own[name] = _Recovered(merged.spec, merged, parts[name], views)
        else:
            raise IntegrityError(f"{checkpoint.root}: {name} is missing", f"loramgr status {checkpoint.root}")
    return own


def _digests(
    home: Home, checkpoint: Checkpoint, record: MergedFolder, own: Mapping[str, TensorView]
) -> dict[str, TensorDigest]:
    """Return the digests of the base's tensors: as registered, else told from the folder and its record."""
    digest = record.report.base_digest
    if home.store.blobs.contains(digest):
        return parse_tensor_lines(home.store.blobs.get(digest))
    before = {change.name: change.before for change in record.tensors if change.before is not None}
    found = fingerprint(checkpoint, home.jobs, home.progress, None)
    told = {name: TensorDigest(name, own[name].spec.dtype, own[name].spec.shape, sha) for name, sha in before.items()}
    known = {name: found[name] for name in own.keys() - before.keys()} | told
    if tensors_digest(known.values()) != digest:
        raise IntegrityError(
            f"{checkpoint.root}: the tensors that the merge left alone are no longer those of {digest}",
            f"loramgr status {checkpoint.root}",
        )
    return known


def _moved(folder: Path, record: MergedFolder) -> dict[str, Path | None]:
    """Return where the files of the base are that the merge made or changed, None for those that it had not.

    Raises IntegrityError, naming the file, for one that is not as the base had it.
    """
    changed = {str(file["path"]): file["before"] for file in record.files if file["before"] != file["after"]}
    moved = {name: None if before is None else folder / FILES / name for name, before in changed.items()}
    for name, path in moved.items():
        if path is not None and file_digest(path) != changed[name]:
            raise IntegrityError(f"{path}: not the file that the base had, {changed[name]}", "loramgr base add PATH")
    return moved


def _as_base(checkpoint: Checkpoint, own: dict[str, TensorView], moved: Mapping[str, Path | None]) -> Checkpoint:
    """Return the opened folder as if it were the base's: with its tensors, its configuration and its files."""
    files = tuple(
        replace(file, tensors=tuple(name for name in file.tensors if name in own)) for file in checkpoint.files
    )
    config, config_bytes = checkpoint.config, checkpoint.config_bytes
    place = moved.get("config.json")
    if place is not None:
        config_bytes = place.read_bytes()
        config = json.loads(config_bytes)
    others = tuple(name for name in checkpoint.other_files if moved.get(name, checkpoint.root) is not None)
    return replace(checkpoint, files=files, tensors=own, config=config, config_bytes=config_bytes, other_files=others)
