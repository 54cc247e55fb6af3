"""What turns one tensor into another of its shape and dtype, bit for bit, in few bytes where the two are close.

The bits of both are integers; their difference, folded so that small ones of either sign are small (zigzag), is laid
out by byte, the lowest bytes first, and each layer is one zlib stream: of close values the high bytes are nearly all 0.
Unlike a residual (`loramgr.algebra.residual`), it does not count on differences of one step.
"""

from __future__ import annotations

import struct
import zlib

import torch

from loramgr.algebra.residual import BITS
from loramgr.errors import IntegrityError
from loramgr.tensors import as_bytes

__all__ = ["packed_difference", "with_difference"]

_LEVEL = 1


def packed_difference(wanted: torch.Tensor, candidate: torch.Tensor) -> bytes:
    """Return the bytes with which `with_difference` makes `wanted` of the candidate; both on the CPU, contiguous."""
    integer = BITS[wanted.dtype]
    difference = wanted.reshape(-1).view(integer) - candidate.reshape(-1).view(integer)
    folded = (difference << 1) ^ (difference >> (integer.itemsize * 8 - 1))
    layers = folded.view(torch.uint8).view(-1, integer.itemsize).T
    streams = [zlib.compress(as_bytes(layer.contiguous()), _LEVEL) for layer in layers]
    return struct.pack(f"<{len(streams)}Q", *map(len, streams)) + b"".join(streams)


def with_difference(candidate: torch.Tensor, packed: bytes) -> torch.Tensor:
    """Return the tensor that the difference was packed for; IntegrityError for bytes that cannot be such.

    That it is the right one only its digest proves.
    """
    integer = BITS[candidate.dtype]
    count, begin = candidate.numel(), 8 * integer.itemsize
    folded = torch.empty(count, integer.itemsize, dtype=torch.uint8)
    try:
        for place, length in enumerate(struct.unpack_from(f"<{integer.itemsize}Q", packed)):
            layer = _inflated(packed[begin : begin + length], count)
            folded[:, place] = (
                torch.frombuffer(layer, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
            )
            begin += length
    except (struct.error, zlib.error) as error:
        raise IntegrityError(f"the remainder is damaged: {error}", "loramgr verify") from error
    codes = folded.view(-1).view(integer)
    # an arithmetic shift brings the sign in from the left, which the mask takes out again
    difference = ((codes >> 1) & torch.iinfo(integer).max) ^ -(codes & 1)
    bits = candidate.reshape(-1).view(integer) + difference
    return bits.view(candidate.dtype).view(candidate.shape)


def _inflated(stream: bytes, count: int) -> bytearray:
    """Return the bytes of a stream that has to hold just so many, without ever making more of them."""
    inflater = zlib.decompressobj()
    layer = bytearray(inflater.decompress(stream, count + 1))
    if len(layer) != count or not inflater.eof or inflater.unused_data:
        raise IntegrityError("the remainder is damaged: it is of another tensor", "loramgr verify")
    return layer
