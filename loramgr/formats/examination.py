"""One pass over an adapter's bytes: its weights digest, values that are no numbers, updates that do nothing.

The checks read the bytes of little-endian floats and need no torch: a float is infinite or NaN exactly when all bits
of its exponent are set, and these lie in its last byte or its last two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loramgr.adapter import Adapter, LowRank
from loramgr.digests import TensorDigest, tensors_digest
from loramgr.errors import IntegrityError
from loramgr.tensorfile import DTYPE_BITS, FileTensor, TensorSpec

__all__ = ["Examination", "FileExaminer", "examine"]

_CHUNK = 1 << 22
# dtype → exponent bits in the last byte, and in the byte before it (0: none there)
_EXPONENT = {"F64": (0x7F, 0xF0), "F32": (0x7F, 0x80), "BF16": (0x7F, 0x80), "F16": (0x7C, 0x00)}


@dataclass(frozen=True, slots=True)
class Examination:
    """What the bytes of an adapter say.

    `non_finite` names the tensors with NaN or infinities; `zero_updates` the modules whose low-rank update is zero,
    because one factor or the scaling is.
    """

    weights_digest: str
    non_finite: list[str]
    zero_updates: list[str]


def examine(adapter: Adapter) -> Examination:
    """Read every tensor of the adapter once; IntegrityError when a file has become shorter."""
    looks = []
    for name in sorted(adapter.tensors):
        view = adapter.tensors[name]
        look, data = _Look(view.spec), memoryview(view.read_bytes())
        for start in range(0, len(data), _CHUNK):
            look.update(bytes(data[start : start + _CHUNK]))
        looks.append(look)
    return _told(adapter, looks)


class FileExaminer:
    """Examines the weights file of an adapter while somebody else reads it, from its first byte to its last."""

    def __init__(self, adapter: Adapter, path: Path) -> None:
        self._adapter = adapter
        self._path = path
        placed = sorted(_placed(adapter), key=lambda tensor: (tensor.start, tensor.spec.nbytes))
        self._looks = [_Look(tensor.spec) for tensor in placed]
        self._ends = [tensor.start + tensor.spec.nbytes for tensor in placed]
        self._starts = [tensor.start for tensor in placed]
        self._at = 0
        self._position = 0

    @staticmethod
    def reads(adapter: Adapter, path: Path) -> bool:
        """Say whether the adapter's tensors lie in this file as they are and to its end: one of safetensors."""
        placed = [*_placed(adapter)]
        if len(placed) != len(adapter.tensors) or any(view.path != path for view in placed):
            return False
        return max((view.start + view.spec.nbytes for view in placed), default=0) == path.stat().st_size

    def update(self, piece: memoryview) -> None:
        """Take the next bytes of the file."""
        begin, self._position = self._position, self._position + len(piece)
        while self._at < len(self._looks) and self._starts[self._at] < self._position:
            start, end = self._starts[self._at], self._ends[self._at]
            self._looks[self._at].update(bytes(piece[max(start - begin, 0) : end - begin]))
            if end > self._position:
                break
            self._at += 1

    def result(self) -> Examination:
        """Return what the file says; IntegrityError when it was not as long as its header says."""
        if self._position != max(self._ends, default=0):
            raise IntegrityError(f"{self._path}: the file changed while it was read", "add it when it is complete")
        return _told(self._adapter, self._looks)


class _Look:
    """What the bytes of one tensor say, piece by piece."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.is_finite = True
        self.is_zero = True
        self._sha256 = hashlib.sha256()
        self._width = DTYPE_BITS[spec.dtype] // 8
        self._rest = b""

    def update(self, piece: bytes) -> None:
        """Take the next bytes; a value may begin in one piece and end in the next."""
        self._sha256.update(piece)
        data = self._rest + piece if self._rest else piece
        end = len(data) - len(data) % self._width
        self._rest, chunk = data[end:], data[:end]
        last = chunk[self._width - 1 :: self._width]
        self.is_finite = self.is_finite and _all_finite(chunk, last, self.spec.dtype)
        self.is_zero = self.is_zero and _all_zero(chunk, last)

    @property
    def digest(self) -> TensorDigest:
        """Name, dtype, shape and sha256 of the tensor."""
        return TensorDigest(self.spec.name, self.spec.dtype, self.spec.shape, self._sha256.hexdigest())


def _placed(adapter: Adapter) -> Iterable[FileTensor]:
    return (view for view in adapter.tensors.values() if isinstance(view, FileTensor))


def _told(adapter: Adapter, looks: list[_Look]) -> Examination:
    zero = {look.spec.name for look in looks if look.is_zero}
    return Examination(
        weights_digest=tensors_digest(look.digest for look in looks),
        non_finite=sorted(look.spec.name for look in looks if not look.is_finite),
        zero_updates=[
            name.removesuffix(".weight")
            for name, update in sorted(adapter.updates.items())
            if isinstance(update, LowRank) and _is_zero_update(update, zero)
        ],
    )


def _is_zero_update(update: LowRank, zero: set[str]) -> bool:
    """DoRA's magnitude changes the weight even where the low-rank part is zero."""
    factors = {update.lora_A.spec.name, update.lora_B.spec.name}
    return update.magnitude is None and (update.scaling == 0 or bool(factors & zero))


def _marks(mask: int) -> bytes:
    """Return the table that maps a byte with all bits of the mask to 1 and every other byte to 0."""
    return bytes(byte & mask == mask for byte in range(256))


_TABLES = {dtype: (_marks(last), _marks(before)) for dtype, (last, before) in _EXPONENT.items()}
_SUSPECTS = {dtype: [byte for byte in range(256) if byte & last == last] for dtype, (last, _) in _EXPONENT.items()}


def _all_finite(chunk: bytes, last: bytes, dtype: str) -> bool:
    """Say whether every value of the chunk is a number; it holds whole values, `last` the last byte of each."""
    if dtype not in _EXPONENT:  # integers are
        return True
    if dtype not in _SUSPECTS:
        return True  # whole numbers
    if not any(byte in last for byte in _SUSPECTS[dtype]):  # true of all weights but the huge, and far cheaper
        return True
    last_table, before_table = _TABLES[dtype]
    width = DTYPE_BITS[dtype] // 8
    before = chunk[width - 2 :: width].translate(before_table)
    return not int.from_bytes(last.translate(last_table)) & int.from_bytes(before)


def _all_zero(chunk: bytes, last: bytes) -> bool:
    """Say whether every value of the chunk is zero, with either sign; `last` has the last byte of each."""
    if last.strip(b"\0\x80"):
        return False
    return chunk.count(0) + last.count(0x80) == len(chunk)
