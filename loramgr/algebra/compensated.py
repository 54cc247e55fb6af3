"""Inner products to twice float64's precision, with a bound that is zero when the result is exact.

Adapters in 16-bit floats put many merged weights exactly on a midpoint between two stored numbers. Deciding a tie
takes an exact sum, and error-free transformations (Dekker 1971; Ogita, Rump & Oishi, "Accurate sum and dot product",
2005) give it for millions of weights at once where rational arithmetic takes microseconds for each.
"""

from __future__ import annotations

import torch

from loramgr.algebra.rounding import round_float64

__all__ = ["decide", "dot", "split_product", "two_product", "two_sum"]

_SPLITTER = 2.0**27 + 1


def two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s = fl(a + b) and e with s + e = a + b exactly (Knuth)."""
    s = a + b
    virtual = s - a
    return s, (a - (s - virtual)) + (b - virtual)


def two_product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p = fl(a · b) and e with p + e = a · b exactly, barring underflow (Dekker, Veltkamp)."""
    p = a * b
    a_high, b_high = _high(a), _high(b)
    a_low, b_low = a - a_high, b - b_high
    return p, a_low * b_low - (((p - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _high(a: torch.Tensor) -> torch.Tensor:
    scaled = a * _SPLITTER
    return scaled - (scaled - a)


def split_product(factor: torch.Tensor, coefficient: float, other: float) -> tuple[list[torch.Tensor], bool]:
    """Return factor · coefficient · other as an unevaluated sum of float64 tensors, and whether it is exact."""
    single = torch.zeros((), dtype=torch.float64, device=factor.device)
    c, c_error = two_product(single + coefficient, single + other)
    high, low = two_product(factor.double(), c)
    parts = [high] + ([low] if bool(low.any()) else [])
    exact = not bool(c_error)
    return (parts if exact else [*parts, factor.double() * c_error]), exact


def dot(left: torch.Tensor, right: torch.Tensor, exact_factors: bool) -> tuple[torch.Tensor, ...]:
    """Return the inner products of the rows of two (k, r) float64 tensors as (value, error, bound), each (k,).

    The exact product lies within `bound` of value + error, |error| ≤ ½ulp(value). `exact_factors` False adds what
    factors rounded at the 2^-106 level may be off by.
    """
    products, errors = two_product(left, right)
    value = torch.zeros(left.shape[0], dtype=torch.float64, device=left.device)
    error, bound = torch.zeros_like(value), torch.zeros_like(value)
    for addend in (*products.unbind(1), *errors.unbind(1)):
        value, lost = two_sum(value, addend)
        error, lost_again = two_sum(error, lost)
        bound += lost_again.abs()
    value, error = two_sum(value, error)
    bound = bound * (1 + 2.0**-40)
    if not exact_factors:
        bound = bound + products.abs().sum(dim=1) * 2.0**-100
    return value, error, bound


def decide(
    value: torch.Tensor, error: torch.Tensor, bound: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round value + error to the dtype and say where the bound leaves it open; all (k,).

    float64 holds every midpoint of a narrower dtype, so only a value that is a midpoint itself needs the error: its
    sign breaks the tie, and a zero that is exact leaves a true tie, which goes to even.
    """
    if dtype == torch.float64:
        below, above = value + (error - 2 * bound), value + (error + 2 * bound)
        return value, (below != value) | (above != value)
    rounded = round_float64(value, dtype)
    distance = value - rounded.double()
    opposite = value + distance
    midpoint = (distance != 0) & (round_float64(opposite, dtype).double() == opposite)
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(torch.float64)
    nudged = round_float64(torch.nextafter(value, toward), dtype)
    result = torch.where(midpoint & (error != 0), nudged, rounded)
    unclear = midpoint & (bound != 0) & (bound >= error.abs())
    zero = (value == 0) & (bound != 0)
    return result, unclear | zero | ~rounded.isfinite()
