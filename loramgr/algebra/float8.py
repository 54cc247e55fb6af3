"""Weights of eight bits: every result rounded once, and alike in every version of torch, whose casts saturate or not.

A number goes to the nearest one of the dtype, ties to even, as if the exponent had no limit; what is then beyond the
largest finite number is infinite in float8_e5m2, and NaN in the dtypes without infinities (the overflow of OCP's OFP8
specification without saturation, and of the fnuz dtypes). The fnuz dtypes have no -0: what rounds to it is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loramgr.algebra.exact import merge_exact
from loramgr.algebra.terms import AddedTerm, DecomposedTerm, LowRankTerm, ReplacedTerm, Term

__all__ = ["FLOAT8", "largest", "merge_exact_float8", "round_float8", "round_float32"]


@dataclass(frozen=True, slots=True)
class _Format:
    """A dtype's fraction bits, bias, largest finite code, and the codes of overflow and NaN with their sign's bit."""

    fraction: int
    bias: int
    largest: int
    overflow: int
    nan: int
    signed_zero: bool


FLOAT8 = {
    torch.float8_e4m3fn: _Format(3, 7, 0x7E, 0x7F, 0x7F, signed_zero=True),
    torch.float8_e5m2: _Format(2, 15, 0x7B, 0x7C, 0x7F, signed_zero=True),
    torch.float8_e4m3fnuz: _Format(3, 8, 0x7F, 0x80, 0x80, signed_zero=False),
    torch.float8_e5m2fnuz: _Format(2, 16, 0x7F, 0x80, 0x80, signed_zero=False),
}
_SIGN = 0x80
_INFINITY = 0x7F800000  # of float32


def round_float32(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a float32 tensor to a float8 dtype once, to nearest, ties to even."""
    form = FLOAT8[dtype]
    bits = value.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    shift = 23 - form.fraction
    normal = (magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1) >> shift) - (
        (127 - form.bias) << form.fraction
    )
    # Beside this number, whose unit is the smallest subnormal, a sum is rounded to multiples of that.
    beside = 2.0 ** (24 - form.bias - form.fraction)
    near = magnitude.view(torch.float32).clamp(max=beside) + beside
    subnormal = near.view(torch.int32) - torch.tensor(beside).view(torch.int32).item()
    code = torch.where(magnitude < ((128 - form.bias) << 23), subnormal, normal)
    code = torch.where(code > form.largest, form.overflow, code)
    code = torch.where(magnitude > _INFINITY, form.nan, code)
    sign = (bits >> 24) & _SIGN
    code = code | (sign if form.signed_zero else torch.where(code == 0, 0, sign))
    return code.to(torch.uint8).view(dtype)


def largest(tensor: torch.Tensor) -> float:
    """Return the largest absolute value of a float8 tensor, NaN where there is a NaN, 0 for an empty tensor."""
    if not tensor.numel():
        return 0.0
    form = FLOAT8[tensor.dtype]
    bits = tensor.contiguous().view(torch.uint8)
    if form.nan == _SIGN and bool((bits == _SIGN).any()):
        return float("nan")
    return float((bits & 0x7F).amax().view(tensor.dtype).float())


def round_float8(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a tensor of any float dtype to a float8 dtype once."""
    near = value.float()
    tied = _midpoints(near, dtype)
    apart = torch.where(tied, value.double() - near.double(), 0)
    return _decided(near, apart, dtype)


def merge_exact_float8(weight: torch.Tensor, terms: Sequence[Term], *, by_column: bool = False) -> torch.Tensor:
    """Return what `merge_exact` does for a weight of a float8 dtype, in that dtype.

    The correctly rounded float32 value rounds to the same float8 number as the exact one, but where it is the midpoint
    of two of them; there the sign of the exact distance from the midpoint decides.
    """
    wide = weight.float()
    near = merge_exact(wide, terms, by_column=by_column)
    tied = _midpoints(near, weight.dtype)
    apart = torch.zeros(near.shape, dtype=torch.float64, device=near.device)
    if bool(tied.any()):
        # Norms run over rows or columns, so whole ones are computed again.
        lines = tied.any(dim=0 if by_column else 1).nonzero()[:, 0]
        place = (slice(None), lines) if by_column else (lines, slice(None))
        middle = torch.where(tied[place], near[place], 0).double()
        cut = [_cut(term, lines, by_column=by_column) for term in terms]
        away = ReplacedTerm(wide[place].double() - middle)
        apart[place] = merge_exact(wide[place], [*cut, away], dtype=torch.float64, by_column=by_column)
    return _decided(near, torch.where(tied, apart, 0), weight.dtype)


def _decided(near: torch.Tensor, apart: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 numbers, midpoints as if they were on the side of the numbers `apart`, 0 for a true tie."""
    side = torch.where(apart > 0, torch.inf, -torch.inf).float()
    return round_float32(torch.where(apart != 0, torch.nextafter(near, side), near), dtype)


def _midpoints(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return where float32 numbers are midpoints of two neighbours, the last one that of the largest and overflow."""
    form = FLOAT8[dtype]
    magnitude = value.contiguous().view(torch.int32) & 0x7FFFFFFF
    half = 1 << (22 - form.fraction)
    normal = (magnitude & (2 * half - 1)) == half
    halves = magnitude.view(torch.float32) * 2.0 ** (form.bias + form.fraction)
    return torch.where(magnitude < ((128 - form.bias) << 23), halves % 2 == 1, normal)


def _cut(term: Term, lines: torch.Tensor, *, by_column: bool) -> Term:
    """Return the term of some rows, or of some columns, of the weight."""
    match term:
        case LowRankTerm():
            return replace(term, right=term.right[:, lines]) if by_column else replace(term, left=term.left[lines])
        case ReplacedTerm() | AddedTerm():
            return replace(term, tensor=term.tensor[:, lines] if by_column else term.tensor[lines])
        case DecomposedTerm():
            start = None if term.start is None else term.start[lines]
            return replace(term, left=term.left[lines], magnitude=term.magnitude[lines], start=start)
