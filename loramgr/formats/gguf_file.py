"""GGUF files: the header, checked before it is believed, and tensors in them, without torch and without `gguf`.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). Nothing is
read that the file does not hold, whatever the header declares.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loramgr.errors import IncompatibleError, IntegrityError
from loramgr.tensorfile import FLOAT_DTYPES, Data, FileTensor, TensorSpec, TensorView

if TYPE_CHECKING:
    import torch

__all__ = ["GGML_TYPES", "MAGIC", "GgufFile", "QuantizedTensor", "read_gguf"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# number in the file → name, values in a block, bytes of a block
GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_HEADER = 1 << 28
_KEPT_VALUES = 256  # of an array; longer ones are tokenizers, which adapters do not have
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A tensor in one of ggml's block formats, a `TensorView` whose values are its exact ones in float32."""

    spec: TensorSpec
    stored: FileTensor
    kind: int

    def load(self) -> torch.Tensor:
        """Return the values; IncompatibleError without the package `gguf`, or where that cannot read the format."""
        import torch

        from loramgr.formats.gguf_names import gguf_package

        package = gguf_package()
        data = torch.frombuffer(bytearray(self.stored.read_bytes()), dtype=torch.uint8)
        name = GGML_TYPES[self.kind][0]
        try:
            values = package.quants.dequantize(data.numpy(), package.GGMLQuantizationType(self.kind))
        except (NotImplementedError, ValueError) as error:
            raise IncompatibleError(f"{self.spec.name}: quantized as {name}, which cannot be read: {error}") from error
        return torch.from_numpy(values).reshape(self.spec.shape).contiguous()

    def read_bytes(self) -> Data:
        """Return the bytes of the values in float32."""
        from loramgr.tensors import as_bytes

        return as_bytes(self.load())


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked header: metadata, tensors in the order of their data, and the names of their ggml types.

    Shapes are row-major, the reverse of ggml's. Of an array in the metadata the first values are kept.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorView]
    types: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Info:
    """A tensor as the header declares it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        _, values, size = GGML_TYPES[self.kind]
        return math.prod(self.shape) // values * size


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file.

    Raises IncompatibleError for a version, byte order or tensor type that is not read, and IntegrityError where the
    header is truncated, is no GGUF, names something twice, or does not describe the bytes that follow it.
    """
    with path.open("rb") as file:
        reader = _Reader(path, file, os.fstat(file.fileno()).st_size)
        if reader.take(4) != MAGIC:
            raise IntegrityError(f"{path}: not a GGUF file")
        version = reader.number("<I")
        if version not in VERSIONS:
            raise IncompatibleError(f"{path}: GGUF version {version} is not read, only 2 and 3, little-endian")
        count, pairs = reader.number("<Q"), reader.number("<Q")
        metadata = _metadata(reader, pairs)
        infos = _infos(reader, count)
        start = _aligned(reader.position, _alignment(path, metadata))
    placed = _placed(path, infos, start, reader.size, _alignment(path, metadata))
    types = {info.name: GGML_TYPES[info.kind][0] for info in infos}
    return GgufFile(path, metadata, placed, types)


class _Reader:
    """Takes values off a file from its first byte on, never more than there are."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self._file = file
        self._end = min(size, _MAX_HEADER)

    def take(self, count: int) -> bytes:
        """Return the next bytes; IntegrityError when the file has fewer."""
        self.has_room_for(count)
        data = self._file.read(count)
        if len(data) != count:
            raise self.truncated()
        self.position += count
        return data

    def skip(self, count: int) -> None:
        """Pass over the next bytes; IntegrityError when the file has fewer."""
        self.has_room_for(count)
        self._file.seek(count, os.SEEK_CUR)
        self.position += count

    def has_room_for(self, count: int) -> None:
        """Raise IntegrityError when the file has fewer bytes left."""
        if count > self._end - self.position:
            raise self.truncated()

    def truncated(self) -> IntegrityError:
        """Return the error for a header that is longer than the file."""
        return IntegrityError(f"{self.path}: the GGUF header goes on after the end of the file: truncated or damaged")

    def number(self, form: str) -> Any:
        """Return a number of struct's format."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """Return a string; IntegrityError for one that is not UTF-8."""
        data = self.take(self.number("<Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{self.path}: a name in the GGUF header is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """Return a value of the metadata."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise IntegrityError(f"{self.path}: the GGUF header has a value of the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            self.has_room_for(count * width)
            kept = min(count, _KEPT_VALUES)
            values = [self.number(_SCALARS[kind]) for _ in range(kept)]
            self.skip((count - kept) * width)
            return values
        if kind != _STRING:
            raise IncompatibleError(f"{self.path}: the GGUF header has an array of the type {kind}, which is not read")
        self.has_room_for(count * 8)
        texts = []
        for index in range(count):
            if index < _KEPT_VALUES:
                texts.append(self.text())
            else:
                self.skip(self.number("<Q"))
        return texts


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    reader.has_room_for(count * 13)
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.text()
        if key in metadata:
            raise IntegrityError(f"{reader.path}: the key {key!r} stands twice in the GGUF header")
        metadata[key] = reader.value(reader.number("<I"))
    return metadata


def _infos(reader: _Reader, count: int) -> list[_Info]:
    reader.has_room_for(count * 24)
    infos: dict[str, _Info] = {}
    for _ in range(count):
        name, dimensions = reader.text(), reader.number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise IntegrityError(f"{reader.path}: tensor {name!r} has {dimensions} dimensions, ggml has at most 4")
        shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
        info = _Info(name, shape, reader.number("<I"), reader.number("<Q"))
        if name in infos:
            raise IntegrityError(f"{reader.path}: the tensor {name!r} stands twice in the GGUF header")
        if info.kind not in GGML_TYPES:
            raise IncompatibleError(f"{reader.path}: tensor {name!r} has the unknown type {info.kind}")
        if shape and shape[-1] % GGML_TYPES[info.kind][1]:
            raise IntegrityError(f"{reader.path}: tensor {name!r} has rows of {shape[-1]} values, no whole blocks")
        infos[name] = info
    return list(infos.values())


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", _ALIGNMENT)
    if not (isinstance(value, int) and 1 <= value <= 1 << 16 and value & (value - 1) == 0):
        raise IntegrityError(f"{path}: the impossible alignment {value!r}")
    return value


def _aligned(position: int, alignment: int) -> int:
    return position + -position % alignment


def _placed(path: Path, infos: list[_Info], start: int, size: int, alignment: int) -> dict[str, TensorView]:
    """Return the tensors; they must follow each other, padded to the alignment, to the end of the file."""
    position, tensors = start, dict[str, TensorView]()
    for info in sorted(infos, key=lambda each: (each.offset, each.nbytes)):
        if start + info.offset != _aligned(position, alignment):
            raise IntegrityError(f"{path}: tensor {info.name!r} does not start where the one before it ends")
        position = start + info.offset + info.nbytes
        if position > size:
            raise IntegrityError(f"{path}: tensor {info.name!r} ends after the file: truncated or damaged")
        tensors[info.name] = _view(path, info, start)
    if infos and _aligned(position, alignment) < size:
        raise IntegrityError(f"{path}: {size - position} bytes after the last tensor that nothing describes")
    return tensors


def _view(path: Path, info: _Info, start: int) -> TensorView:
    name, values, _ = GGML_TYPES[info.kind]
    if name in FLOAT_DTYPES or values == 1:
        return FileTensor(TensorSpec(info.name, name, info.shape), path, start + info.offset)
    stored = FileTensor(TensorSpec(info.name, "U8", (info.nbytes,)), path, start + info.offset)
    return QuantizedTensor(TensorSpec(info.name, "F32", info.shape), stored, info.kind)
