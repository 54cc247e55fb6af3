"""Use cases on merged folders: what one is, whether the merge is what it says, and the base taken out again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from loramgr.checkpoints.fingerprint import FingerprintCache, fingerprint
from loramgr.checkpoints.output import copy_files, merged_names
from loramgr.checkpoints.source import MERGE_RECORD, Checkpoint, open_checkpoint
from loramgr.checkpoints.staging import check_free, staged, sweep
from loramgr.digests import TensorDigest, digest_file, parse_tensor_lines, tensors_digest
from loramgr.errors import IncompatibleError, IntegrityError, LoramgrError
from loramgr.records import MergeCheck, MergedAdapter, MergeReport, StatusReport, UnmergeReport
from loramgr.references import is_path
from loramgr.workspace.computing import Merger, pick_device
from loramgr.workspace.contributions import Pick
from loramgr.workspace.home import Home
from loramgr.workspace.merged import MergedFolder, read_record
from loramgr.workspace.merging import Producer, picked
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.planning import Target, plan_merge
from loramgr.workspace.sources import OpenBase, absolute, base_of_digest

__all__ = ["status", "unmerge", "verify_merge"]


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


def status(home: Home, folder: Path) -> StatusReport:
    """Say what a model folder is, a base or a merge, and which tensors and files changed since it was made."""
    found = fingerprint(open_checkpoint(folder), home.jobs, home.progress, FingerprintCache(home.cache))
    record = read_record(folder) if folder.is_dir() else None
    digest = tensors_digest(found.values())
    if record is None:
        return _status_of_base(home, folder, found, digest)
    facts = {field.name: getattr(record.report, field.name) for field in fields(MergeReport)}
    modified = [] if digest == record.report.output_digest else _modified_tensors(home, record, found)
    modified += [file["path"] for file in record.files if _digest(folder / file["path"]) != file["after"]]
    return StatusReport(**{**facts, "output": str(folder.absolute())}, modified=modified)


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
        if _digest(place / name) == digest:
            copy_files(place, stage, [name])
            return
    raise IntegrityError(
        f"{name}: neither {places[0]} nor {places[1]} has the file as it was before the merge, {digest}",
        "put the base's file back where it was",
    )


def _files_below(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        yield from sorted((Path(root) / name).relative_to(folder).as_posix() for name in names)


def _digest(path: Path) -> str | None:
    return digest_file(path) if path.is_file() else None


def _not_the_base(base: OpenBase, record: MergedFolder, found: dict[str, TensorDigest]) -> IntegrityError:
    wrong = _differing(base.tensors, found) or ["its tensors"]
    return IntegrityError(
        f"{base.source} is no longer the base {record.report.base_digest}: {', '.join(wrong[:3])} changed",
        f"loramgr base verify {base.name or base.source}",
    )


def _differing(expected: dict[str, TensorDigest], found: dict[str, TensorDigest]) -> list[str]:
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _modified_tensors(home: Home, record: MergedFolder, found: dict[str, TensorDigest]) -> list[str]:
    """Name the tensors that are not as the merge left them, as far as the base's list of tensors is at hand."""
    changed = {change.name: change.after for change in record.tensors}
    modified = {name for name, after in changed.items() if name not in found or found[name].sha256 != after}
    if home.store.blobs.contains(record.report.base_digest):
        base = parse_tensor_lines(home.store.blobs.get(record.report.base_digest))
        modified |= {name for name in base.keys() - changed.keys() if name not in found}
        modified |= {name for name in found.keys() - changed.keys() if _sha256(base.get(name)) != found[name].sha256}
    return sorted(modified)


def _sha256(tensor: TensorDigest | None) -> str | None:
    return None if tensor is None else tensor.sha256


def _status_of_base(home: Home, folder: Path, found: dict[str, TensorDigest], digest: str) -> StatusReport:
    with home.catalog.reading() as reader:
        registered = [base for base in reader.bases() if base.source == str(absolute(folder))]
    modified: list[str] = []
    if registered and registered[0].digest != digest:
        modified = _differing(parse_tensor_lines(home.store.blobs.get(registered[0].digest)), found)
    return StatusReport(
        output=str(folder.absolute()),
        base_digest=digest,
        adapters=[],
        numerics="exact",
        modules_merged=0,
        tensors_changed=0,
        tensors_added=[],
        tensors_total=len(found),
        bytes_read=0,
        bytes_written=0,
        device="cpu",
        kernel="torch",
        seconds=0.0,
        output_digest=digest,
        modified=modified,
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
