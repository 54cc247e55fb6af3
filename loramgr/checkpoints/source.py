"""A model folder or weights file, opened: which files hold its tensors, and what else it carries."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loramgr.checkpoints.families import tied_suffixes
from loramgr.containment import resolve_inside
from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError, UncheckedError
from loramgr.pickles import drop_shared, read_pickle
from loramgr.tensorfile import SafetensorsHeader, TensorView, read_header

__all__ = [
    "CHOICES",
    "MERGE_RECORD",
    "Checkpoint",
    "WeightFile",
    "choose_weights",
    "is_carried",
    "layer_folders",
    "open_checkpoint",
    "shard_names",
]

MERGE_RECORD = "loramgr-merge.json"
CHOICES = ("model.safetensors", "pytorch_model.bin")
_PICKLES = (".bin", ".pt", ".pth")
_NOT_CARRIED = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.safetensors", "*.ckpt", "*.ot",
                "*.safetensors.index.json", "*.bin.index.json", "optimizer*", MERGE_RECORD)  # fmt: skip
_OF_PIPELINE = (
    "name the folder of one of them (unet, transformer, text_encoder), or for an adapter of several of them the "
    "checkpoint of the whole pipeline in one .safetensors file"
)
_NOT_ENTERED = frozenset({".git", ".cache", "loramgr-residual"})


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of tensors; `name` is relative to the checkpoint's root, `tensors` in the order of their data.

    A pickle's order is that of its dictionary, and names that share storage with a kept one are not in it.
    `header` is the checked safetensors header with metadata and raw bytes, None for a pickle.
    """

    name: str
    kind: Literal["safetensors", "pickle"]
    tensors: tuple[str, ...]
    header: SafetensorsHeader | None

    @property
    def metadata(self) -> dict[str, str] | None:
        """The metadata as stored, None when the file has none."""
        return None if self.header is None else self.header.metadata


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model; reading its tensors is up to the caller.

    `path` is what was asked for, `root` the folder its files lie in. `aliases` maps a name that shares storage with a
    kept one, and is left out as `save_pretrained` does, to that one. `index_name` is the index file's name and
    `index` its content, both None for a single file. `config` is config.json and `config_bytes` its bytes, both None
    without one. `other_files` are the further files that belong to the model, as relative paths with `/`; a single
    weights file has none.
    """

    path: Path
    root: Path
    files: tuple[WeightFile, ...]
    tensors: dict[str, TensorView]
    aliases: dict[str, str]
    index_name: str | None
    index: dict[str, Any] | None
    config: dict[str, Any] | None
    config_bytes: bytes | None
    other_files: tuple[str, ...]

    @property
    def index_metadata(self) -> dict[str, Any] | None:
        """The index file's metadata, None without an index or without metadata in it."""
        metadata = None if self.index is None else self.index.get("metadata")
        return metadata if isinstance(metadata, dict) else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder, or a single .safetensors, .bin, .pt or .pth file, and check headers and index.

    The weights are chosen as transformers does: an index before a single file, safetensors before pickles.
    Raises NotFoundError when there is nothing there, IncompatibleError for what is no base model (an adapter, several
    weights files without an index, a Git LFS pointer, links that leave the folder), and IntegrityError for shards
    that are missing or do not hold what the index says; UncheckedError for files that cannot be read.
    """
    try:
        return _open_folder(path) if path.is_dir() else _open_single(path)
    except OSError as error:
        raise UncheckedError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _open_single(path: Path) -> Checkpoint:
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    if not path.is_file() or path.suffix not in (".safetensors", *_PICKLES):
        raise IncompatibleError(f"{path}: neither a model folder nor a .safetensors, .bin, .pt or .pth file")
    files, tensors, aliases = _open_files([path])
    return Checkpoint(path, path.parent, files, tensors, aliases, None, None, None, None, ())


def _open_folder(folder: Path) -> Checkpoint:
    entries = {entry.name for entry in folder.iterdir()}
    index_name, single = choose_weights(entries, str(folder))
    index = None if index_name is None else _read_object(resolve_inside(folder, index_name))[0]
    names = [str(single)] if index is None else _indexed_files(folder, str(index_name), index)
    files, tensors, aliases = _open_files([resolve_inside(folder, name) for name in names])
    if index is not None:
        _check_index(folder, index["weight_map"], files, aliases)
    config, config_bytes = None, None
    if "config.json" in entries:
        config, config_bytes = _read_object(resolve_inside(folder, "config.json"))
    others = tuple(sorted(_other_files(folder)))
    return Checkpoint(folder, folder, files, tensors, aliases, index_name, index, config, config_bytes, others)


def choose_weights(names: Collection[str], where: str) -> tuple[str | None, str | None]:
    """Return the index file or else the single weights file that transformers would open, the other one None.

    `names` are those of the files at the top of the folder, `where` is the folder's name for messages. Raises
    NotFoundError when there are no weights, IncompatibleError for an adapter or a pipeline, or when several files
    compete.
    """
    for single in CHOICES:
        if f"{single}.index.json" in names:
            return f"{single}.index.json", None
        if single in names:
            return None, single
    if "adapter_config.json" in names:
        raise IncompatibleError(f"{where}: this is an adapter, not a base model", f"loramgr add {where}")
    indexes = sorted(name for name in names if name.endswith(".safetensors.index.json"))
    found = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("."))
    if len(indexes) > 1 or (not indexes and len(found) > 1):
        raise IncompatibleError(
            f"{where}: several weights files and nothing that says which: {', '.join(indexes or found)}",
            "name the one file, or keep one of them in the folder",
        )
    if not (indexes or found) and "model_index.json" in names:
        raise IncompatibleError(
            f"{where}: a pipeline of diffusers, whose models lie in folders of their own", _OF_PIPELINE
        )
    if not (indexes or found):
        raise NotFoundError(f"{where}: no model.safetensors, pytorch_model.bin or index of shards in this folder")
    return (indexes[0], None) if indexes else (None, found[0])


def is_carried(name: str, layer_folders: Collection[str]) -> bool:
    """Say whether a file, as a relative path with `/`, belongs to the model beside its weights and config.json.

    Other formats of the weights, training states and caches do not; `layer_folders` are carried with their weights.
    """
    folder, _, file = name.rpartition("/")
    if name == "config.json" or not _NOT_ENTERED.isdisjoint(name.split("/")):
        return False
    return folder in layer_folders or not any(fnmatch.fnmatchcase(file, other) for other in _NOT_CARRIED)


def layer_folders(modules: bytes) -> frozenset[str]:
    """Return the folders of further layers that sentence-transformers' modules.json names; none if it is damaged."""
    try:
        return frozenset(str(module["path"]) for module in json.loads(modules)) - {""}
    except (ValueError, TypeError, KeyError):
        return frozenset()


def _read_object(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path}: not a JSON object")
    return content, data


def _indexed_files(folder: Path, index_name: str, index: dict[str, Any]) -> list[str]:
    """Return the shards that the index names, each a file in the folder itself."""
    names = shard_names(index, str(folder / index_name))
    for name in names:
        if not resolve_inside(folder, name).exists():
            raise IntegrityError(f"{folder}: the shard {name} that {index_name} names is missing")
    return names


def shard_names(index: dict[str, Any], where: str) -> list[str]:
    """Return the files that an index names; IntegrityError for anything but plain names of files beside it."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise IntegrityError(f"{where}: no weight_map from tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if "/" in name or "\\" in name or name in {"", ".", ".."}:
            raise IntegrityError(f"{where}: the shard {name!r} leaves the folder")
    if not names:
        raise IntegrityError(f"{where}: the weight_map is empty")
    return names


def _open_files(paths: list[Path]) -> tuple[tuple[WeightFile, ...], dict[str, TensorView], dict[str, str]]:
    tensors: dict[str, TensorView] = {}
    aliases: dict[str, str] = {}
    files = []
    for path in paths:
        file, views, left_out = _open_file(path)
        twice = sorted((views.keys() | left_out) & (tensors.keys() | aliases))
        if twice:
            raise IntegrityError(f"{path}: {_listed(twice)} also in another shard")
        tensors.update(views)
        aliases.update(left_out)
        files.append(file)
    if not tensors:
        raise IncompatibleError(f"{paths[0]}: the file holds no tensor")
    return tuple(files), tensors, aliases


def _open_file(path: Path) -> tuple[WeightFile, Mapping[str, TensorView], dict[str, str]]:
    if path.suffix in _PICKLES:
        content = read_pickle(path)
        left_out = drop_shared(content, tied_suffixes(content))
        kept = {key: view for key, view in content.items() if key not in left_out}
        return WeightFile(path.name, "pickle", tuple(kept), None), kept, left_out
    header = read_header(path)
    return WeightFile(path.name, "safetensors", tuple(header.tensors), header), header.tensors, {}


def _check_index(
    folder: Path, weight_map: dict[str, str], files: tuple[WeightFile, ...], aliases: dict[str, str]
) -> None:
    """Every name must lie where the index says; names that share storage with a kept one count as there."""
    held = {name: file.name for file in files for name in file.tensors}
    held |= {name: held[kept] for name, kept in aliases.items()}
    missing = sorted(name for name, file in weight_map.items() if held.get(name) != file)
    if missing:
        raise IntegrityError(f"{folder}: {_listed(missing)} not in the shard that the index names")
    extra = sorted(held.keys() - weight_map.keys())
    if extra:
        raise IntegrityError(f"{folder}: {_listed(extra)} in a shard and not in the index")


def _listed(names: list[str]) -> str:
    more = "" if len(names) <= 3 else f" and {len(names) - 3} more"
    return ", ".join(names[:3]) + more + (" is" if len(names) == 1 else " are")


def _other_files(folder: Path) -> Iterator[str]:
    modules = folder / "modules.json"
    whole = layer_folders(modules.read_bytes()) if modules.is_file() else frozenset()
    return (name for name in _walk(folder) if is_carried(name, whole))


def _walk(folder: Path, below: str = "") -> Iterator[str]:
    """Yield the relative paths of all files, links to folders and version control left aside."""
    with os.scandir(folder / below) as entries:
        listed = list(entries)
    for entry in listed:
        name = f"{below}{entry.name}"
        if not resolve_inside(folder, name).is_dir():
            yield name
        elif not entry.is_symlink() and entry.name not in _NOT_ENTERED:
            yield from _walk(folder, f"{name}/")
