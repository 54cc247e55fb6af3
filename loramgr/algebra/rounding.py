"""Correct rounding to a stored dtype: once, to nearest, ties to even, from float64 or from exact values."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from loramgr.algebra.balls import Ball, U

__all__ = ["certify", "certify_single", "round_float64", "round_fraction"]

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


def certify(ball: Ball, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a ball to the dtype and say where the rounding is not yet decided.

    Returns the rounded tensor and a boolean tensor, True where the two ends of the ball round differently: there the
    result may be wrong. Elsewhere it is proved right, since rounding is monotone.
    """
    radius = ball.radius + ball.value.abs() * (2 * U)  # the two ends are rounded to float64 themselves
    low = round_float64(ball.value - radius, dtype)
    high = round_float64(ball.value + radius, dtype)
    return high, low.view(_BITS[dtype]) != high.view(_BITS[dtype])


def certify_single(value: torch.Tensor, radius: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `certify` does for a 16-bit dtype and a float32 ball, whose radius covers all but the roundings here.

    Both ends are moved outward by more than a float32 ulp. Were the float32 value nearest to the exact one a midpoint
    of the 16-bit grid (the only case in which rounding twice goes wrong), it would lie strictly between the two ends,
    and they would round apart. So equal ends prove the one correct rounding.
    """
    reach = value.abs().mul_(2.0**-21).add_(radius).add_(2.0**-147)
    low = (value - reach).to(dtype)
    high = reach.add_(value).to(dtype)
    return high, low.view(torch.int16) != high.view(torch.int16)
