"""Writes model folders: safetensors shards streamed tensor by tensor, and the index that goes with them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramgr.checkpoints.source import Checkpoint, WeightFile
from loramgr.digests import CHUNK, TensorDigest
from loramgr.tensorfile import TensorSpec, encode_header

__all__ = ["OutputTensor", "Shard", "copy_files", "lay_out", "merged_names", "output_index", "write_shard"]

INDEX = "model.safetensors.index.json"
Data = bytes | memoryview


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written; `produce` reads or computes its bytes when its turn comes."""

    spec: TensorSpec
    produce: Callable[[], Data]


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


def write_shard(folder: Path, shard: Shard, progress: Callable[[int], object]) -> list[TensorDigest]:
    """Write one shard and return the digests of its tensors; memory holds one tensor at a time.

    `progress` is told the bytes of every tensor that was written. What `produce` raises is passed on; the file is
    then incomplete, and the caller drops its folder.
    """
    digests = []
    with (folder / shard.name).open("wb") as file:
        file.write(encode_header([tensor.spec for tensor in shard.tensors], shard.metadata))
        for tensor in shard.tensors:
            data = tensor.produce()
            file.write(data)
            sha256 = hashlib.sha256(data).hexdigest()
            digests.append(TensorDigest(tensor.spec.name, tensor.spec.dtype, tensor.spec.shape, sha256))
            progress(len(data))
    return digests


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
        with (source / name).open("rb") as reading, (target / name).open("wb") as writing:
            shutil.copyfileobj(reading, writing, CHUNK)
            size += writing.tell()
    return size
