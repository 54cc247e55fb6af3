"""Residuals as a few tensors of bytes that a safetensors file holds, compressed, and checked when they are read.

Four uint8 tensors: `about` is RFC 8785 JSON (shape, dtype, origin, the number of escaped weights and a digest), the
others are zlib streams of little-endian integers: the code words, the gaps between positions (the first counts from
-1), and the bits of the escaped weights. Gaps are laid out by byte, lowest bytes first, since most high ones are 0.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from loramgr.algebra.residual import BITS, ESCAPED, PER_WORD, Origin, Residual, codes_of, tile_rows
from loramgr.digests import canonical_json
from loramgr.errors import IntegrityError, LoramgrError
from loramgr.tensors import as_bytes, dtype_name, torch_dtype

__all__ = ["pack", "unpack"]

_SCHEMA = 1
_PARTS = ("codes", "gaps", "values")
_LEVEL = 1  # the codes are too even for a higher one to gain more than a tenth
_LARGEST = 1 << 62


def pack(residual: Residual) -> dict[str, torch.Tensor]:
    """Return the residual as uint8 tensors on the CPU; equal residuals give equal bytes with one version of zlib."""
    residual = residual.to(torch.device("cpu"))
    parts: dict[str, bytes | memoryview] = {
        "codes": _bytes(residual.codes),
        "gaps": _gaps(residual.positions),
        "values": _bytes(residual.values),
    }
    origin = residual.origin
    about = {
        "schema": _SCHEMA,
        "shape": list(residual.shape),
        "dtype": dtype_name(residual.dtype),
        "origin": None if origin is None else [origin.numerics, origin.version, origin.device],
        "escaped": residual.positions.numel(),
    }
    about["sha256"] = _digest(about, parts)
    packed = {name: zlib.compress(data, _LEVEL) for name, data in parts.items()}
    return {name: _tensor(data) for name, data in {"about": canonical_json(about), **packed}.items()}


def unpack(tensors: Mapping[str, torch.Tensor]) -> Residual:
    """Return the residual, on the CPU, that `pack` made the tensors of; IntegrityError where that cannot be."""
    try:
        return _unpack({name: bytes(_bytes(tensors[name])) for name in ("about", *_PARTS)})
    except (KeyError, ValueError, TypeError, zlib.error, LoramgrError) as error:
        raise IntegrityError(f"the residual is damaged: {error}", "restore the base's tensor instead") from error


def _unpack(data: Mapping[str, bytes]) -> Residual:
    about = json.loads(data["about"])
    sha256 = about.pop("sha256")
    shape, dtype, origin, escaped = _described(about)
    columns = shape[-1] if shape else 1
    rows = prod(shape[:-1])
    words = -(-columns // PER_WORD)
    lengths = (rows * words * 4, escaped * 8, escaped * BITS[dtype].itemsize)
    parts = {name: _inflated(data[name], length) for name, length in zip(_PARTS, lengths, strict=True)}
    if _digest(about, parts) != sha256:
        raise IntegrityError("its digest does not match")
    codes = _integers(parts["codes"], torch.int32).view(rows, words)
    positions = _positions(parts["gaps"])
    _check_escapes(codes, positions, columns)
    return Residual(shape, dtype, codes, positions, _integers(parts["values"], BITS[dtype]), origin)


def _described(about: dict[str, Any]) -> tuple[tuple[int, ...], torch.dtype, Origin | None, int]:
    """Read and check the description but for its digest."""
    if set(about) != {"schema", "shape", "dtype", "origin", "escaped"} or about["schema"] != _SCHEMA:
        raise IntegrityError("its description is not one of this version")
    shape, escaped, dtype = tuple(about["shape"]), about["escaped"], torch_dtype(about["dtype"])
    sizes = (*shape, escaped)
    if not all(type(size) is int and 0 <= size < _LARGEST for size in sizes) or dtype not in BITS:
        raise IntegrityError("its description makes no sense")
    if escaped > prod(shape) or prod(shape) >= _LARGEST:
        raise IntegrityError("it lists more weights than there are")
    origin = about["origin"]
    return shape, dtype, None if origin is None else _origin(*origin), escaped


def _origin(numerics: str, version: int, device: str) -> Origin:
    if not (isinstance(numerics, str) and type(version) is int and isinstance(device, str)):
        raise IntegrityError("its origin makes no sense")
    return Origin(numerics, version, device)


def _check_escapes(codes: torch.Tensor, positions: torch.Tensor, columns: int) -> None:
    """Raise IntegrityError unless the positions are exactly the places of code 3, and the spare codes are 0."""
    padded = codes.shape[1] * PER_WORD
    step = tile_rows(codes) // PER_WORD + 1
    found = 0
    for start in range(0, codes.shape[0], step):
        every = codes_of(codes[start : start + step], padded)
        places = (every[:, :columns] == ESCAPED).reshape(-1).nonzero()[:, 0] + start * columns
        if bool(every[:, columns:].any()) or not torch.equal(positions[found : found + places.numel()], places):
            raise IntegrityError("its codes and its list of weights contradict each other")
        found += places.numel()
    if found != positions.numel():
        raise IntegrityError("its codes and its list of weights contradict each other")


def _digest(about: Mapping[str, Any], parts: Mapping[str, bytes | memoryview]) -> str:
    digest = hashlib.sha256(canonical_json(dict(about)))
    for name in _PARTS:  # their lengths follow from the description
        digest.update(parts[name])
    return digest.hexdigest()


def _gaps(positions: torch.Tensor) -> bytes:
    gaps = torch.diff(positions, prepend=torch.tensor([-1]))
    return bytes(as_bytes(gaps.view(torch.uint8).view(-1, 8).T.contiguous()))


def _positions(data: bytes) -> torch.Tensor:
    gaps = _integers(data, torch.uint8).view(8, -1).T.contiguous().view(-1).view(torch.int64)
    return gaps.cumsum(0) - 1


def _inflated(data: bytes, length: int) -> bytes:
    """Return the bytes of a zlib stream that has to hold just this many, without ever making more of them."""
    stream = zlib.decompressobj()
    found = stream.decompress(data, length + 1)
    if len(found) != length or not stream.eof or stream.unused_data:
        raise IntegrityError(f"a part is not the {length} bytes that it should be")
    return found


def _bytes(tensor: torch.Tensor) -> memoryview:
    return as_bytes(tensor.contiguous())


def _integers(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _tensor(data: bytes) -> torch.Tensor:
    return _integers(data, torch.uint8)
