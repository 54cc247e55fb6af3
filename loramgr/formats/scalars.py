"""Single numbers that a format keeps as tensors (alpha), read without torch."""

from __future__ import annotations

import math
import struct

from loramgr.errors import IncompatibleError, IntegrityError
from loramgr.tensorfile import TensorView

__all__ = ["scalar"]

_CODES = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}


def scalar(view: TensorView) -> float:
    """Return the one number of the tensor.

    Raises IncompatibleError, naming it, for a tensor of several values or another dtype, and for NaN and infinities;
    IntegrityError when the file has become shorter.
    """
    spec = view.spec
    if spec.elements != 1:
        raise IncompatibleError(f"{spec.name} is {list(spec.shape)}, it must be a single number")
    value = _decoded(view)
    if not math.isfinite(value):
        raise IncompatibleError(f"{spec.name} is {value}, it must be a finite number")
    return value


def _decoded(view: TensorView) -> float:
    data, dtype = bytes(view.read_bytes()), view.spec.dtype
    if dtype == "BF16":
        data, dtype = b"\0\0" + data, "F32"
    if dtype not in _CODES:
        raise IncompatibleError(f"{view.spec.name} has the dtype {dtype}, not that of a number")
    try:
        return float(struct.unpack(f"<{_CODES[dtype]}", data)[0])
    except struct.error as error:
        raise IntegrityError(f"{view.spec.name}: its bytes are not one {dtype}") from error
