"""Merges made to lose as much as they can, and the bound of `loramgr.algebra.fast` in rationals, for its tests."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import strategies as st

from loramgr.algebra.factors import Factors
from loramgr.algebra.float8 import FLOAT8, round_float8
from loramgr.algebra.residual import BITS

__all__ = ["cases", "exceeding"]

U = Fraction(1, 1 << 24)
_UNDERFLOW = Fraction(1, 1 << 149)  # more than what a rounding among float32's subnormals loses
_LAST = 2.0**-23
# numbers whose products and sums are rounded by nearly half an ulp at the bottom of a binade, and some plain ones
_PARTS = [1 + _LAST, 1 + 3 * _LAST, 1 + 2049 * _LAST, 1 + 4097 * _LAST, 2 - _LAST, 1.0038986206054688, 1.5, 1.0, 1 / 3]
_SCALINGS = [1.0, 1 + 0.49 * _LAST, 1 + 1.49 * _LAST, -1.3, 2 - 0.3 * _LAST, 0.1, 2.0**-130 * 1.1]


@st.composite
def cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int], ranks: tuple[int, ...]
) -> tuple[torch.Tensor, Factors]:
    """Draw a weight of one of the dtypes, mostly near -D, and factors, some of whose products nearly cancel."""
    dtype, rank = draw(st.sampled_from(dtypes)), draw(st.sampled_from(ranks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))

    def factor(rows: int, columns: int) -> torch.Tensor:
        parts = torch.tensor(_PARTS, dtype=torch.float64).float()
        chosen = parts[torch.randint(len(parts), (rows, columns), generator=generator)]
        signs = torch.randint(2, (rows, columns), generator=generator) * 2 - 1
        exponents = torch.randint(-draw(st.sampled_from([0, 2, 12])) - 1, 1, (rows, columns), generator=generator)
        return chosen * signs * torch.exp2(exponents.float())

    left, right = factor(shape[0], rank), factor(rank, shape[1])
    if rank > 1 and draw(st.booleans()):
        half = rank // 2
        left[:, half : 2 * half] = -left[:, :half]
        right[half : 2 * half] = right[:half] * (1 + draw(st.integers(0, 3)) * _LAST)
    scaling = draw(st.sampled_from(_SCALINGS))
    delta = scaling * (left.double() @ right.double())
    near = -delta * draw(st.sampled_from([1.0, 1 + 2.0**-9, 0.5, 0.0]))
    weight = round_float8(near, dtype) if dtype in FLOAT8 else near.to(dtype)
    return weight, Factors(left, right, scaling)


def exceeding(weight: torch.Tensor, factors: Factors, merged: torch.Tensor) -> list[tuple[int, int]]:
    """Return the places where the merged weight is further from the exact one than docs/residual.md derives."""
    half = ((merged.view(BITS[merged.dtype]) + 1).view(merged.dtype).double() - merged.double()).abs() / 2
    places = (half.isfinite() & merged.float().isfinite()).nonzero().tolist()
    return [
        (row, column)
        for row, column in places
        if _error(weight, factors, merged, row, column) > _bound(factors, merged, half, row, column)
    ]


def _terms(factors: Factors, row: int, column: int) -> list[Fraction]:
    pairs = zip(factors.left[row].tolist(), factors.right[:, column].tolist(), strict=True)
    return [Fraction(factors.scaling) * Fraction(left) * Fraction(right) for left, right in pairs]


def _error(weight: torch.Tensor, factors: Factors, merged: torch.Tensor, row: int, column: int) -> Fraction:
    exact = Fraction(weight[row, column].item()) + sum(_terms(factors, row, column), Fraction(0))
    return abs(Fraction(merged[row, column].item()) - exact)


def _bound(factors: Factors, merged: torch.Tensor, half: torch.Tensor, row: int, column: int) -> Fraction:
    size = sum(map(abs, _terms(factors, row, column)), Fraction(0))
    delta = U * (1 + 2 * U) * (factors.rank + 2) * size
    lost = _UNDERFLOW * (1 + factors.rank * (1 + Fraction(abs(factors.scaling))))
    last = Fraction(half[row, column].item())
    value = abs(Fraction(merged[row, column].item()))
    stored = Fraction(0) if merged.dtype == torch.float32 else U * (value or last)
    return last + stored + delta + lost
