"""Safetensors files without torch: the header, checked before it is believed, and raw tensor bytes.

Specification: https://huggingface.co/docs/safetensors (8-byte little-endian length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError
from loramgr.memory import Memory, fresh

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_BITS",
    "FLOAT_DTYPES",
    "Data",
    "FileTensor",
    "SafetensorsHeader",
    "TensorSpec",
    "TensorView",
    "encode_header",
    "read_header",
]

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
Data = bytes | bytearray | memoryview
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
FLOAT8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
MAX_HEADER = 100_000_000
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is without its bytes; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * DTYPE_BITS[self.dtype] // 8


class TensorView(Protocol):
    """A tensor that is read when it is needed."""

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape, known without reading the data."""

    def read_bytes(self) -> Data:
        """Return the bytes, row-major and little-endian."""

    def load(self) -> torch.Tensor:
        """Return the tensor on the CPU, contiguous, in its stored dtype."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a safetensors file; `start` is the absolute offset of its first byte."""

    spec: TensorSpec
    path: Path
    start: int

    def read_bytes(self, memory: Memory = fresh) -> memoryview:
        """Return the tensor's bytes, in the memory's slot "read"; IntegrityError when the file has become shorter."""
        data = left = memory("read", self.spec.nbytes)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                count = file.readinto(left)  # one read(2) returns at most 2 GiB
                if not count:
                    raise IntegrityError(f"{self.path}: the file ends inside tensor {self.spec.name!r}")
                left = left[count:]
        return data

    def load(self) -> torch.Tensor:
        """Return the tensor; see `TensorView.load`."""
        from loramgr.tensors import from_bytes

        return from_bytes(self.read_bytes(), self.spec)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header: tensors in the order of their data, metadata as stored (None when the file has none).

    `raw` is the header's JSON text with its padding, `data_start` the offset of the first data byte.
    """

    path: Path
    tensors: dict[str, FileTensor]
    metadata: dict[str, str] | None
    raw: bytes
    data_start: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check a safetensors header.

    Raises NotFoundError when there is no such file, IncompatibleError for a Git LFS pointer or an unknown dtype, and
    IntegrityError when the header is truncated or does not describe exactly the bytes that follow it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(len(LFS_MAGIC)), size)
            file.seek(8)
            raw = file.read(length)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFoundError(f"{path}: no such file") from error
    content = _parse(path, raw)
    metadata = content.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise IntegrityError(f"{path}: the safetensors metadata is not a map of strings")
    for text in (text for pair in (metadata or {}).items() for text in pair):
        _check_text(path, text)
    data_start = 8 + len(raw)
    placed = sorted(
        (_tensor(path, name, entry, data_start) for name, entry in content.items()),
        key=lambda tensor: (tensor.start, tensor.spec.nbytes),
    )
    _check_layout(path, placed, data_start, size)
    return SafetensorsHeader(path, {t.spec.name: t for t in placed}, metadata, raw, data_start)


def _header_length(path: Path, head: bytes, size: int) -> int:
    if head == LFS_MAGIC:
        raise IncompatibleError(
            f"{path}: this is a Git LFS pointer, not the weights themselves", "git lfs pull, then add it again"
        )
    if len(head) < 8:
        raise IntegrityError(f"{path}: {size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", head[:8])
    if length > min(size - 8, MAX_HEADER):
        raise IntegrityError(
            f"{path}: the header claims {length} bytes and the file has {size}: truncated or not safetensors"
        )
    return int(length)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path}: the safetensors header is not a JSON object")
    for name in content:
        _check_text(path, name)
    return content


def _check_text(path: Path, text: str) -> None:
    """JSON can escape half of a character, which no other tool could write to a file or a terminal again."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise IntegrityError(f"{path}: the safetensors header holds a text that is not Unicode: {text!a}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands twice")
    return content


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> FileTensor:
    if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - entry.keys():
        raise IntegrityError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise IncompatibleError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}")
    if not (isinstance(shape, list) and all(map(_is_count, shape))):
        raise IntegrityError(f"{path}: tensor {name!r} has the impossible shape {shape!r}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))):
        raise IntegrityError(f"{path}: tensor {name!r} has the impossible offsets {offsets!r}")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise IntegrityError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} needs {spec.nbytes} bytes, "
            f"its offsets hold {offsets[1] - offsets[0]}"
        )
    return FileTensor(spec, path, data_start + offsets[0])


def _check_layout(path: Path, placed: list[FileTensor], data_start: int, size: int) -> None:
    """Tensors must follow each other without a gap or overlap, to the last byte of the file."""
    position = data_start
    for tensor in placed:
        if tensor.start != position:
            raise IntegrityError(f"{path}: tensor {tensor.spec.name!r} does not start where the one before it ends")
        position += tensor.spec.nbytes
    if position != size:
        raise IntegrityError(
            f"{path}: the header describes {position} bytes and the file has {size}: truncated or damaged"
        )


def encode_header(specs: list[TensorSpec], metadata: dict[str, str] | None) -> bytes:
    """Return the first bytes of a safetensors file whose data are the tensors in the given order, without gaps."""
    content: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for spec in specs:
        content[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    raw = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the data start aligned, as every writer of the format leaves them
    return struct.pack("<Q", len(raw)) + raw
