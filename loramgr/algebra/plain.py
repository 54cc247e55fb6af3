"""Merging, unmerging and switching in plain torch, on any device, by rows: new tensors out, nothing in place.

A change is either `Factors`, which are merged with the fast numerics, or `ExactTerms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from loramgr.algebra import fast
from loramgr.algebra.exact import merge_exact
from loramgr.algebra.factors import Factors
from loramgr.algebra.float8 import FLOAT8, merge_exact_float8
from loramgr.algebra.residual import Origin, Residual, concatenate, decode, encode, tile_rows
from loramgr.algebra.terms import LowRankTerm, Term
from loramgr.errors import IncompatibleError

__all__ = ["EXACT", "Change", "ExactTerms", "merged", "merged_with_residual", "origin_of", "switched", "unmerged"]

EXACT = Origin("exact", 1, "any")


@dataclass(frozen=True, slots=True)
class ExactTerms:
    """Terms to be merged with exact numerics; `by_column` as in `merge_exact`. A residual needs low-rank terms."""

    terms: tuple[Term, ...]
    by_column: bool = False

    def low_rank(self) -> list[LowRankTerm]:
        """Return the terms; IncompatibleError if one is not low-rank, so that no sum takes it out again."""
        low_rank = [term for term in self.terms if isinstance(term, LowRankTerm)]
        if len(low_rank) != len(self.terms):
            raise IncompatibleError("only sums of low-rank deltas have a residual", "keep the base's tensor instead")
        return low_rank

    def rows(self, rows: slice) -> ExactTerms:
        """Return the terms, which must be low-rank, of some rows of the weight."""
        return ExactTerms(tuple(replace(term, left=term.left[rows]) for term in self.low_rank()))


Change = Factors | ExactTerms


def origin_of(change: Change) -> Origin:
    """Return which computation merges the change here."""
    return fast.FAST if isinstance(change, Factors) else EXACT


def merged(weight: torch.Tensor, change: Change) -> torch.Tensor:
    """Return the weight (m, n) with the change merged."""
    if isinstance(change, Factors):
        return fast.merge(weight, change)
    return _exactly(weight, change.terms, by_column=change.by_column)


def merged_with_residual(weight: torch.Tensor, change: Change) -> tuple[torch.Tensor, Residual]:
    """Return the merged weight and the residual that gives the weight back."""
    return _by_rows(weight, change, lambda rows: weight[rows])


def unmerged(weight: torch.Tensor, change: Change, residual: Residual) -> torch.Tensor:
    """Return the weight, bit for bit, from the merged one."""
    return decode(_candidate(weight, change), residual)


def switched(weight: torch.Tensor, old: Change, residual: Residual, new: Change) -> tuple[torch.Tensor, Residual]:
    """Return the weight with the new change merged in place of the old one, and the new residual."""

    def base(rows: slice) -> torch.Tensor:
        return unmerged(weight[rows], old.rows(rows), residual.rows(rows))

    return _by_rows(weight, new, base)


def _by_rows(
    weight: torch.Tensor, change: Change, base: Callable[[slice], torch.Tensor]
) -> tuple[torch.Tensor, Residual]:
    """Merge the change into the base, which is given by rows; `weight` has its shape, dtype and device."""
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    parts = []
    step = tile_rows(weight)
    for start in range(0, max(1, weight.shape[0]), step):
        rows = slice(start, min(start + step, weight.shape[0]))
        original, part = base(rows), change.rows(rows)
        result[rows] = merged(original, part)
        parts.append(encode(original, _candidate(result[rows], part), origin_of(change)))
    return result, concatenate(parts)


def _candidate(weight: torch.Tensor, change: Change) -> torch.Tensor:
    """Return what is nearly the base: the merged weight with the change taken out again, up to rounding."""
    if isinstance(change, Factors):
        return fast.recover(weight, change)
    return _exactly(weight, [replace(term, weight=-term.weight) for term in change.low_rank()])


def _exactly(weight: torch.Tensor, terms: Sequence[Term], *, by_column: bool = False) -> torch.Tensor:
    merge = merge_exact_float8 if weight.dtype in FLOAT8 else merge_exact
    return merge(weight, terms, by_column=by_column)
