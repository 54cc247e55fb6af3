"""One pass over an adapter's bytes: its weights digest, values that are no numbers, updates that do nothing.

The checks read the bytes of little-endian floats and need no torch: a float is infinite or NaN exactly when all bits
of its exponent are set, and these lie in its last byte or its last two.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from loramgr.adapter import Adapter, LowRank
from loramgr.digests import TensorDigest, tensors_digest
from loramgr.tensorfile import DTYPE_BITS, TensorView

__all__ = ["Examination", "examine"]

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
    found = [_examine_tensor(adapter.tensors[name]) for name in sorted(adapter.tensors)]
    zero = {tensor.digest.name for tensor in found if tensor.is_zero}
    return Examination(
        weights_digest=tensors_digest(tensor.digest for tensor in found),
        non_finite=[tensor.digest.name for tensor in found if not tensor.is_finite],
        zero_updates=[
            name.removesuffix(".weight")
            for name, update in sorted(adapter.updates.items())
            if isinstance(update, LowRank) and _is_zero_update(update, zero)
        ],
    )


@dataclass(frozen=True, slots=True)
class _Examined:
    digest: TensorDigest
    is_finite: bool
    is_zero: bool


def _examine_tensor(view: TensorView) -> _Examined:
    spec, data = view.spec, memoryview(view.read_bytes())
    sha256, is_finite, is_zero = hashlib.sha256(), True, True
    for start in range(0, len(data), _CHUNK):
        chunk = bytes(data[start : start + _CHUNK])
        sha256.update(chunk)
        is_finite = is_finite and _all_finite(chunk, spec.dtype)
        is_zero = is_zero and _all_zero(chunk, DTYPE_BITS[spec.dtype] // 8)
    return _Examined(TensorDigest(spec.name, spec.dtype, spec.shape, sha256.hexdigest()), is_finite, is_zero)


def _is_zero_update(update: LowRank, zero: set[str]) -> bool:
    """DoRA's magnitude changes the weight even where the low-rank part is zero."""
    factors = {update.lora_A.spec.name, update.lora_B.spec.name}
    return update.magnitude is None and (update.scaling == 0 or bool(factors & zero))


def _marks(mask: int) -> bytes:
    """Return the table that maps a byte with all bits of the mask to 1 and every other byte to 0."""
    return bytes(byte & mask == mask for byte in range(256))


_TABLES = {dtype: (_marks(last), _marks(before)) for dtype, (last, before) in _EXPONENT.items()}


def _all_finite(chunk: bytes, dtype: str) -> bool:
    """Say whether every value of the chunk is a number; a chunk holds whole values, of a dtype in `_EXPONENT`."""
    width = DTYPE_BITS[dtype] // 8
    last_table, before_table = _TABLES[dtype]
    last = chunk[width - 1 :: width].translate(last_table)
    if 1 not in last:  # true of all weights but the huge, and saves the second byte
        return True
    before = chunk[width - 2 :: width].translate(before_table)
    return not int.from_bytes(last) & int.from_bytes(before)


def _all_zero(chunk: bytes, width: int) -> bool:
    """Say whether every value of the chunk is zero, with either sign."""
    last = chunk[width - 1 :: width]
    if last.strip(b"\0\x80"):
        return False
    return chunk.count(0) + last.count(0x80) == len(chunk)
