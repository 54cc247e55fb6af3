"""The exact merge: every weight is the correctly rounded value of W + Σ E(W), on any device, in any tiling.

Four passes, each over what the one before it left open: float32 with an error bound (16-bit results only, on GPUs as a
kernel of its own), float64 with an error bound, compensated sums for ties, and rational arithmetic for single entries.
The bits depend on the inputs alone, because what is stored is proved to be the one correct rounding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from math import isfinite
from types import ModuleType

import torch

from loramgr.algebra.balls import Ball, root_of_squares
from loramgr.algebra.compensated import decide, dot
from loramgr.algebra.rounding import HALVES, certify, round_float64, screen
from loramgr.algebra.scratch import Scratch, scratch_for
from loramgr.algebra.stack import Stack
from loramgr.algebra.terms import AddedTerm, DecomposedTerm, LowRankTerm, ReplacedTerm, Term, transposed
from loramgr.algebra.witness import Witness

__all__ = ["merge_exact", "merges_by_kernel"]

TILE = 1 << 19  # elements for each thread: a tile and its temporaries stay in the cache, the calls are few
_GPU_TILE = 1 << 24  # elements: enough to fill a GPU
_GATHER = 1 << 17  # open entries settled at once
_STRIP = 1 << 16  # elements: half a megabyte of float64
_GATHERED = 1 << 25  # factors gathered at once for open entries on a GPU
_GATHERED_ON_CPU = 1 << 21  # sixteen megabytes of float64
_MANY = 32  # of so many entries one that is open is too much: to gather it costs as much as to compute all in float64


def merge_exact(
    weight: torch.Tensor,
    terms: Sequence[Term],
    *,
    dtype: torch.dtype | None = None,
    by_column: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return round(W + Σ E(W)), every entry correctly rounded.

    `weight` is (m, n) on any device with float64, any strides; the terms' tensors are moved to it. `dtype` is the
    result's, None for W's own. `by_column`: DecomposedTerms are given for Wᵀ (their norm runs over columns). `out`, of
    the result's shape and dtype, contiguous and beside W, takes the result; None for new memory.
    Where W itself is NaN or infinite, so is the result; it is NaN where anything else that goes into it is not finite,
    or where a norm is zero. The caller decides what that means. An exact sum of zero is +0, but a weight of -0 to which
    exactly nothing is added keeps its sign, so that merging nothing changes nothing.
    """
    dtype = dtype or weight.dtype
    if by_column:
        terms = [transposed(term) for term in terms]
        result = merge_exact(weight.T, terms, dtype=dtype).T
        return result.contiguous() if out is None else out.copy_(result)
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
    if weight.numel() == 0:
        return result
    merge = _Merge(weight, [_on_device(term, weight.device) for term in terms])
    if merges_by_kernel(weight, terms, dtype) and merge.fill_by_kernel(result):
        return result
    step = max(1, (TILE * torch.get_num_threads() if weight.device.type == "cpu" else _GPU_TILE) // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        merge.fill(result, slice(start, min(start + step, weight.shape[0])))
    merge.settle(result)
    return result


def merges_by_kernel(weight: torch.Tensor, terms: Sequence[Term], dtype: torch.dtype) -> bool:
    """Say whether the first pass over the weight is the Triton kernel's: 16-bit floats, low-rank terms, on a GPU."""
    low_rank = [term for term in terms if isinstance(term, LowRankTerm)]
    if len(low_rank) != len(terms) or not sum(term.left.shape[1] for term in low_rank) or not weight.numel():
        return False
    kernels = screening_kernels(weight)
    return kernels is not None and kernels.takes(weight, dtype)


def screening_kernels(weight: torch.Tensor) -> ModuleType | None:
    """Return the kernels of the first pass where they may run: on a GPU, or in Triton's interpreter."""
    possible = weight.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not possible or find_spec("triton") is None:
        return None
    from loramgr.algebra.kernels import screening

    return screening


class _Merge:
    """One weight and its terms, with what all tiles of the merge share."""

    def __init__(self, weight: torch.Tensor, terms: Sequence[Term]) -> None:
        self._weight = weight
        self._terms = terms
        self._stack = Stack.of(terms, weight)
        self._replaced = [term for term in terms if isinstance(term, ReplacedTerm)]
        self._added = [term for term in terms if isinstance(term, AddedTerm)]
        self._decomposed = [
            (term, Stack([LowRankTerm(term.left, term.right, term.scaling)], weight))
            for term in terms
            if isinstance(term, DecomposedTerm)
        ]
        self._witness = Witness(weight, terms)
        self._scratch = scratch_for(weight)
        self._is_sum = not (self._replaced or self._added or self._decomposed)
        self._pending: list[tuple[torch.Tensor, Ball | None]] = []
        self._waiting = 0
        self._sound: tuple[torch.Tensor, torch.Tensor] | None = None

    def fill(self, result: torch.Tensor, rows: slice) -> None:
        """Write the merged rows into the result, but for the entries that wait for `settle`."""
        tile, ball = result[rows], None
        if result.dtype not in HALVES:
            ball = self._ball(rows)
            places = certify(ball, tile, self._scratch)
        elif self._is_sum:
            radius, relative = self._stack.bound(rows)
            places = screen(self._single(rows), radius, relative, tile, self._scratch)
        else:
            ball = self._ball(rows)
            value = self._scratch.take("value", tile, torch.float32).copy_(ball.value)
            places = screen(value, ball.radius, ball.relative, tile, self._scratch)
        for begin in range(0, places.numel(), _GATHER):
            self._leave(places[begin : begin + _GATHER], rows, None if self._is_sum else ball)
            if self._waiting >= _GATHER:
                self.settle(result)

    def _single(self, rows: slice) -> torch.Tensor:
        """Return the rows of a sum, computed in float64 and rounded to float32, in strips that fit a core's cache."""
        tile = self._weight[rows]
        value = self._scratch.take("value", tile, torch.float32)
        step = max(1, _STRIP // tile.shape[1]) if tile.device.type == "cpu" else tile.shape[0]
        for start in range(0, tile.shape[0], step):
            strip = tile[start : start + step]
            summed = self._scratch.take("start", strip, torch.float64).copy_(strip)
            self._stack.add_to(summed, slice(rows.start + start, rows.start + start + strip.shape[0]))
            value[start : start + step] = summed
        return value

    def _leave(self, places: torch.Tensor, rows: slice, ball: Ball | None) -> None:
        """Leave entries to `settle`, by their places in the rows; None for a sum, of which they are computed again."""
        columns = self._weight.shape[1]
        entries = None if ball is None else ball.at(places // columns, places % columns)
        self._pending.append((places + rows.start * columns, entries))
        self._waiting += places.numel()

    def fill_by_kernel(self, result: torch.Tensor) -> bool:
        """Write the whole merged weight into the result, by kernel but for what that leaves open; False for too much.

        As with high ranks in float16, whose numbers lie close; the weight is then best merged in float64 as a whole.
        """
        kernels = screening_kernels(self._weight)
        assert kernels is not None
        places = kernels.screen_by_kernel(self._weight, self._stack.single(), result)
        if places.numel() > result.numel() // _MANY:
            return False
        for chunk in places.split(max(1, _GATHERED // self._stack.rank)):
            row, column = self._entry(chunk)
            ball = self._stack.entries(self._weight[row, column].double(), row, column)
            self._settle(result, ball, row, column)
        return True

    def settle(self, result: torch.Tensor) -> None:
        """Write the entries that the first pass left open so far into the result."""
        if not self._pending:
            return
        places, balls = zip(*self._pending, strict=True)
        self._pending.clear()
        self._waiting = 0
        place = torch.cat(places)
        if not self._is_sum:
            value, radius = torch.cat([ball.value for ball in balls]), torch.cat([ball.radius for ball in balls])
            self._settle(result, Ball(value, radius, balls[0].relative), *self._entry(place))
            return
        step = max(1, _GATHERED_ON_CPU // max(1, self._stack.rank))
        for begin in range(0, place.numel(), step):
            row, column = self._entry(place[begin : begin + step])
            self._settle(result, self._stack.entries(self._weight[row, column].double(), row, column), row, column)

    def _entry(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and columns of flat places in the weight."""
        return place // self._weight.shape[1], place % self._weight.shape[1]

    def _ball(self, rows: slice) -> Ball:
        """Return the merged rows with a bound of their error."""
        tile = self._weight[rows]
        start = self._scratch.take("start", tile, torch.float64).copy_(tile)
        ball = self._stack.added(start, rows)
        for replaced in self._replaced:
            difference = Ball.exactly(replaced.tensor[rows]) - Ball.exactly(tile)
            ball = ball + _constant(replaced.weight, tile.device) * difference
        for added in self._added:
            ball = ball + _constant(added.weight, tile.device) * Ball.exactly(added.tensor[rows])
        for decomposed, stack in self._decomposed:
            ball = ball + _contribution(decomposed, stack, tile, rows)
        return ball

    def _settle(self, result: torch.Tensor, ball: Ball, row: torch.Tensor, column: torch.Tensor) -> None:
        """Write the entries (row, column) into the result, each by the first pass that decides it."""
        base = self._weight[row, column].double()
        sound = self._are_sound(row, column)
        idle = sound & self._untouched(row, column)
        result[row, column] = round_float64(torch.where(idle | base.isinf(), base, torch.nan), result.dtype)
        left = (sound & ~idle).nonzero()[:, 0]
        if left.numel() and result.dtype in HALVES:
            rounded = torch.empty_like(left, dtype=result.dtype)
            still = certify(ball.at(left), rounded, Scratch())
            result[row[left], column[left]] = rounded
            left = left[still]
        if left.numel() and not self._decomposed:
            left = left[self._compensate(result, row[left], column[left])]
        for entry in zip(row[left].tolist(), column[left].tolist(), strict=True):
            result[entry] = self._witness.round(*entry, result.dtype)

    def _compensate(self, result: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Settle entries by compensated sums, writing them into the result; return which are still open."""
        base = self._weight[row, column].double()
        lefts, rights = ([each] for each in self._stack.gather(row, column))
        for term in self._replaced:
            weight = torch.full_like(base, term.weight)
            lefts.append(torch.stack([weight, -weight], dim=1))
            rights.append(torch.stack([term.tensor[row, column].double(), base], dim=1))
        for added in self._added:
            lefts.append(torch.full_like(base, added.weight)[:, None])
            rights.append(added.tensor[row, column].double()[:, None])
        value, error, bound = dot(base, torch.cat(lefts, 1), torch.cat(rights, 1), self._stack.exact_factors)
        settled, still = decide(value, error, bound, result.dtype)
        unchanged = (value == 0) & (bound == 0) & (base == 0)
        result[row, column] = torch.where(unchanged, base.to(result.dtype), settled)
        return still

    def _untouched(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return where nothing is added for certain."""
        if self._replaced or self._decomposed or self._added:
            return torch.zeros_like(row, dtype=torch.bool)
        return self._stack.untouched(row, column)

    def _are_sound(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return where everything that goes into the entries is finite."""
        if self._sound is None:
            self._sound = _finite(self._weight, self._terms)
        rows, columns = self._sound
        sound = rows[row] & columns[column] & self._weight[row, column].isfinite()
        tensors = [term.tensor for term in self._replaced] + [term.tensor for term in self._added]
        for tensor in tensors:
            sound &= tensor[row, column].isfinite()
        return sound


def _constant(value: float, device: torch.device) -> Ball:
    return Ball.exactly(torch.tensor(value, dtype=torch.float64, device=device))


def _contribution(term: DecomposedTerm, stack: Stack, tile: torch.Tensor, rows: slice) -> Ball:
    """Return weight · (magnitude · V / ‖V‖ - W) for the given rows; the stack holds the term's low-rank part."""
    start = tile if term.start is None else term.start[rows]
    direction = stack.added(torch.empty(tile.shape, dtype=torch.float64, device=tile.device).copy_(start), rows)
    magnitude = Ball.exactly(term.magnitude[rows, None])
    adapted = magnitude / root_of_squares(direction) * direction
    return _constant(term.weight, tile.device) * (adapted - Ball.exactly(tile))


def _finite(weight: torch.Tensor, terms: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for the rows (m,) and columns (n,) whether all factors that act on them are finite."""
    rows, columns = (torch.ones(size, dtype=torch.bool, device=weight.device) for size in weight.shape)
    for term in terms:
        rows &= isfinite(term.weight)
        match term:
            case LowRankTerm():
                rows &= term.left.isfinite().all(dim=1) & isfinite(term.scaling)
                columns &= term.right.isfinite().all(dim=0)
            case DecomposedTerm():
                start = weight if term.start is None else term.start
                rows &= start.isfinite().all(dim=1) & term.magnitude.isfinite() & isfinite(term.scaling)
                rows &= term.left.isfinite().all(dim=1) & term.right.isfinite().all()
    return rows, columns


def _on_device(term: Term, device: torch.device) -> Term:
    match term:
        case LowRankTerm():
            return replace(term, left=term.left.to(device), right=term.right.to(device))
        case ReplacedTerm() | AddedTerm():
            return replace(term, tensor=term.tensor.to(device))
        case DecomposedTerm():
            start = None if term.start is None else term.start.to(device)
            left, right = term.left.to(device), term.right.to(device)
            return replace(term, left=left, right=right, magnitude=term.magnitude.to(device), start=start)
