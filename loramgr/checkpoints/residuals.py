"""The folder in a merged model that gives its base back: for every changed tensor its residual, or the tensor itself.

`loramgr-residual/` holds one safetensors file for each shard of weights, with the parts of a tensor as `NAME:PART`, and
below `files/` the other files of the base that the merge changed. Servers read the weights at the top of a model
folder only, so none takes these for weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock

from loramgr.errors import IntegrityError
from loramgr.tensorfile import Data, FileTensor, TensorSpec, encode_header, read_header

__all__ = ["FILES", "FOLDER", "ORIGINAL", "ResidualFile", "read_residuals"]

FOLDER = "loramgr-residual"
FILES = f"{FOLDER}/files"
ORIGINAL = "original"


class ResidualFile:
    """The residuals of one shard, in the making: parts are added in any order, from several threads."""

    def __init__(self, folder: Path, shard: str) -> None:
        self._name = f"{FOLDER}/{shard}"
        self._path = folder / self._name
        self._parts = self._path.with_name(f".{shard}.parts")
        self._specs: list[TensorSpec] = []
        self._lock = Lock()

    def add(self, name: str, parts: Mapping[str, tuple[TensorSpec, Data]]) -> None:
        """Add what gives one tensor back: each part with its dtype and shape."""
        with self._lock:
            self._path.parent.mkdir(exist_ok=True)
            with self._parts.open("ab" if self._specs else "wb") as file:
                for part, (spec, data) in parts.items():
                    self._specs.append(replace(spec, name=f"{name}:{part}"))
                    file.write(data)

    def finish(self) -> list[str]:
        """Write the file, durable, and return its path in the model folder; nothing where no part was added."""
        if not self._specs:
            return []
        with self._path.open("wb") as file:
            file.write(encode_header(self._specs, None))
            file.flush()
            with self._parts.open("rb") as parts:
                shutil.copyfileobj(parts, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        self._parts.unlink()
        return [self._name]


def read_residuals(folder: Path) -> dict[str, dict[str, FileTensor]]:
    """Return the parts for each tensor of the model in the folder; empty where it has none.

    Raises IntegrityError for damaged files.
    """
    found: dict[str, dict[str, FileTensor]] = {}
    for path in sorted((folder / FOLDER).glob("[!.]*.safetensors")):
        for key, view in read_header(path).tensors.items():
            name, _, part = key.rpartition(":")
            if not name or part in found.setdefault(name, {}):
                raise IntegrityError(f"{path}: {key!r} is no part of a residual, or stands twice")
            found[name][part] = view
    return found
