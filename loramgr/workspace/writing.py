"""Writes what a plan says into a folder: shards, index, configuration, and everything else that a model carries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramgr.checkpoints.config import adapted_config, encode_config
from loramgr.checkpoints.journal import Journal
from loramgr.checkpoints.output import Shard, carry_over, copy_files, lay_out, link_files, merged_names, output_index
from loramgr.checkpoints.residuals import FILES
from loramgr.checkpoints.source import MERGE_RECORD
from loramgr.checkpoints.streaming import Writing, write_shards
from loramgr.digests import TensorDigest, canonical_json, digest_bytes, digest_file
from loramgr.errors import IntegrityError
from loramgr.tensorfile import FileTensor
from loramgr.workspace.home import Home
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.planning import MergePlan
from loramgr.workspace.producing import Producer
from loramgr.workspace.sources import OpenBase
from loramgr.workspace.tokenizers import carried_tokenizer

__all__ = ["Stage", "Written", "digest_of_plan", "write_model"]

# Bytes of tensors in the making: a larger one is made alone. Whatever the model's size, the process then stays below
# 400 MB, of which torch has 250, and three times the largest tensor.
_MEMORY = 96 << 20
_MEMORY_OF_LARGEST = 3


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a model is written, and how.

    `folder` is to be filled. `replaces` is the model folder whose place it takes, None for a new one: what stays as it
    is there stays the same file, and what is not of the model is carried over. `reversible` keeps what gives the base
    back.
    """

    folder: Path
    replaces: Path | None = None
    reversible: bool = False


@dataclass
class Written:
    """What was written: digests of all tensors, and of all other files, in the base and in the output."""

    tensors: dict[str, TensorDigest] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0


def digest_of_plan(plan: MergePlan, options: MergeOptions) -> str:
    """Return a text that differs for everything that would be written differently."""
    from loramgr import __version__

    said = {
        "loramgr": __version__,
        "base": plan.base.digest,
        "adapters": [[pick.version.digest, pick.weight] for pick in plan.picks],
        "dtype": plan.change.dtype,
        "numerics": options.numerics,
        "device": options.device if options.numerics == "fast" else None,
        "reversible": options.reversible,
        "force": options.force,
        "replacements_of": options.replacements_of,
        "keep_tied": options.keep_tied,
    }
    return digest_bytes(canonical_json(said))


def write_model(
    home: Home, plan: MergePlan, producer: Producer, folders: Mapping[str, Path], stage: Stage, key: str
) -> Written:
    """Write the model; what a killed run of the same `key` left in the folder is taken as far as it is whole.

    `folders` has the files of the adapters, by their references. Raises IntegrityError when the base's bytes are not
    those that it was registered with.
    """
    written = Written()
    shards = lay_out(plan.base.checkpoint, producer.outputs(reversible=stage.reversible))
    same = [shard for shard in shards if stage.replaces is not None and _is_same_file(plan, shard, stage.replaces)]
    made = [shard for shard in shards if shard not in same]
    kept = producer.keep_residuals(stage.folder, made) if stage.reversible else {}

    def finish(shard: Shard) -> Sequence[str]:
        return kept[shard.name].finish() if shard.name in kept else ()

    largest = max((tensor.spec.nbytes for shard in shards for tensor in shard.tensors), default=0)
    memory, journal = _MEMORY + _MEMORY_OF_LARGEST * largest, Journal(stage.folder, key)
    with _bar(home, shards) as advance:
        written.tensors.update(write_shards(stage.folder, made, Writing(home.jobs, memory, advance, journal, finish)))
        written.tensors.update(producer.checked([tensor.spec.name for shard in same for tensor in shard.tensors], home))
    journal.forget()
    written.bytes += sum((stage.folder / shard.name).stat().st_size for shard in made)
    link_files(plan.base.checkpoint.root, stage.folder, [shard.name for shard in same])
    _check_whole(plan)
    _write_others(plan, folders, shards, stage, written)
    return written


def _is_same_file(plan: MergePlan, shard: Shard, folder: Path) -> bool:
    """Say whether the folder has this file: the same tensors in the same order, none of them changed."""
    checkpoint = plan.base.checkpoint
    file = next((file for file in checkpoint.files if file.name == shard.name), None)
    names = tuple(tensor.spec.name for tensor in shard.tensors)
    if file is None or file.tensors != names:
        return False
    views = [checkpoint.tensors[name] for name in names]
    here = all(isinstance(view, FileTensor) and view.path == folder / shard.name for view in views)
    targets = [plan.targets[name] for name in names]
    return here and not any(
        target.contributions or target.spec != view.spec for target, view in zip(targets, views, strict=True)
    )


def _write_others(
    plan: MergePlan, folders: Mapping[str, Path], shards: Sequence[Shard], stage: Stage, written: Written
) -> None:
    """Write the configuration, the index and the tokenizer, and copy what else belongs to the model."""
    base, checkpoint = plan.base, plan.base.checkpoint
    carried = carried_tokenizer(plan, dict(folders))
    made = {name: path.read_bytes() for name, path in base.moved.items() if path and name in checkpoint.other_files}
    made |= {name: source.read_bytes() for name, source in carried.items()}
    if checkpoint.config is not None and checkpoint.config_bytes is not None:
        adapted = adapted_config(checkpoint.config, plan.change)
        made["config.json"] = checkpoint.config_bytes if adapted == checkpoint.config else encode_config(adapted)
    if index := output_index(checkpoint, shards):
        made[index[0]] = index[1]
    for name, data in sorted(made.items()):
        _write_file(base, stage, name, data, written)
    others = [name for name in checkpoint.other_files if name not in made]
    if stage.replaces == checkpoint.root:
        link_files(checkpoint.root, stage.folder, others)
    else:
        written.bytes += copy_files(checkpoint.root, stage.folder, others)
    for name in others:
        digest = digest_file(stage.folder / name)
        written.files.append({"path": name, "before": digest, "after": digest})
    if stage.replaces is not None:
        ours = {MERGE_RECORD, *merged_names(checkpoint), *(str(file["path"]) for file in written.files)}
        carry_over(stage.replaces, stage.folder, ours, link=True)


def _write_file(base: OpenBase, stage: Stage, name: str, data: bytes, written: Written) -> None:
    """Write a file, note what the base has in its place, None for nothing, and keep that where it is to come back."""
    original = base.file(name)
    before = None if original is None else digest_file(original)
    after = digest_bytes(data)
    for path, content in ((name, data), *(((f"{FILES}/{name}", original.read_bytes()),) if original else ())):
        if path == name or (stage.reversible and before != after):
            (stage.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (stage.folder / path).write_bytes(content)
            written.bytes += len(content)
    written.files.append({"path": name, "before": before, "after": after})


def _check_whole(plan: MergePlan) -> None:
    """Every tensor was read and compared one by one; what is left is that none is missing or new."""
    missing = plan.base.tensors.keys() ^ plan.base.checkpoint.tensors.keys()
    if missing:
        raise IntegrityError(
            f"{plan.base.source}: {min(missing)} is in only one of the base's files and its registration",
            "loramgr base verify",
        )


@contextmanager
def _bar(home: Home, shards: Sequence[Shard]) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    total = sum(tensor.spec.nbytes for shard in shards for tensor in shard.tensors)
    disable = None if home.progress else True  # None: a bar on terminals only
    with tqdm(total=total, desc="merge", unit="B", unit_scale=True, delay=1, file=sys.stderr, disable=disable) as bar:
        yield bar.update
