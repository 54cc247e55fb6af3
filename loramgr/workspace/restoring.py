"""Use cases on merged folders: whether the merge is what it says, and the base taken out again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from loramgr.checkpoints.config import ConfigChange
from loramgr.checkpoints.fingerprint import fingerprint
from loramgr.checkpoints.output import carry_over, copy_files, merged_names
from loramgr.checkpoints.source import MERGE_RECORD, Checkpoint, open_checkpoint
from loramgr.checkpoints.staging import check_apart, check_free, staged, sweep
from loramgr.digests import TensorDigest, tensors_digest
from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError
from loramgr.records import MergeCheck, UnmergeReport
from loramgr.workspace.computing import Merger, pick_device
from loramgr.workspace.home import Home
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.merged import MergedFolder, read_record
from loramgr.workspace.merging import Destination, picked
from loramgr.workspace.options import NUMERICS, MergeOptions
from loramgr.workspace.planning import MergePlan, Target, copies, plan_merge
from loramgr.workspace.producing import Producer
from loramgr.workspace.recovering import has_residual, recovered_base
from loramgr.workspace.replaying import check_picks, replayed
from loramgr.workspace.sources import OpenBase, base_of_digest
from loramgr.workspace.standing import differing, file_digest
from loramgr.workspace.writing import Stage, write_model

__all__ = ["base_of_record", "merged_folder", "unmerge", "verify_merge", "with_base"]

Done = TypeVar("Done")


def unmerge(home: Home, folder: Path, output: Path | None, device: str = "auto") -> UnmergeReport:
    """Take a merge out of a folder, into another one or (None) in its own place, and prove it by the base digest.

    From the folder's residual where it has one and the adapters are at hand, else from the base's files. Files that
    the merge did not make stay as they are. Raises IncompatibleError for a folder that is no merge, NotFoundError when
    neither way is open, IntegrityError when what is found is not the base; then nothing has changed.
    """
    sweep(folder.resolve())  # a killed run may have moved the folder out of its place, or left the old one
    record = merged_folder(folder)
    if output is not None:
        check_apart(output, folder)
    target = folder.resolve() if output is None else output  # a link to the folder stays a link to it
    where = Destination(target, replaces=target if output is None else None)
    digest, source = with_base(
        home, folder, record, device,
        recovered=lambda base: _from_residual(home, folder, where, base),
        registered=lambda base: _from_base(home, folder, where, base, record),
    )  # fmt: skip
    return UnmergeReport(str(target.absolute()), digest, exact=True, source=source)


def with_base(
    home: Home, folder: Path, record: MergedFolder, device: str,
    *, recovered: Callable[[OpenBase], Done], registered: Callable[[OpenBase], Done],
) -> tuple[Done, Literal["residual", "base"]]:  # fmt: skip
    """Do something with the base of a merged folder: out of the folder's residual, or if that fails with its files.

    Returns what was done and where the base came from. Raises what the second way raises, with what stopped the first.
    """
    stopped = ""
    if has_residual(folder):
        try:
            with recovered_base(home, folder, record, pick_device(device)[0]) as base:
                return recovered(base), "residual"
        except (NotFoundError, IntegrityError) as error:
            stopped = f"; the residual does not help: {error.message}"
    try:
        return registered(base_of_record(home, record)), "base"
    except (NotFoundError, IntegrityError) as error:
        raise type(error)(f"{error.message}{stopped}", error.hint) from error


def _from_residual(home: Home, folder: Path, where: Destination, base: OpenBase) -> str:
    plan = MergePlan(base, (), copies(base, {}, None), ConfigChange(), ())
    with loading_torch(), staged(where.output, replace=where.replaces is not None) as stage:
        check_free(where.output, sum(target.spec.nbytes for target in plan.targets.values()))
        producer = Producer(plan, Merger("cpu", force=True))
        written = write_model(home, plan, producer, {}, Stage(stage, where.replaces), "unmerge")
        originals = {name: path for name, path in base.moved.items() if path is not None}
        for name, path in originals.items():
            (stage / name).unlink(missing_ok=True)
            copy_files(path.parents[name.count("/")], stage, [name])
        if where.replaces is None:
            ours = {MERGE_RECORD, *merged_names(base.checkpoint), *base.moved, *base.checkpoint.other_files}
            carry_over(folder, stage, ours, link=False)
        digest = tensors_digest(written.tensors.values())
        if digest != base.digest:
            raise IntegrityError(f"{folder}: what comes out is {digest}, not the base {base.digest}")
    return digest


def _from_base(home: Home, folder: Path, where: Destination, base: OpenBase, record: MergedFolder) -> str:
    checkpoint = base.checkpoint
    with staged(where.output, replace=where.replaces is not None) as stage:
        check_free(where.output, sum(view.spec.nbytes for view in checkpoint.tensors.values()))
        index = [checkpoint.index_name] if checkpoint.index_name else []
        copy_files(checkpoint.root, stage, [*(file.name for file in checkpoint.files), *index])
        _restore_files(folder, stage, record, base)
        found = fingerprint(_open_like(stage, base), home.jobs, home.progress, None)
        digest = tensors_digest(found.values())
        if digest != record.report.base_digest:
            raise _not_the_base(base, record, found)
    return digest


def verify_merge(home: Home, folder: Path) -> MergeCheck:
    """Replay the recorded merge, tensor by tensor, and compare every bit with the folder.

    Raises IncompatibleError for a folder that is no merge, or one made with numerics that cannot be replayed, and
    NotFoundError when the base or an adapter is not at hand.
    """
    record = merged_folder(folder)
    device, _ = pick_device("auto")
    if record.report.numerics == "fast" and record.report.kernel == "triton" and device == "cpu":
        raise IncompatibleError(
            f"{folder}: merged with fast numerics on {record.report.device}, whose bits no CPU computes",
            "verify it on such a GPU, or loramgr unmerge",
        )
    base = base_of_record(home, record)
    found = fingerprint(open_checkpoint(folder), home.jobs, home.progress, None)
    adapters = [(replayed(home, adapter), adapter.weight) for adapter in record.report.adapters]
    options = MergeOptions(**record.options)
    with picked(home, base, adapters) as (picks, _):
        check_picks(record, picks)
        plan = plan_merge(base, picks, options)
        producer = Producer(plan, Merger(device, options.force, record.report.numerics))
        mismatched = {name for name, target in plan.targets.items() if found.get(name) != _replay(producer, target)}
    mismatched |= found.keys() - plan.targets.keys()
    return MergeCheck(not mismatched, len(plan.targets), sorted(mismatched))


def merged_folder(folder: Path) -> MergedFolder:
    """Return the record of a merged folder; IncompatibleError where it is none."""
    record = read_record(folder)
    if record is None:
        raise IncompatibleError(f"{folder}: not a merged model, there is no {MERGE_RECORD}", f"loramgr status {folder}")
    if record.report.numerics not in NUMERICS:
        raise IncompatibleError(f"{folder}: merged with the unknown numerics {record.report.numerics!r}")
    return record


def base_of_record(home: Home, record: MergedFolder) -> OpenBase:
    """Open the base of a merge where it is registered, or where it was; errors as in `base_of_digest`."""
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
    carry_over(folder, stage, {MERGE_RECORD, *made, *merged_names(base.checkpoint)}, link=False)


def _restore_file(name: str, digest: str, places: list[Path], stage: Path) -> None:
    for place in places:
        if file_digest(place / name) == digest:
            copy_files(place, stage, [name])
            return
    raise IntegrityError(
        f"{name}: neither {places[0]} nor {places[1]} has the file as it was before the merge, {digest}",
        "put the base's file back where it was",
    )


def _not_the_base(base: OpenBase, record: MergedFolder, found: dict[str, TensorDigest]) -> IntegrityError:
    wrong = differing(base.tensors, found) or ["its tensors"]
    return IntegrityError(
        f"{base.source} is no longer the base {record.report.base_digest}: {', '.join(wrong[:3])} changed",
        f"loramgr base verify {base.name or base.source}",
    )


def _replay(producer: Producer, target: Target) -> TensorDigest:
    data = producer.produce(target)
    return TensorDigest(target.spec.name, target.spec.dtype, target.spec.shape, hashlib.sha256(data).hexdigest())
