"""Residuals: what turns a candidate for a weight back into the weight, bit for bit.

A merge M = round(W + D) loses a few low bits of W, and round(M - D), the candidate, is W again for most weights only.
The residual says where it is not. Seen as integers, the bits of W and of the candidate mostly differ by 0 or ±1, so
each weight has a code of two bits, sixteen to a word: 0 = the candidate is right, 1 = its bits + 1 (the next number
away from zero), 2 = its bits - 1 (toward zero), 3 = escaped: the weight is listed by its place and all of its bits.
Nothing depends on what the numbers mean, so NaN payloads, infinities, signed zeros and subnormals come back too.
`docs/residual.md` derives the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from loramgr.errors import IncompatibleError

__all__ = [
    "BITS",
    "PER_WORD",
    "Origin",
    "Residual",
    "code_words",
    "codes_of",
    "concatenate",
    "decode",
    "encode",
    "may_undo",
    "tile_rows",
]

BITS = {
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
PER_WORD = 16
ESCAPED = 3
_TILE = {"cpu": 1 << 18, "cuda": 1 << 26}  # elements: the caches of a core, and enough to fill a GPU


@dataclass(frozen=True, slots=True)
class Origin:
    """Which computation made a candidate: only the very same one makes it again.

    `numerics` is "exact" or "fast", `version` counts changes of its bits, `device` says where the bits hold: "any"
    where they are the same everywhere, else the kind of device and compiler.
    """

    numerics: str
    version: int
    device: str


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual of one weight, on any device.

    `shape` and `dtype` are the weight's, which counts as (rows, columns): the last dimension and all before it.
    `codes` is int32 (rows, ceil(columns / 16)), the code of column 16·w + i in the bits 2i and 2i + 1 of word w;
    `positions` int64 (k,) holds the flat indices of the escaped weights, ascending, `values` (k,) their bits as signed
    integers of the weight's width. `origin` is None where nobody recorded it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    origin: Origin | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the residual takes."""
        return sum(part.numel() * part.element_size() for part in (self.codes, self.positions, self.values))

    def to(self, device: torch.device) -> Residual:
        """Return the residual on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("codes", "positions", "values")}
        return replace(self, **parts)

    def rows(self, rows: slice) -> Residual:
        """Return the residual of the rows start to stop (both given) of a two-dimensional weight."""
        columns = self.shape[1]
        bounds = torch.tensor([rows.start * columns, rows.stop * columns], device=self.positions.device)
        start, stop = torch.searchsorted(self.positions, bounds).tolist()
        positions = self.positions[start:stop] - rows.start * columns
        shape = (rows.stop - rows.start, columns)
        return Residual(shape, self.dtype, self.codes[rows], positions, self.values[start:stop], self.origin)


def may_undo(origin: Origin | None, here: Origin) -> bool:
    """Say whether what computes here is what made the residual; if not, only the weight's digest proves the result."""
    return origin == here


def tile_rows(weight: torch.Tensor) -> int:
    """Return how many rows of a two-dimensional tensor are worked on at once."""
    tile = _TILE.get(weight.device.type, _TILE["cpu"])
    return max(1, tile // max(1, weight.shape[1]))


def encode(weight: torch.Tensor, candidate: torch.Tensor, origin: Origin | None = None) -> Residual:
    """Return the residual that turns the candidate into the weight: same shape, dtype and device, any strides.

    Weights whose candidate is NaN are escaped, since NaNs come out of one computation with different payloads.
    Raises IncompatibleError for tensors that differ in shape or dtype, or whose dtype is no float of 8 to 64 bits.
    """
    _check_pair(weight.shape, weight.dtype, candidate)
    bits, near = _rows(weight), _rows(candidate)
    step = tile_rows(bits)
    starts = range(0, max(1, bits.shape[0]), step)
    parts = [_encode(bits[start : start + step], near[start : start + step]) for start in starts]
    return replace(concatenate(parts), shape=tuple(weight.shape), origin=origin)


def decode(candidate: torch.Tensor, residual: Residual) -> torch.Tensor:
    """Return the weight, contiguous, on the candidate's device; the candidate stays as it is.

    Raises IncompatibleError for a candidate of another shape or dtype than the residual's.
    """
    _check_pair(residual.shape, residual.dtype, candidate)
    residual = residual.to(candidate.device)
    weight = torch.empty(residual.shape, dtype=candidate.dtype, device=candidate.device)
    result, near = _rows(weight).view(BITS[candidate.dtype]), _rows(candidate).view(BITS[candidate.dtype])
    step = tile_rows(result)
    for start in range(0, result.shape[0], step):
        rows = slice(start, start + step)
        codes = codes_of(residual.codes[rows], result.shape[1])
        shift = (codes == 1).to(result.dtype) - (codes == 2).to(result.dtype)
        torch.add(near[rows], shift, out=result[rows])
    result.view(-1)[residual.positions] = residual.values
    return weight


def concatenate(parts: Sequence[Residual]) -> Residual:
    """Return the residual of two-dimensional weights of one dtype and width, laid one below the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.shape[0])
    positions = [part.positions + start * first.shape[1] for part, start in zip(parts, starts, strict=False)]
    codes, values = torch.cat([part.codes for part in parts]), torch.cat([part.values for part in parts])
    return Residual((starts[-1], first.shape[1]), first.dtype, codes, torch.cat(positions), values, first.origin)


def codes_of(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the codes (rows, columns) as uint8 out of their int32 words (rows, ceil(columns / 16))."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=words.device)
    octets = words.contiguous().view(torch.uint8)
    codes = octets[:, :, None].bitwise_right_shift(shifts).bitwise_and_(3)
    return codes.view(words.shape[0], words.shape[1] * PER_WORD)[:, :columns]


def code_words(codes: torch.Tensor) -> torch.Tensor:
    """Return the int32 words (rows, ceil(columns / 16)) of codes (rows, columns) in uint8; spare bits are 0."""
    rows, columns = codes.shape
    words = -(-columns // PER_WORD)
    padded = torch.nn.functional.pad(codes, (0, words * PER_WORD - columns)).view(rows, words * 4, 4)
    octets = padded[:, :, 0].clone(memory_format=torch.contiguous_format)
    for place in (1, 2, 3):
        octets |= padded[:, :, place] << (2 * place)
    return octets.view(-1).view(torch.int32).view(rows, words)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as (rows, columns), a view where its strides allow one."""
    return tensor if tensor.dim() == 2 else tensor.reshape(prod(tensor.shape[:-1]), *(tensor.shape[-1:] or (1,)))


def _encode(weight: torch.Tensor, candidate: torch.Tensor) -> Residual:
    bits = weight.view(BITS[weight.dtype])
    difference = bits - candidate.view(BITS[weight.dtype])
    codes = torch.full(difference.shape, ESCAPED, dtype=torch.uint8, device=weight.device)
    for step, code in ((0, 0), (1, 1), (-1, 2)):
        codes.masked_fill_(difference == step, code)
    codes.masked_fill_(candidate.isnan(), ESCAPED)
    positions = (codes == ESCAPED).reshape(-1).nonzero()[:, 0]
    values = bits.reshape(-1)[positions]
    return Residual((weight.shape[0], weight.shape[1]), weight.dtype, code_words(codes), positions, values)


def _check_pair(shape: Sequence[int], dtype: torch.dtype, candidate: torch.Tensor) -> None:
    if dtype not in BITS:
        raise IncompatibleError(f"there are no residuals of {dtype} tensors")
    if tuple(shape) != tuple(candidate.shape) or dtype != candidate.dtype:
        described = f"a {candidate.dtype} tensor of shape {tuple(candidate.shape)}"
        raise IncompatibleError(f"the residual of a {dtype} tensor of shape {tuple(shape)} does not fit {described}")
