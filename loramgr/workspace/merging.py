"""Merging adapters into a base: a deployable model folder that says what it is made of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loramgr.checkpoints.fingerprint import fingerprint
from loramgr.checkpoints.source import MERGE_RECORD, open_checkpoint
from loramgr.checkpoints.staging import check_apart, check_free, staged, sweep
from loramgr.digests import TensorDigest, tensors_digest
from loramgr.errors import IncompatibleError, IntegrityError, UsageError
from loramgr.records import MergedAdapter, MergeReport
from loramgr.references import is_path, parse_weighted
from loramgr.workspace.adapters import reference
from loramgr.workspace.computing import Merger, check_device, pick_device
from loramgr.workspace.contributions import Pick
from loramgr.workspace.home import Home
from loramgr.workspace.inspecting import open_adapter
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.matching import bind_to
from loramgr.workspace.merged import MergedFolder, write_record
from loramgr.workspace.options import NUMERICS, MergeOptions
from loramgr.workspace.outputs import remember
from loramgr.workspace.planning import MergePlan, plan_merge
from loramgr.workspace.producing import Producer
from loramgr.workspace.sources import HUB, OpenBase, find_base
from loramgr.workspace.writing import Stage, Written, digest_of_plan, write_model

__all__ = ["Asked", "Destination", "merge", "merge_in_place", "merge_onto", "picked", "read_back"]

_SPARE = 16 << 20  # bytes of room beyond the weights: configuration, tokenizer, index
_RESIDUAL = 0.25  # of the bytes of the tensors that change, for what gives them back; a whole one where nothing does

Asked = str | tuple[str, float]


def merge(home: Home, base_text: str, adapters: Sequence[Asked], output: Path, options: MergeOptions) -> MergeReport:
    """Merge adapters into a base and write the model folder, which appears whole or not at all.

    What a killed run of the same merge has finished is not made again. Raises NotFoundError, IncompatibleError and
    ConflictError as the parts do, and IntegrityError when the base's bytes are not those it was registered with.
    """
    if not adapters:
        raise UsageError("no adapter to merge", "loramgr list")
    base = find_base(home, base_text)
    if base.checkpoint.path == base.checkpoint.root:
        check_apart(output, base.checkpoint.root)
    return merge_onto(home, base, adapters, Destination(output), options)


def merge_in_place(home: Home, base_text: str, adapters: Sequence[Asked], options: MergeOptions) -> MergeReport:
    """Merge adapters into the base's own folder, which changes in one step and keeps what gives the base back.

    Raises as `merge`, and IncompatibleError for a base that is no folder of safetensors, or of the hub's cache.
    """
    if not adapters:
        raise UsageError("no adapter to merge", "loramgr list")
    base = find_base(home, base_text)
    folder = _own_folder(base)
    return merge_onto(home, base, adapters, Destination(folder, replaces=folder), replace(options, reversible=True))


def _own_folder(base: OpenBase) -> Path:
    """Return the folder of a base that may be changed."""
    checkpoint = base.checkpoint
    if base.source.startswith(HUB):
        raise IncompatibleError(f"{base.source} lies in the hub's cache, which others use", "loramgr merge … -o DIR")
    if checkpoint.path != checkpoint.root or any(file.kind != "safetensors" for file in checkpoint.files):
        raise IncompatibleError(f"{base.source} is no folder of safetensors files", "loramgr merge … -o DIR")
    if (checkpoint.root / MERGE_RECORD).exists():
        sweep(checkpoint.root.resolve())  # the old folder, of a run that was killed when it had done its work
        raise IncompatibleError(f"{base.source} is a merge already", f"loramgr switch {base.source} REF")
    return checkpoint.root.resolve()


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a merged model goes: a new folder, or with `replaces` the place of that model folder, the same path."""

    output: Path
    replaces: Path | None = None


def merge_onto(
    home: Home, base: OpenBase, adapters: Sequence[Asked], where: Destination, options: MergeOptions
) -> MergeReport:
    """Merge adapters into an opened base; see `merge`."""
    started = time.monotonic()
    if options.numerics not in NUMERICS:
        raise UsageError(f"there are no {options.numerics!r} numerics", "--numerics exact")
    device, note = pick_device(options.device)
    output, in_place = where.output, where.replaces is not None
    with loading_torch(), picked(home, base, adapters) as (picks, folders):
        plan = plan_merge(base, picks, options)
        _check_reversible(plan, options)
        producer = Producer(plan, Merger(device, options.force, options.numerics))
        check_free(output, _needed(plan, options, in_place=in_place))
        check_device(device, [plan.targets[name].spec for name in plan.touched], home.jobs)
        with staged(output, replace=in_place, resume=True) as folder:
            stage = Stage(folder, where.replaces, options.reversible)
            written = write_model(home, plan, producer, folders, stage, digest_of_plan(plan, options))
            if options.verify:
                read_back(home, folder, written.tensors)
            report = _finished(_report(output, plan, producer, written, device, options), note, started)
            chosen = next((pick.version.digest for pick in picks if pick.means(options.replacements_of)), None)
            kept = replace(options, dtype=plan.change.dtype, replacements_of=chosen)
            write_record(folder, MergedFolder.describe(report, base, written.tensors, written.files, kept))
    remember(home, output, report.output_digest)
    return report


def _check_reversible(plan: MergePlan, options: MergeOptions) -> None:
    if options.reversible and plan.change.dtype is not None:
        raise IncompatibleError(
            "a merge into another dtype changes every tensor and cannot keep what gives the base back",
            "leave out --dtype, or --reversible",
        )


def _needed(plan: MergePlan, options: MergeOptions, *, in_place: bool) -> int:
    """Return how many bytes the output takes on the disk while it is made."""
    touched = {name for name in plan.touched if name in plan.targets}
    shards = [file.tensors for file in plan.base.checkpoint.files if not in_place or touched.intersection(file.tensors)]
    names = {name for tensors in shards for name in tensors} | touched | set(plan.added)
    weights = sum(plan.targets[name].spec.nbytes for name in names if name in plan.targets)
    residual = sum(plan.targets[name].spec.nbytes for name in touched) * (_RESIDUAL if options.reversible else 0)
    return weights + int(residual) + _SPARE


@contextmanager
def picked(home: Home, base: OpenBase, adapters: Sequence[Asked]) -> Iterator[tuple[list[Pick], dict[str, Path]]]:
    """Give the adapters that were asked for, bound to the base, and the folders of their files, for the block."""
    with ExitStack() as stack:
        picks = []
        folders = {}
        for asked in adapters:
            text, weight = parse_weighted(asked) if isinstance(asked, str) else asked
            version, adapter, folder = stack.enter_context(open_adapter(home, text))
            ref = text if is_path(text) else reference(version)
            picks.append(Pick(text, ref, version, adapter, weight, bind_to(adapter, base)))
            folders[ref] = folder
        yield picks, folders


def read_back(home: Home, stage: Path, tensors: dict[str, TensorDigest]) -> None:
    """Raise IntegrityError, naming a tensor, when the model in the folder has others than were written."""
    found = fingerprint(open_checkpoint(stage), home.jobs, home.progress, None)
    wrong = sorted(name for name in found.keys() | tensors.keys() if found.get(name) != tensors.get(name))
    if wrong:
        raise IntegrityError(f"{wrong[0]} reads back as other bytes than were written: the disk or memory is faulty")


def _report(
    output: Path, plan: MergePlan, producer: Producer, written: Written, device: str, options: MergeOptions
) -> MergeReport:
    before = plan.base.tensors
    changed = [name for name, tensor in written.tensors.items() if name in before and tensor != before[name]]
    return MergeReport(
        output=str(output.absolute()),
        base_digest=plan.base.digest,
        adapters=[MergedAdapter(pick.ref, pick.version.digest, pick.weight) for pick in plan.picks],
        numerics=options.numerics,
        modules_merged=plan.modules_merged,
        tensors_changed=len(changed),
        tensors_added=plan.added,
        tensors_total=len(written.tensors),
        bytes_read=producer.bytes_read,
        bytes_written=written.bytes,
        device=device,
        kernel="triton" if "triton" in producer.kernels else "torch",
        seconds=0.0,
        output_digest=tensors_digest(written.tensors.values()),
        dtype=plan.change.dtype,
        notes=list(plan.notes),
    )


def _finished(report: MergeReport, note: str | None, started: float) -> MergeReport:
    notes = report.notes if note is None else [*report.notes, note]
    return replace(report, notes=notes, seconds=round(time.monotonic() - started, 3))
