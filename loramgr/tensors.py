"""Torch tensors from bytes and back, without copies and without numpy."""

from __future__ import annotations

import ctypes

import torch

from loramgr.errors import IncompatibleError
from loramgr.tensorfile import Data, TensorSpec

__all__ = ["as_bytes", "dtype_name", "from_bytes", "torch_dtype"]

_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for safetensors' spelling; IncompatibleError for one torch does not have."""
    try:
        return _TORCH_DTYPES[name]
    except KeyError:
        raise IncompatibleError(f"torch has no dtype {name}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' spelling of a torch dtype; IncompatibleError for one the format does not have."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise IncompatibleError(f"safetensors has no dtype for {dtype}") from None


def from_bytes(data: Data, spec: TensorSpec) -> torch.Tensor:
    """Return the tensor of the given dtype and shape that the bytes hold (row-major, little-endian).

    Memory that may be written to becomes the tensor's; other bytes are copied.
    """
    dtype = torch_dtype(spec.dtype)
    if not len(data):
        return torch.empty(spec.shape, dtype=dtype)
    # torch warns about memory that it could not write to
    writable = bytearray(data) if memoryview(data).readonly else data
    return torch.frombuffer(writable, dtype=dtype).reshape(spec.shape)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor as a view, valid as long as the tensor lives."""
    if not (tensor.is_contiguous() and tensor.device.type == "cpu"):
        raise ValueError("as_bytes needs a contiguous tensor on the CPU")
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    buffer = (ctypes.c_char * size).from_address(tensor.data_ptr())
    buffer._tensor = tensor  # type: ignore[attr-defined]  # keeps the memory alive with the view
    return memoryview(buffer).cast("B")
