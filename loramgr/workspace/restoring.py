"""Use cases on merged folders: whether the merge is what it says, and the base taken out again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from loramgr.checkpoints.fingerprint import fingerprint
from loramgr.checkpoints.output import copy_files, merged_names
from loramgr.checkpoints.source import MERGE_RECORD, Checkpoint, open_checkpoint
from loramgr.checkpoints.staging import check_free, staged, sweep
from loramgr.digests import TensorDigest, tensors_digest
from loramgr.errors import IncompatibleError, IntegrityError, LoramgrError
from loramgr.records import MergeCheck, MergedAdapter, UnmergeReport
from loramgr.references import is_path
from loramgr.workspace.computing import Merger, pick_device
from loramgr.workspace.contributions import Pick
from loramgr.workspace.home import Home
from loramgr.workspace.merged import MergedFolder, read_record
from loramgr.workspace.merging import Producer, picked
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.planning import Target, plan_merge
from loramgr.workspace.sources import OpenBase, base_of_digest
from loramgr.workspace.standing import differing, file_digest

__all__ = ["unmerge", "verify_merge"]


def unmerge(home: Home, folder: Path, output: Path | None) -> UnmergeReport:
    """Take a merge out of a folder, into another one or (None) in its own place, and prove it by the base digest.

    Files that the merge did not make stay as they are. Raises IncompatibleError for a folder that is no merge,
    NotFoundError when the base is not at hand, IntegrityError when what is found is not the base; then nothing has
    changed.
    """
    sweep(folder)  # a killed run may have left what it moved out of the place, and then the folder is no merge any more
    record = _merged(folder)
    base = _base_of(home, record)
    checkpoint = base.checkpoint
    target = folder.resolve() if output is None else output  # a link to the folder stays a link to it
    with staged(target, replace=output is None) as stage:
        check_free(target, sum(view.spec.nbytes for view in checkpoint.tensors.values()))
        index = [checkpoint.index_name] if checkpoint.index_name else []
        copy_files(checkpoint.root, stage, [*(file.name for file in checkpoint.files), *index])
        _restore_files(folder, stage, record, base)
        found = fingerprint(_open_like(stage, base), home.jobs, home.progress, None)
        digest = tensors_digest(found.values())
        if digest != record.report.base_digest:
            raise _not_the_base(base, record, found)
    return UnmergeReport(str(target.absolute()), digest, exact=True, source="base")


def verify_merge(home: Home, folder: Path) -> MergeCheck:
    """Replay the recorded merge, tensor by tensor, and compare every bit with the folder.

    Raises IncompatibleError for a folder that is no merge, or one made with numerics that cannot be replayed, and
    NotFoundError when the base or an adapter is not at hand.
    """
    record = _merged(folder)
    base = _base_of(home, record)
    found = fingerprint(open_checkpoint(folder), home.jobs, home.progress, None)
    adapters = [(_replayed(home, adapter), adapter.weight) for adapter in record.report.adapters]
    options = MergeOptions(**record.options)
    with picked(home, base, adapters) as (picks, _):
        _check_picks(record, picks)
        plan = plan_merge(base, picks, options)
        producer = Producer(plan, Merger(pick_device("auto")[0], options.force))
        mismatched = {name for name, target in plan.targets.items() if found.get(name) != _replay(producer, target)}
    mismatched |= found.keys() - plan.targets.keys()
    return MergeCheck(not mismatched, len(plan.targets), sorted(mismatched))


def _merged(folder: Path) -> MergedFolder:
    record = read_record(folder)
    if record is None:
        raise IncompatibleError(f"{folder}: not a merged model, there is no {MERGE_RECORD}", f"loramgr status {folder}")
    if record.report.numerics != "exact":
        raise IncompatibleError(f"{folder}: merged with the unknown numerics {record.report.numerics!r}")
    return record


def _base_of(home: Home, record: MergedFolder) -> OpenBase:
    source, revision = record.base["source"], record.base["revision"]
    recorded = f"{source}@{revision}" if source and revision else source
    return base_of_digest(home, record.report.base_digest, recorded)


def _open_like(folder: Path, base: OpenBase) -> Checkpoint:
    """Open a copy of the base: the folder, or the one file in it when the base is a file."""
    is_folder = base.checkpoint.path == base.checkpoint.root
    return open_checkpoint(folder if is_folder else folder / base.checkpoint.path.name)


def _restore_files(folder: Path, stage: Path, record: MergedFolder, base: OpenBase) -> None:
    """Bring back every other file as the base had it, and carry over what the merge did not make."""
    made = {str(file["path"]): file["before"] for file in record.files}
    for name, before in made.items():
        if before is not None:
            _restore_file(name, before, [base.checkpoint.root, folder], stage)
    ours = {MERGE_RECORD, *made, *merged_names(base.checkpoint)}
    copy_files(folder, stage, [name for name in _files_below(folder) if name not in ours])


def _restore_file(name: str, digest: str, places: list[Path], stage: Path) -> None:
    for place in places:
        if file_digest(place / name) == digest:
            copy_files(place, stage, [name])
            return
    raise IntegrityError(
        f"{name}: neither {places[0]} nor {places[1]} has the file as it was before the merge, {digest}",
        "put the base's file back where it was",
    )


def _files_below(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        yield from sorted((Path(root) / name).relative_to(folder).as_posix() for name in names)


def _not_the_base(base: OpenBase, record: MergedFolder, found: dict[str, TensorDigest]) -> IntegrityError:
    wrong = differing(base.tensors, found) or ["its tensors"]
    return IntegrityError(
        f"{base.source} is no longer the base {record.report.base_digest}: {', '.join(wrong[:3])} changed",
        f"loramgr base verify {base.name or base.source}",
    )


def _replayed(home: Home, adapter: MergedAdapter) -> str:
    """Return how to find a merged adapter again: by its reference where that still means the same, else by digest."""
    if is_path(adapter.ref):
        return adapter.ref
    with home.catalog.reading() as reader, suppress(LoramgrError):
        if reader.version(adapter.ref).digest == adapter.digest:
            return adapter.ref
    return adapter.digest


def _check_picks(record: MergedFolder, picks: list[Pick]) -> None:
    for adapter, pick in zip(record.report.adapters, picks, strict=True):
        if pick.version.digest != adapter.digest:
            raise IntegrityError(
                f"{adapter.ref} is now {pick.version.digest}, and {adapter.digest} was merged",
                "add the adapter that was merged to the catalog",
            )


def _replay(producer: Producer, target: Target) -> TensorDigest:
    data = producer.produce(target)
    return TensorDigest(target.spec.name, target.spec.dtype, target.spec.shape, hashlib.sha256(data).hexdigest())
