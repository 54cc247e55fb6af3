"""What a model folder is to hold: its shards, the index that goes with them, and the files that are copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramgr.checkpoints.regions import Region
from loramgr.checkpoints.residuals import FOLDER
from loramgr.checkpoints.source import Checkpoint, WeightFile
from loramgr.tensorfile import TensorSpec

__all__ = [
    "OutputTensor",
    "Shard",
    "carry_over",
    "copy_files",
    "lay_out",
    "link_files",
    "merged_names",
    "output_index",
]

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written; `produce` fills its region when its turn comes, holding about `memory` bytes for it."""

    spec: TensorSpec
    produce: Callable[[Region], object]
    memory: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file to be written: its name, its tensors in the order of their data, and its metadata."""

    name: str
    tensors: tuple[OutputTensor, ...]
    metadata: dict[str, str] | None


def lay_out(base: Checkpoint, tensors: dict[str, OutputTensor]) -> list[Shard]:
    """Distribute tensors over shards as the base has them; those that the base lacks go into the last one.

    Pickle files become safetensors files of the same number. Tensors of the base that are not given are left out.
    """
    shards = []
    placed: set[str] = set()
    for position, file in enumerate(base.files):
        names = [name for name in file.tensors if name in tensors]
        placed.update(names)
        if position == len(base.files) - 1:
            names += sorted(tensors.keys() - placed)
        metadata = file.metadata if file.kind == "safetensors" else {"format": "pt"}
        shards.append(Shard(_safetensors_name(file), tuple(tensors[name] for name in names), metadata))
    return shards


def _safetensors_name(file: WeightFile) -> str:
    if file.kind == "safetensors":
        return file.name
    stem = Path(file.name).stem
    return f"{stem.replace('pytorch_model', 'model')}.safetensors"


def merged_names(base: Checkpoint) -> list[str]:
    """Return the names of the weight files and index of a folder that was merged from the base."""
    names = [_safetensors_name(file) for file in base.files]
    return names if base.index_name is None else [*names, _index_name(base)]


def _index_name(base: Checkpoint) -> str:
    name = str(base.index_name)
    return name if name.endswith(".safetensors.index.json") else INDEX


def output_index(base: Checkpoint, shards: Sequence[Shard]) -> tuple[str, bytes] | None:
    """Return name and content of the index of the shards; None where the base has none."""
    if base.index is None:
        return None
    metadata: dict[str, Any] = dict(base.index_metadata or {})
    metadata["total_size"] = sum(tensor.spec.nbytes for shard in shards for tensor in shard.tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(tensor.spec.elements for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.spec.name: shard.name for shard in shards for tensor in shard.tensors}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return _index_name(base), (json.dumps(index, indent=2) + "\n").encode()


def copy_files(source: Path, target: Path, names: Sequence[str]) -> int:
    """Copy files by their relative names, with their folders, and return the number of bytes."""
    size = 0
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)  # in the kernel, where it can
        size += (target / name).stat().st_size
    return size


def link_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Give files a second name in another folder, by their relative paths, or copy them where that cannot be."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name, follow_symlinks=False)
        except OSError:  # a file system without hard links, or with a limit of them
            shutil.copy2(source / name, target / name, follow_symlinks=False)


def carry_over(source: Path, target: Path, ours: Collection[str], *, link: bool) -> None:
    """Bring everything of a folder into another one but what is named and what is of a residual.

    Files get a second name with `link`, else they are copied; links stay links. Folders keep their permissions.
    """
    for root, folders, names in os.walk(source):
        below = Path(root).relative_to(source)
        if below == Path():
            folders[:] = [name for name in folders if name != FOLDER]
        (target / below).mkdir(exist_ok=True)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in (each.as_posix() for each in (below / name for name in (*names, *links))):
            if name in ours:
                continue
            if link and not (source / name).is_symlink():
                link_files(source, target, [name])
            else:
                shutil.copy2(source / name, target / name, follow_symlinks=False)
        shutil.copystat(root, target / below)
