"""Correct rounding to a stored dtype: once, to nearest, ties to even, from float64 or from exact values."""

from __future__ import annotations

import math
from fractions import Fraction
from math import isfinite
from struct import pack, unpack

import torch

from loramgr.algebra.balls import SLACK, Ball, U
from loramgr.algebra.scratch import Scratch

__all__ = ["HALVES", "certify", "round_float64", "round_fraction", "screen"]

HALVES = (torch.float16, torch.bfloat16)
# dtype → (bits of precision, exponent of the smallest subnormal, largest finite value)
_FORMATS = {
    torch.float64: (53, -1074, torch.finfo(torch.float64).max),
    torch.float32: (24, -149, torch.finfo(torch.float32).max),
    torch.float16: (11, -24, torch.finfo(torch.float16).max),
    torch.bfloat16: (8, -133, torch.finfo(torch.bfloat16).max),
}
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
_FOLDS = 4


def round_float64(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a float64 tensor to float64, float32, float16 or bfloat16 once.

    Torch's own cast to a 16-bit dtype rounds twice, through float32. Here float32 is reached by rounding to odd, after
    which the second rounding is right (Boldo & Melquiond, "When double rounding is odd", 2005).
    """
    if dtype in (torch.float64, torch.float32):
        return value.to(dtype)
    near = value.to(torch.float32)
    back = near.to(torch.float64)
    even = (near.view(torch.int32) & 1) == 0
    inexact = (back != value) & near.isfinite()
    toward = torch.where(value > back, math.inf, -math.inf).to(torch.float32)
    odd = torch.where(inexact & even, torch.nextafter(near, toward), near)
    return odd.to(dtype)


def round_fraction(value: Fraction, dtype: torch.dtype) -> float:
    """Round an exact value to the nearest number of the dtype, ties to even; too large ones become infinite."""
    precision, smallest, largest = _FORMATS[dtype]
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    quantum = max(exponent - precision + 1, smallest)
    rounded = round(magnitude / Fraction(2) ** quantum) * Fraction(2) ** quantum
    result = math.inf if rounded > Fraction(largest) else float(rounded)
    return math.copysign(result, 1 if value > 0 else -1)


def certify(ball: Ball, result: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Round a ball into `result`; return the places, in ascending row-major order, that are left open.

    Places are open where the two ends of the ball round differently, in the sign of a zero too, or are not finite.
    Elsewhere the result is proved right, since rounding is monotone. The ends are rounded to float64 themselves, by
    U·(|value| + reach) at most: 4·U·|value| and the slack of the radius cover it.
    """
    reach, end = (scratch.take(slot, result, torch.float64) for slot in ("reach", "end"))
    torch.add(ball.radius * SLACK, torch.abs(ball.value, out=end), alpha=ball.relative * SLACK + 4 * U, out=reach)
    low = scratch.take("low", result, result.dtype)
    _round_into(low, torch.sub(ball.value, reach, out=end))
    _round_into(result, torch.add(ball.value, reach, out=end))
    return _open(low, result, reach, scratch)


def screen(
    value: torch.Tensor, radius: torch.Tensor, relative: float, result: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    """Do what `certify` does for a 16-bit dtype in float32, at a fraction of the cost; more places are left open.

    `value` is a ball's, rounded to float32 and contiguous; it is overwritten. The bound is that of the ball.
    """
    if result.dtype == torch.bfloat16:
        places = _near_midpoints(value, radius, relative, result, scratch)
        if places is not None:
            return places
    return _by_both_ends(value, radius, relative, result, scratch)


def _near_midpoints(
    value: torch.Tensor, radius: torch.Tensor, relative: float, result: torch.Tensor, scratch: Scratch
) -> torch.Tensor | None:
    """Round to bfloat16 and leave open what is near a midpoint; None where a value is too small or large to go by that.

    Let U be the distance of float32 numbers in the value's binade. The value is off by U/2 through its own rounding to
    float32, by relative · |value| ≤ 2^-32 · |value| < U/256, and by a radius that is below U for values of at least
    2^24 · radius: by less than 2·U. All midpoints of bfloat16 are float32 numbers that end with the 16 bits 0x8000, so
    there is none within 2·U (four numbers, where U halves below) of one that ends with others than 0x7FF8 to 0x8007.
    """
    result.copy_(value)
    magnitude = torch.bitwise_and(result.view(torch.int16), 0x7FFF, out=scratch.take("magnitude", result, torch.int16))
    small, large = (_of_bits(int(bits)) for bits in magnitude.aminmax())
    least = max(float(radius.max()) * 2.0**24, 2.0**-125)
    if not (relative <= 2.0**-32 and small >= 2 * least and isfinite(large)):
        return None
    return _zeros(value.view(torch.int32).add_(0x8008).bitwise_and_(0xFFF0), scratch)


def _of_bits(bits: int) -> float:
    """Return the bfloat16 of these bits."""
    value: float = unpack("<f", pack("<I", bits << 16))[0]
    return value


def _by_both_ends(
    value: torch.Tensor, radius: torch.Tensor, relative: float, result: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    """Round both ends of the ball, in float32, and leave open where they differ.

    With u = 2^-24: the value's own rounding to float32 is off by u·|value|, and so are the ends by u·(|value| + reach).
    The 4·u·|value| and the slack of the radius cover both; 2^-140 covers what is lost among float32's subnormals. Both
    ends are float32 numbers, which torch casts to 16 bits with a single rounding.
    """
    reach, end = (scratch.take(slot, result, torch.float32) for slot in ("reach", "end"))
    radius = (radius * (1 + 2.0**-20) + 2.0**-140).float()
    torch.add(radius, torch.abs(value, out=end), alpha=relative + 2.0**-22, out=reach)
    low = scratch.take("low", result, result.dtype)
    low.copy_(torch.sub(value, reach, out=end))
    result.copy_(torch.add(value, reach, out=end))
    return _open(low, result, reach, scratch)


def _round_into(result: torch.Tensor, value: torch.Tensor) -> None:
    result.copy_(round_float64(value, result.dtype) if result.dtype in HALVES else value)


def _open(low: torch.Tensor, high: torch.Tensor, reach: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return the places where the ends differ or the reach is not finite; a sum tells cheaply that none is such."""
    places = _differing(low, high, scratch)
    if bool(reach.sum().isfinite()):
        return places
    differing = torch.zeros(reach.numel(), dtype=torch.bool, device=reach.device)
    differing[places] = True
    return (differing | ~reach.flatten().isfinite()).nonzero()[:, 0]


def _differing(low: torch.Tensor, high: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return the places, in ascending order, where the bits of two contiguous tensors differ; `low` is overwritten."""
    bits = low.view(_BITS[low.dtype]).flatten().bitwise_xor_(high.view(_BITS[low.dtype]).flatten())
    per_word = 8 // bits.element_size()
    words = _lines(bits, per_word, 0).view(torch.int64)
    hits = _folded(words, scratch).nonzero()[:, 0]
    if not hits.numel():
        return hits
    line, item = words[:, hits].view(bits.dtype).nonzero().unbind(1)
    word = line * words.shape[1] + hits[item.div(per_word, rounding_mode="floor")]
    return (word * per_word + item % per_word).sort().values


def _zeros(numbers: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return the places, in ascending order, where a contiguous tensor of integers from 0 upwards is zero."""
    lines = _lines(numbers.flatten(), 1, 1)
    least = torch.amin(lines, dim=0, out=scratch.take("least", lines[0], lines.dtype))
    hits = (least == 0).nonzero()[:, 0]
    line, item = (lines[:, hits] == 0).nonzero().unbind(1)
    return (line * lines.shape[1] + hits[item]).sort().values


def _lines(items: torch.Tensor, multiple: int, filling: int) -> torch.Tensor:
    """Return the items as 16 lines, their length a multiple of the given one, the last filled up if need be."""
    padding = -items.numel() % (multiple << _FOLDS)
    filled = torch.nn.functional.pad(items, (0, padding), value=filling) if padding else items
    return filled.view(1 << _FOLDS, -1)


def _folded(lines: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return 16 lines or-ed into one: to look at every item costs more than all of the arithmetic on it."""
    upper, lower = lines.chunk(2)
    folded = torch.bitwise_or(upper, lower, out=scratch.take("folded", upper, lines.dtype))
    while folded.shape[0] > 1:
        upper, lower = folded.chunk(2)
        folded = torch.bitwise_or(upper, lower, out=upper)
    return folded[0]
