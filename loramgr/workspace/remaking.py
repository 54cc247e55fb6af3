"""Gives a fine-tune back, bit for bit, out of its base, the adapter extracted from it, and the remainder beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loramgr.checkpoints.output import OutputTensor, Shard, copy_files
from loramgr.checkpoints.regions import Region
from loramgr.checkpoints.staging import check_free, staged
from loramgr.checkpoints.streaming import Writing, write_shards
from loramgr.digests import TensorDigest, tensors_digest
from loramgr.errors import IncompatibleError, IntegrityError, UsageError
from loramgr.formats.folder import is_tokenizer_file
from loramgr.records import MergedAdapter, MergeReport
from loramgr.workspace.computing import Merger, check_device, pick_device
from loramgr.workspace.home import Home
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.merging import Asked, picked, read_back
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.planning import MergePlan, plan_merge
from loramgr.workspace.remainders import Entry, Remainder, Remaker, read_remainder
from loramgr.workspace.sources import OpenBase, find_base

__all__ = ["remake"]

_SHARD = 5_000_000_000  # bytes, as transformers splits models
_MEMORY = 256 << 20  # bytes of tensors in the making; a larger one is made alone
_COPIES = 8


def remake(home: Home, base_text: str, adapters: Sequence[Asked], output: Path, options: MergeOptions) -> MergeReport:
    """Write the fine-tune that an adapter was extracted from with `exact`; the folder appears whole or not at all.

    Its tensors have the fine-tune's digest, and config.json is the fine-tune's. Raises UsageError for more than this
    one adapter with weight 1 and for options that would make another model, NotFoundError for an adapter without a
    remainder, and IntegrityError where the digest is not the fine-tune's.
    """
    if options != MergeOptions(device=options.device, verify=options.verify) or len(adapters) != 1:
        raise UsageError(
            "the fine-tune comes of one adapter, merged exactly and in the base's dtype", "leave the rest out"
        )
    started = time.monotonic()
    device, note = pick_device(options.device)
    base = find_base(home, base_text)
    with loading_torch(), picked(home, base, adapters) as (picks, folders):
        if picks[0].weight != 1:
            raise UsageError(f"{picks[0].ref} has the weight {picks[0].weight}, and the fine-tune has it with weight 1")
        folder = folders[picks[0].ref]
        remainder = read_remainder(folder)
        if remainder.base != base.digest:
            raise IncompatibleError(f"{picks[0].ref} was extracted with the base {remainder.base}, not {base.digest}")
        plan = plan_merge(base, picks, MergeOptions())
        maker = Remaker(plan, Merger(device, force=True), remainder.parts)
        check_free(output, sum(entry.spec.nbytes for entry in remainder.entries))
        check_device(device, [entry.spec for entry in remainder.entries], home.jobs)
        with staged(output) as stage:
            tensors = _write_weights(home, stage, remainder, maker)
            if options.verify:
                read_back(home, stage, tensors)
            size = sum(path.stat().st_size for path in stage.iterdir())
            size += _write_others(stage, remainder, base, folder)
        report = _report(plan, remainder)
        read = maker.producer.bytes_read
    notes = [*([note] if note else []), f"this is the fine-tune {remainder.finetuned}, bit for bit"]
    seconds = round(time.monotonic() - started, 3)
    where = str(output.absolute())
    return replace(
        report, output=where, bytes_read=read, bytes_written=size, device=device, seconds=seconds, notes=notes
    )


def _write_weights(home: Home, stage: Path, remainder: Remainder, maker: Remaker) -> dict[str, TensorDigest]:
    """Write shards and index; IntegrityError, before anything appears, when the digest is not the fine-tune's."""
    groups = _grouped(remainder.entries)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{at:05}-of-{len(groups):05}.safetensors" for at in range(1, len(groups) + 1)]

    def output(entry: Entry) -> OutputTensor:
        def fill(region: Region) -> None:
            region.write(maker.make(entry))

        return OutputTensor(entry.spec, fill, _COPIES * entry.spec.nbytes)

    shards = [
        Shard(name, tuple(map(output, group)), {"format": "pt"}) for name, group in zip(names, groups, strict=True)
    ]
    written = write_shards(stage, shards, Writing(home.jobs, _MEMORY, lambda _: None))
    if (found := tensors_digest(written.values())) != remainder.finetuned:
        raise IntegrityError(f"what comes out is {found}, not the fine-tune {remainder.finetuned}", "loramgr verify")
    if len(shards) > 1:
        weight_map = {tensor.spec.name: shard.name for shard in shards for tensor in shard.tensors}
        total = sum(entry.spec.nbytes for entry in remainder.entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return written


def _grouped(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Split the tensors, in their order, into shards of at most 5 GB, a larger tensor alone."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.spec.nbytes > _SHARD:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.spec.nbytes
    return groups


def _write_others(stage: Path, remainder: Remainder, base: OpenBase, folder: Path) -> int:
    """Write the fine-tune's config.json and tokenizer, and what the base carries beside; return their bytes."""
    own = [name for path in sorted(folder.rglob("*")) if is_tokenizer_file(name := path.relative_to(folder).as_posix())]
    size = copy_files(base.checkpoint.root, stage, [name for name in base.checkpoint.other_files if name not in own])
    size += copy_files(folder, stage, own)
    if remainder.config is not None:
        size += (stage / "config.json").write_bytes(remainder.config.encode())
    return size


def _report(plan: MergePlan, remainder: Remainder) -> MergeReport:
    """Return the report but for what only the run knows; a tensor counts as changed by the base's name for it."""
    before, pick = plan.base.tensors, plan.picks[0]
    known = {each.digest.name: before.get(str(each.merged)) for each in remainder.entries}
    return MergeReport(
        output="",
        base_digest=plan.base.digest,
        adapters=[MergedAdapter(pick.ref, pick.version.digest, pick.weight)],
        numerics="exact",
        modules_merged=plan.modules_merged,
        tensors_changed=sum(
            base is not None and base[1:] != each.digest[1:]
            for each, base in zip(remainder.entries, known.values(), strict=True)
        ),
        tensors_added=sorted(name for name, base in known.items() if base is None),
        tensors_total=len(remainder.entries),
        bytes_read=0,
        bytes_written=0,
        device="",
        kernel="torch",
        seconds=0.0,
        output_digest=remainder.finetuned,
    )
