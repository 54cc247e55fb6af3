"""The exact merge: every weight is the correctly rounded value of W + Σ E(W), on any device, in any tiling.

Four passes, each over what the one before it could not decide: float32 with an error bound (16-bit weights and
low-rank terms only), float64 with an error bound, compensated sums for ties, and rational arithmetic for single
entries. The bits depend on the inputs alone, because what is stored is proved to be the one correct rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramgr.algebra.balls import Ball, product, root_of_squares
from loramgr.algebra.compensated import decide, dot
from loramgr.algebra.rounding import certify, certify_single
from loramgr.algebra.stack import Stack, inner
from loramgr.algebra.terms import DecomposedTerm, LowRankTerm, ReplacedTerm, Term, transposed
from loramgr.algebra.witness import Witness

__all__ = ["merge_exact"]

TILE = 1 << 19  # elements: a float64 tile and its temporaries stay in the caches of a core
_GATHER = 1 << 17  # undecided entries settled at once
_HALF = (torch.float16, torch.bfloat16)


def merge_exact(
    weight: torch.Tensor,
    terms: Sequence[Term],
    *,
    dtype: torch.dtype | None = None,
    by_column: bool = False,
) -> torch.Tensor:
    """Return round(W + Σ E(W)), every entry correctly rounded.

    `weight` is (m, n) on any device with float64, any strides; the terms' tensors are moved to it. `dtype` is the
    result's, None for W's own. `by_column`: DecomposedTerms are given for Wᵀ (their norm runs over columns).
    Where W itself is NaN or infinite, so is the result; the caller decides what that means.
    """
    dtype = dtype or weight.dtype
    if by_column:
        terms = [transposed(term) for term in terms]
        return merge_exact(weight.T, terms, dtype=dtype).T.contiguous()
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.numel() == 0:
        return result
    moved = [_on_device(term, weight.device) for term in terms]
    stack = Stack.of(moved, weight)
    rest = [term for term in moved if not isinstance(term, LowRankTerm)]
    witness = Witness(weight, moved)
    step = max(1, TILE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        tile, undecided = _merge_tile(weight[rows], stack, rest, rows, dtype)
        if not any(isinstance(term, DecomposedTerm) for term in rest):
            undecided = _decide_ties(weight[rows], stack, rest, rows, tile, undecided)
        for row, column in undecided.nonzero().tolist():
            tile[row, column] = witness.round(start + row, column, dtype)
        result[rows] = tile
    return result


def _merge_tile(
    tile: torch.Tensor, stack: Stack, rest: Sequence[Term], rows: slice, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the merged rows and where their rounding is left undecided."""
    if dtype in _HALF and tile.dtype in _HALF and not rest:
        return _merge_half_tile(tile, stack, rows, dtype)
    ball = Ball.exactly(tile)
    if stack.left.shape[1]:
        ball = ball + product(stack.left[rows], stack.right, left_error=2)
    for term in rest:
        ball = ball + _contribution(term, tile, rows)
    result, undecided = certify(ball, dtype)
    return _settle(tile, result, undecided, ball.value)


def _merge_half_tile(
    tile: torch.Tensor, stack: Stack, rows: slice, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge low-rank terms into 16-bit weights: float32 first, float64 where that leaves the rounding open."""
    value = (stack.left32[rows] @ stack.right32).add_(tile)
    result, undecided = certify_single(value, stack.radius32[rows], dtype)
    row, column = undecided.nonzero(as_tuple=True)
    ball = Ball.exactly(tile[row, column]) + inner(stack.left[rows][row], stack.right.T[column])
    result[row, column], undecided[row, column] = certify(ball, dtype)
    return _settle(tile, result, undecided, value)


def _decide_ties(
    tile: torch.Tensor,
    stack: Stack,
    rest: Sequence[Term],
    rows: slice,
    result: torch.Tensor,
    undecided: torch.Tensor,
) -> torch.Tensor:
    """Settle undecided entries by compensated sums, writing them into `result`; return what is still open."""
    places = undecided.nonzero()
    for chunk in torch.split(places, _GATHER):
        row, column = chunk.unbind(1)
        left, right = stack.gather(rows, row, column)
        base = tile[row, column].double()[:, None]
        lefts, rights = [torch.ones_like(base), left], [base, right]
        for term in rest:
            assert isinstance(term, ReplacedTerm)
            other = term.tensor[rows][row, column].double()[:, None]
            weight = torch.full_like(base, term.weight)
            lefts += [weight, -weight]
            rights += [other, base]
        value, error, bound = dot(torch.cat(lefts, 1), torch.cat(rights, 1), stack.exact_factors)
        settled, undecided[row, column] = decide(value, error, bound, result.dtype)
        unchanged = (value == 0) & (bound == 0) & (base[:, 0] == 0)
        result[row, column] = torch.where(unchanged, base[:, 0].to(result.dtype), settled)
    return undecided


def _contribution(term: Term, tile: torch.Tensor, rows: slice) -> Ball:
    """Return weight · E(W) of a replaced or decomposed term for the given rows."""
    base = Ball.exactly(tile)
    weight = Ball.exactly(torch.tensor(term.weight, dtype=torch.float64, device=tile.device))
    match term:
        case ReplacedTerm():
            return weight * (Ball.exactly(term.tensor[rows]) - base)
        case DecomposedTerm():
            start = base if term.start is None else Ball.exactly(term.start[rows])
            scaled = term.left[rows].double() * term.scaling
            direction = start + product(scaled, term.right.double(), left_error=1)
            magnitude = Ball.exactly(term.magnitude[rows, None])
            return weight * (magnitude / root_of_squares(direction) * direction - base)
        case _:
            raise TypeError(f"{type(term).__name__} is part of the stack")


def _settle(
    tile: torch.Tensor, result: torch.Tensor, undecided: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Handle what rounding cannot: non-finite values, and zeros that nothing was added to.

    IEEE addition gives -0 + 0 = +0; a weight of -0 to which exactly nothing is added keeps its sign, so that merging
    nothing changes nothing. An exact sum of zero is +0 everywhere else.
    """
    lost = ~value.isfinite()
    result = torch.where(lost, value.to(result.dtype), result)
    untouched = (tile == 0) & (value == 0) & ~undecided
    return torch.where(untouched, tile.to(result.dtype), result), undecided & ~lost


def _on_device(term: Term, device: torch.device) -> Term:
    match term:
        case LowRankTerm(left, right, scaling, weight):
            return LowRankTerm(left.to(device), right.to(device), scaling, weight)
        case ReplacedTerm(tensor, weight):
            return ReplacedTerm(tensor.to(device), weight)
        case DecomposedTerm(left, right, scaling, magnitude, weight, start):
            moved = None if start is None else start.to(device)
            return DecomposedTerm(left.to(device), right.to(device), scaling, magnitude.to(device), weight, moved)
