"""Merging adapters into a base: a deployable model folder that says what it is made of."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loramgr.checkpoints.config import adapted_config, encode_config
from loramgr.checkpoints.fingerprint import fingerprint
from loramgr.checkpoints.output import OutputTensor, copy_files, lay_out, output_index, write_shard
from loramgr.checkpoints.source import open_checkpoint
from loramgr.checkpoints.staging import check_free, staged
from loramgr.digests import TensorDigest, digest_bytes, digest_file, tensors_digest
from loramgr.errors import IntegrityError, UsageError
from loramgr.records import MergedAdapter, MergeReport
from loramgr.references import is_path, parse_weighted
from loramgr.workspace.adapters import reference
from loramgr.workspace.computing import Merger, pick_device
from loramgr.workspace.contributions import Pick
from loramgr.workspace.home import Home
from loramgr.workspace.inspecting import open_adapter
from loramgr.workspace.matching import bind_to
from loramgr.workspace.merged import MergedFolder, write_record
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.outputs import remember
from loramgr.workspace.planning import MergePlan, Target, plan_merge
from loramgr.workspace.sources import OpenBase, find_base
from loramgr.workspace.tokenizers import carried_tokenizer

__all__ = ["Producer", "merge", "picked"]

_SPARE = 16 << 20  # bytes of room beyond the weights: configuration, tokenizer, index

Asked = str | tuple[str, float]


def merge(home: Home, base_text: str, adapters: Sequence[Asked], output: Path, options: MergeOptions) -> MergeReport:
    """Merge adapters into a base and write the model folder, which appears whole or not at all.

    Raises NotFoundError, IncompatibleError and ConflictError as the parts do, and IntegrityError when the base's
    bytes are not those it was registered with.
    """
    started = time.monotonic()
    if options.numerics != "exact":
        raise UsageError(f"there are no {options.numerics!r} numerics", "--numerics exact")
    if not adapters:
        raise UsageError("no adapter to merge", "loramgr list")
    device, note = pick_device(options.device)
    base = find_base(home, base_text)
    with picked(home, base, adapters) as (picks, folders), staged(output) as stage:
        plan = plan_merge(base, picks, options)
        producer = Producer(plan, Merger(device, options.force))
        check_free(output, sum(target.spec.nbytes for target in plan.targets.values()) + _SPARE)
        written = _write(home, plan, producer, folders, stage)
        if options.verify:
            _read_back(home, stage, written.tensors)
        report = _report(output, plan, producer, written, device)
        report = _finished(report, note, started)
        chosen = next((pick.version.digest for pick in picks if pick.means(options.replacements_of)), None)
        kept = replace(options, dtype=plan.change.dtype, replacements_of=chosen)
        write_record(stage, MergedFolder.describe(report, base, written.tensors, written.files, kept))
    remember(home, output, report.output_digest)
    return report


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


class Producer:
    """Makes the bytes of every output tensor, and checks every byte of the base that it reads."""

    def __init__(self, plan: MergePlan, merger: Merger) -> None:
        self._plan = plan
        self._merger = merger
        self.bytes_read = 0

    def outputs(self) -> dict[str, OutputTensor]:
        """Return all tensors of the output, none of them made yet."""
        return {name: OutputTensor(target.spec, self._producing(target)) for name, target in self._plan.targets.items()}

    def produce(self, target: Target) -> bytes | memoryview:
        """Return the bytes of one tensor; IntegrityError when the base's are not those that were registered."""
        from loramgr.tensors import as_bytes, from_bytes

        data = None if target.source is None else self._checked(target.source)
        if data is not None and not target.contributions and self._keeps_dtype(target):
            return data
        weight = None
        if data is not None and target.source is not None and not target.replaces_shape:
            weight = from_bytes(bytes(data), self._plan.base.checkpoint.tensors[target.source].spec)
        if target.contributions:
            return as_bytes(self._merger.merge(target.spec, weight, target.contributions))
        from loramgr.algebra.casting import rounded
        from loramgr.tensors import torch_dtype

        assert weight is not None
        return as_bytes(rounded(weight, torch_dtype(target.spec.dtype)).contiguous())

    def _producing(self, target: Target) -> Callable[[], bytes | memoryview]:
        return lambda: self.produce(target)

    def _keeps_dtype(self, target: Target) -> bool:
        assert target.source is not None
        return self._plan.base.checkpoint.tensors[target.source].spec.dtype == target.spec.dtype

    def _checked(self, name: str) -> bytes | memoryview:
        base = self._plan.base
        data = base.checkpoint.tensors[name].read_bytes()
        self.bytes_read += len(data)
        known = base.tensors.get(name)
        if known is None or hashlib.sha256(data).hexdigest() != known.sha256:
            raise IntegrityError(
                f"{name}: the bytes in {base.source} are not those that the base {base.name or base.digest} has",
                f"loramgr base verify {base.name or base.source}",
            )
        return data


@dataclass
class _Written:
    """What a merge has written: digests of all tensors, and of all other files, in the base and in the output."""

    tensors: dict[str, TensorDigest] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0


def _write(home: Home, plan: MergePlan, producer: Producer, folders: dict[str, Path], stage: Path) -> _Written:
    written = _Written()
    checkpoint = plan.base.checkpoint
    shards = lay_out(checkpoint, producer.outputs())
    with _bar(home, plan) as advance:
        for shard in shards:
            for tensor in write_shard(stage, shard, advance):
                written.tensors[tensor.name] = tensor
            written.bytes += (stage / shard.name).stat().st_size
    _check_whole(plan)
    carried = carried_tokenizer(plan, folders)
    others = [name for name in checkpoint.other_files if name not in carried]
    written.bytes += copy_files(checkpoint.root, stage, others)
    for name in others:
        digest = digest_file(stage / name)
        written.files.append({"path": name, "before": digest, "after": digest})
    made = {name: source.read_bytes() for name, source in carried.items()}
    if checkpoint.config is not None and checkpoint.config_bytes is not None:
        adapted = adapted_config(checkpoint.config, plan.change)
        made["config.json"] = checkpoint.config_bytes if adapted == checkpoint.config else encode_config(adapted)
    if index := output_index(checkpoint, shards):
        made[index[0]] = index[1]
    for name, data in sorted(made.items()):
        written.bytes += _write_file(written, checkpoint.root, stage, name, data)
    return written


def _write_file(written: _Written, root: Path, stage: Path, name: str, data: bytes) -> int:
    """Write a file and note what the base has in its place, None for nothing."""
    (stage / name).parent.mkdir(parents=True, exist_ok=True)
    (stage / name).write_bytes(data)
    before = digest_file(root / name) if (root / name).is_file() else None
    written.files.append({"path": name, "before": before, "after": digest_bytes(data)})
    return len(data)


def _check_whole(plan: MergePlan) -> None:
    """Every tensor was read and compared one by one; what is left is that none is missing or new."""
    missing = plan.base.tensors.keys() ^ plan.base.checkpoint.tensors.keys()
    if missing:
        raise IntegrityError(
            f"{plan.base.source}: {min(missing)} is in only one of the base's files and its registration",
            "loramgr base verify",
        )


def _read_back(home: Home, stage: Path, tensors: dict[str, TensorDigest]) -> None:
    found = fingerprint(open_checkpoint(stage), home.jobs, home.progress, None)
    wrong = sorted(name for name in found.keys() | tensors.keys() if found.get(name) != tensors.get(name))
    if wrong:
        raise IntegrityError(f"{wrong[0]} reads back as other bytes than were written: the disk or memory is faulty")


def _report(output: Path, plan: MergePlan, producer: Producer, written: _Written, device: str) -> MergeReport:
    before = plan.base.tensors
    changed = [name for name, tensor in written.tensors.items() if name in before and tensor != before[name]]
    return MergeReport(
        output=str(output.absolute()),
        base_digest=plan.base.digest,
        adapters=[MergedAdapter(pick.ref, pick.version.digest, pick.weight) for pick in plan.picks],
        numerics="exact",
        modules_merged=plan.modules_merged,
        tensors_changed=len(changed),
        tensors_added=plan.added,
        tensors_total=len(written.tensors),
        bytes_read=producer.bytes_read,
        bytes_written=written.bytes,
        device=device,
        kernel="torch",
        seconds=0.0,
        output_digest=tensors_digest(written.tensors.values()),
        dtype=plan.change.dtype,
        notes=list(plan.notes),
    )


def _finished(report: MergeReport, note: str | None, started: float) -> MergeReport:
    notes = report.notes if note is None else [*report.notes, note]
    return replace(report, notes=notes, seconds=round(time.monotonic() - started, 3))


@contextmanager
def _bar(home: Home, plan: MergePlan) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    total = sum(target.spec.nbytes for target in plan.targets.values())
    disable = None if home.progress else True  # None: a bar on terminals only
    with tqdm(total=total, desc="merge", unit="B", unit_scale=True, delay=1, file=sys.stderr, disable=disable) as bar:
        yield bar.update
