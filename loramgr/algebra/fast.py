"""The fast numerics in plain torch: the delta in float32, one rounding to the weight's dtype.

With D = scaling · left @ right as `delta` computes it, a merge stores M = round(W + D) and its undoing starts from the
candidate round(M - D); sums and differences are float32. D has to have the same bits in both, so it is no matrix
product: the bits of `addmm` change with tiles, transposition and thread count. It is a sum over the rank in ascending
order, each product and each sum rounded on its own, which IEEE 754 fixes on every device.

Error, with u = 2^-24: |M - exact| ≤ ½ulp(M) + u·(|M| + (r + 2)·Σ|scaling · left · right|), while no product leaves
float32's normal range; for a float32 weight ½ulp(M) alone stands for |M| too. The r + 2 are one rounding for each rank
and two of the scaling. docs/residual.md derives it, with what it leaves out: a factor 1 + 2u of the r + 2, and half an
ulp instead of |M| where M is 0. float8 results are rounded by `float8`, which no version of torch changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loramgr.algebra.factors import Factors
from loramgr.algebra.float8 import FLOAT8, round_float32
from loramgr.algebra.residual import Origin, tile_rows
from loramgr.errors import IncompatibleError

__all__ = ["FAST", "WEIGHT_DTYPES", "check", "delta", "merge", "recover"]

FAST = Origin("fast", 1, "any")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *FLOAT8)


def delta(factors: Factors) -> torch.Tensor:
    """Return scaling · left @ right, (m, n) in float32, on the factors' device."""
    total = torch.zeros(factors.shape, dtype=torch.float32, device=factors.left.device)
    product = torch.empty_like(total)
    left, right = factors.left.float(), factors.right.float()
    for place in range(factors.rank):
        # `addcmul` and fused multiply-add would round once where other devices round twice.
        torch.mul(left[:, place, None], right[place], out=product)
        total.add_(product)
    return total.mul_(torch.tensor(factors.scaling, dtype=torch.float32).item())


def merge(weight: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Return round(W + D), contiguous; the weight is (m, n), of any strides.

    Raises IncompatibleError where `check` does.
    """
    return _by_tiles(weight, factors, torch.add)


def recover(merged: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Return round(M - D), the candidate that a residual turns into the weight again; as `merge`."""
    return _by_tiles(merged, factors, torch.sub)


def check(weight: torch.Tensor, factors: Factors) -> None:
    """Raise IncompatibleError unless the fast numerics apply these factors to this weight."""
    if weight.dtype not in WEIGHT_DTYPES:
        raise IncompatibleError(f"the fast numerics do not merge into {weight.dtype}", "use the exact numerics")
    if tuple(weight.shape) != factors.shape:
        raise IncompatibleError(f"a delta of shape {factors.shape} does not fit a weight of {tuple(weight.shape)}")


def _by_tiles(weight: torch.Tensor, factors: Factors, combine: Callable[..., torch.Tensor]) -> torch.Tensor:
    check(weight, factors)
    factors = factors.to(weight.device)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    step = tile_rows(weight)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        wide = combine(weight[rows].float(), delta(factors.rows(rows)))
        result[rows] = round_float32(wide, weight.dtype) if weight.dtype in FLOAT8 else wide.to(weight.dtype)
    return result
