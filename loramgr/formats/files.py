"""The files that one adapter is made of: found from the path a person gave, and opened by what they hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loramgr.errors import IncompatibleError, NotFoundError
from loramgr.formats.configuration import Fields, load_configuration
from loramgr.formats.folder import (
    CONFIGURATION,
    MLX_WEIGHTS,
    NO_WEIGHTS,
    WEIGHTS,
    candidates,
    is_present,
    not_an_adapter,
)
from loramgr.formats.gguf_file import MAGIC, GgufFile, read_gguf
from loramgr.pickles import read_pickle
from loramgr.tensorfile import LFS_MAGIC, SafetensorsHeader, TensorView, read_header

__all__ = ["AdapterFiles", "adapter_files"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HEAD = 64
_MANY = 5


@dataclass(frozen=True)
class AdapterFiles:
    """The configuration and weights of one adapter; each is read when it is first asked for.

    `configuration_path` is adapter_config.json, None without one; `is_single` says that a person named the weights
    file alone, so that what lies beside it is not its own.
    """

    folder: Path
    weights: Path
    configuration_path: Path | None = None
    is_single: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the files in their folder."""
        return [path.name for path in (self.configuration_path, self.weights) if path is not None]

    @cached_property
    def configuration(self) -> Fields | None:
        """The configuration, None without one; raises as `load_configuration`."""
        path = self.configuration_path
        return None if path is None else Fields(path, load_configuration(path))

    @cached_property
    def head(self) -> bytes:
        """The first bytes of the weights; IncompatibleError for a Git LFS pointer."""
        with self.weights.open("rb") as file:
            head = file.read(_HEAD)
        if head.startswith(LFS_MAGIC):
            raise IncompatibleError(
                f"{self.weights}: this is a Git LFS pointer, not the weights themselves",
                "git lfs pull, then add it again",
            )
        return head

    @cached_property
    def safetensors(self) -> SafetensorsHeader | None:
        """The header of weights in safetensors, None for those in another container; raises as `read_header`."""
        return None if self._is_pickle or self._is_gguf else read_header(self.weights)

    @cached_property
    def gguf(self) -> GgufFile | None:
        """The header of weights in GGUF, None for those in another container; raises as `read_gguf`."""
        return read_gguf(self.weights) if self._is_gguf else None

    @cached_property
    def tensors(self) -> dict[str, TensorView]:
        """The tensors by name; without torch unless they are in a pickle. Raises as the container's reader."""
        if self.gguf is not None:
            return dict(self.gguf.tensors)
        if self.safetensors is not None:
            return dict(self.safetensors.tensors)
        return dict(read_pickle(self.weights, unwrap=True))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata of safetensors; empty for other containers and where there is none."""
        return {} if self.safetensors is None else self.safetensors.metadata or {}

    @property
    def _is_gguf(self) -> bool:
        return self.head.startswith(MAGIC)

    @property
    def _is_pickle(self) -> bool:
        """Whether the file is a pickle: by its first bytes, or where they say nothing by its name."""
        is_length = self.head[4:8] == bytes(4)  # of a safetensors header, whose first brace may be damaged
        if self.head.startswith(b"\x80") and is_length:
            return False
        if self.head.startswith((b"PK\x03\x04", b"\x80")) and self.head[8:9] != b"{":
            return True
        return self.weights.suffix in _PICKLES and self.head[8:9] != b"{"


def adapter_files(path: Path) -> AdapterFiles:
    """Return the files of the adapter that the path names: its folder, its configuration or its weights file.

    A weights file that belongs to a configuration beside it brings that along; any other stands alone. Raises
    NotFoundError, saying what is there instead, and IncompatibleError for a folder with several weights files and for
    weights that are not the ones that count.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    if path.name == CONFIGURATION:
        return _in_folder(path.parent)
    if path.name in (*WEIGHTS, MLX_WEIGHTS) and is_present(path.parent, CONFIGURATION):
        files = _in_folder(path.parent)
        if files.weights.name != path.name:
            raise IncompatibleError(
                f"{path}: {files.weights.name} beside it is the file that counts", f"name {path.parent} instead"
            )
        return files
    return AdapterFiles(path.parent, path, is_single=True)


def _in_folder(folder: Path) -> AdapterFiles:
    found = candidates(folder)
    if is_present(folder, CONFIGURATION):
        return AdapterFiles(folder, _counting(folder, found), folder / CONFIGURATION)
    if not found:
        raise not_an_adapter(folder)
    return AdapterFiles(folder, _only(folder, found))


def _counting(folder: Path, found: Iterable[str]) -> Path:
    """Return the weights that the configuration is about: PEFT's or MLX's by their name, else the only ones."""
    names = [name for name in (*WEIGHTS, MLX_WEIGHTS) if is_present(folder, name)]
    if len(names) > 1 and names[-1] == MLX_WEIGHTS:
        configuration = load_configuration(folder / CONFIGURATION)
        names = [MLX_WEIGHTS] if "fine_tune_type" in configuration and "peft_type" not in configuration else names
    if names:
        return folder / names[0]
    others = [*found]
    if not others:
        raise NotFoundError(f"{folder}: {CONFIGURATION} is there, and neither {' nor '.join(WEIGHTS)}", NO_WEIGHTS)
    return _only(folder, others)


def _only(folder: Path, found: list[str]) -> Path:
    if len(found) > 1:
        more = f" and {len(found) - _MANY} more" if len(found) > _MANY else ""
        raise IncompatibleError(
            f"{folder}: several files may be the adapter: {', '.join(found[:_MANY])}{more}",
            f"name one of them: {folder / found[0]}",
        )
    return folder / found[0]
