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
_SAFE = 2.0**900


def two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s = fl(a + b) and e with s + e = a + b exactly (Knuth); not finite where the sum overflows."""
    s = a + b
    virtual = s - a
    return s, (a - (s - virtual)) + (b - virtual)


def two_product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p = fl(a · b) and e with p + e = a · b exactly (Dekker, Veltkamp).

    e is NaN where factors or product are beyond 2^±900 (a factor 0 apart), since parts of it may not be exact there.
    """
    p = a * b
    a_high, b_high = _high(a), _high(b)
    a_low, b_low = a - a_high, b - b_high
    error = a_low * b_low - (((p - a_high * b_high) - a_low * b_high) - a_high * b_low)
    size = p.abs()
    inside = (size >= 1 / _SAFE) & (size <= _SAFE) & (a.abs() <= _SAFE) & (b.abs() <= _SAFE)
    zero = (p == 0) & ((a == 0) | (b == 0))
    return p, torch.where(inside, error, torch.where(zero, 0.0, torch.nan))


def _high(a: torch.Tensor) -> torch.Tensor:
    scaled = a * _SPLITTER
    return scaled - (scaled - a)


def split_product(factor: torch.Tensor, coefficient: float, other: float) -> tuple[list[torch.Tensor], bool]:
    """Return factor · coefficient · other as an unevaluated sum of float64 tensors, and whether it is exact.

    With coefficient · other = c + e, the third part factor · e is rounded, hence off by 2^-106·|factor · c| at most.
    """
    single = torch.zeros((), dtype=torch.float64, device=factor.device)
    c, c_error = two_product(single + coefficient, single + other)
    high, low = two_product(factor.double(), c)
    parts = [high] + ([low] if bool((low != 0).any()) else [])
    exact = not bool(c_error != 0)
    return (parts if exact else [*parts, factor.double() * c_error]), exact


def dot(addend: torch.Tensor, left: torch.Tensor, right: torch.Tensor, exact_factors: bool) -> tuple[torch.Tensor, ...]:
    """Return addend (k,) + the inner products of the rows of two (k, r) float64 tensors as (value, error, bound).

    All are (k,). The exact sum lies within `bound` of value + error, and value is value + error rounded to nearest.
    `exact_factors` False adds what factors rounded at the 2^-106 level may be off by. Not finite where float64's range
    does not do.
    """
    products, errors = two_product(left.T, right.T)
    value, lost = _sum(torch.cat([addend[None], products, errors]))
    error, lost_again = _sum(lost)
    value, error = two_sum(value, error)
    bound = lost_again.abs().sum(dim=0) * (1 + 2.0**-20)
    if not exact_factors:
        bound = bound + products.abs().sum(dim=0) * 2.0**-100
    return value, error, bound


def _sum(addends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s (k,) and errors (q, k), q ≥ 1, whose sum is the sum of the addends (p, k) exactly; pairwise."""
    lost = [torch.zeros_like(addends[:1])]
    while addends.shape[0] > 1:
        half = addends.shape[0] // 2
        sums, errors = two_sum(addends[:half], addends[half : 2 * half])
        lost.append(errors)
        addends = torch.cat([sums, addends[2 * half :]])
    return addends[0], torch.cat(lost)


def decide(
    value: torch.Tensor, error: torch.Tensor, bound: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round what `dot` returned to the dtype and say where the bound leaves it open; all (k,).

    float64: the value is the result when bound is 0, and when adding either end of the error gives it back.

    Narrower dtypes: |error| is at most half the distance from value to the next float64 number, which is 2^-53·|value|
    or more. With bound ≤ 2^-56·|value| the exact sum lies strictly between the value's two neighbours. float64 holds
    every midpoint of a narrower dtype, so only a value that is a midpoint itself needs the error: its sign breaks the
    tie where it exceeds the bound, and an exact zero leaves a true tie, which goes to even.
    """
    if dtype == torch.float64:
        reach = error.abs() * 2.0**-50 + 2 * bound
        same = (value + (error - reach) == value) & (value + (error + reach) == value)
        signed = (value != 0) | (bound == 0)
        return value, ~((same | (bound == 0)) & signed & value.isfinite())
    rounded = round_float64(value, dtype)
    distance = value - rounded.double()
    opposite = value + distance
    midpoint = (distance != 0) & (round_float64(opposite, dtype).double() == opposite)
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(torch.float64)
    nudged = round_float64(torch.nextafter(value, toward), dtype)
    result = torch.where(midpoint & (error != 0), nudged, rounded)
    tied = midpoint & (bound != 0) & (bound >= error.abs())
    sharp = (bound == 0) | (bound <= value.abs() * 2.0**-56)
    return result, tied | ~sharp | ~rounded.isfinite()
