"""The one door to merging in place: merge, unmerge and switch tensors of any device and strides.

Fast merges run as Triton kernels where these take the weight (CUDA, 16- and 32-bit floats, or the CPU with
TRITON_INTERPRET=1), all else in plain torch, exact merges of 16-bit floats after a first pass by kernel; what is
returned says which. In plain torch, everything is computed before the first byte of a weight changes. The kernels write
as they go, and undo what they did when something fails.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from loramgr.algebra import fast, plain
from loramgr.algebra.exact import merges_by_kernel
from loramgr.algebra.factors import Factors
from loramgr.algebra.kernels.tiled import TiledResidual, tiled
from loramgr.algebra.plain import Change, ExactTerms
from loramgr.algebra.residual import BITS, Origin, Residual, may_undo
from loramgr.errors import IncompatibleError

__all__ = [
    "Change",
    "ExactTerms",
    "Kept",
    "Merged",
    "Origin",
    "merge_",
    "portable",
    "settle",
    "switch_",
    "unmerge_",
]

Kept = Residual | TiledResidual


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge leaves behind: the residual, None if none was asked for, and what ran, "triton" or "torch"."""

    residual: Kept | None
    kernel: str


def merge_(weight: torch.Tensor, change: Change, *, residual: bool, wait: bool = True) -> Merged:
    """Merge the change into the weight (m, n) in place; `residual` says whether to keep what gives the weight back.

    Without `wait`, a merge on a GPU with a residual is complete only after `settle`; `unmerge_` takes it before, too.
    Raises IncompatibleError for shapes and dtypes that do not fit and for a weight whose elements share memory.
    """
    _check(weight, change)
    kernels = _kernels(weight, change)
    if kernels is None or not isinstance(change, Factors):
        return _merge_plainly(weight, change, residual)
    factors = change.to(weight.device)
    if not residual:
        kernels.merged(weight, factors, None)
        return Merged(None, "triton")
    kept = _empty(kernels, weight, kernels.is_transposed(weight))
    kernels.merged(weight, factors, kept)
    if wait:
        try:
            kernels.settle([kept])
        except BaseException:
            kernels.unmerged(weight, factors, kept)
            raise
    return Merged(kept, "triton")


def unmerge_(weight: torch.Tensor, change: Change, residual: Kept, *, unproven: bool = False) -> str:
    """Give the merged weight the bits that it had before, in place, and return which kernel ran.

    Raises IncompatibleError as `merge_`, for a residual of another tensor, and for one that another computation made,
    unless `unproven` says that the caller proves the result by its digest.
    """
    _check(weight, change)
    kernels, residual = _understood(weight, change, residual, unproven)
    if isinstance(residual, Residual):
        weight.copy_(plain.unmerged(weight, change, residual))
        return "torch"
    assert kernels is not None
    assert isinstance(change, Factors)
    kernels.unmerged(weight, change.to(weight.device), residual)
    return "triton"


def switch_(
    weight: torch.Tensor,
    old: Change,
    residual: Kept,
    new: Change,
    *,
    unproven: bool = False,
    wait: bool = True,
) -> Merged:
    """Take the old change out of the merged weight and merge the new one with a residual, in place.

    `wait` is as in `merge_`; everything else, and what is raised, as in `unmerge_`.
    """
    _check(weight, old)
    _check(weight, new)
    kernels, residual = _understood(weight, old, residual, unproven)
    if isinstance(residual, Residual):
        result, kept = plain.switched(weight, old, residual, new)
        weight.copy_(result)
        return Merged(kept, "torch")
    assert kernels is not None
    assert isinstance(old, Factors)
    if not isinstance(new, Factors):
        base = weight.clone()
        kernels.unmerged(base, old.to(weight.device), residual)
        result, kept = plain.merged_with_residual(base, new)
        weight.copy_(result)
        return Merged(kept, "torch")
    return _switch_by_kernel(kernels, weight, (old.to(weight.device), residual), new.to(weight.device), wait)


def settle(merges: Sequence[Merged]) -> None:
    """Complete merges and switches that did not wait, waiting once for all of them.

    Raises OutOfMemoryError where a GPU cannot hold the tiles that a bucket is too small for; `unmerge_` takes every
    one of the merges then, too.
    """
    waiting = [merge.residual for merge in merges if isinstance(merge.residual, TiledResidual)]
    kernels = _launch() if waiting else None
    if kernels is not None:
        kernels.settle(waiting)


def portable(residual: Kept) -> Residual:
    """Return the residual in the form that is packed and that every device reads; settles it if it is not."""
    if isinstance(residual, Residual):
        return residual
    settle([Merged(residual, "triton")])
    return residual.portable()


def _merge_plainly(weight: torch.Tensor, change: Change, residual: bool) -> Merged:
    exact_by_kernel = isinstance(change, ExactTerms) and merges_by_kernel(weight, change.terms, weight.dtype)
    kernel = "triton" if exact_by_kernel else "torch"
    if not residual:
        weight.copy_(plain.merged(weight, change))
        return Merged(None, kernel)
    result, kept = plain.merged_with_residual(weight, change)
    weight.copy_(result)
    return Merged(kept, kernel)


def _switch_by_kernel(
    kernels: ModuleType, weight: torch.Tensor, old: tuple[Factors, TiledResidual], new: Factors, wait: bool
) -> Merged:
    kept = _empty(kernels, weight, old[1].transposed)
    kernels.replaced(weight, *old, new, kept)
    if wait:
        try:
            kernels.settle([kept])
        except BaseException:
            # The same factors merge the same base to the same bits, so the old residual is right again.
            kernels.unmerged(weight, new, kept)
            kernels.merged(weight, old[0], None, transposed=old[1].transposed)
            raise
    return Merged(kept, "triton")


def _empty(kernels: ModuleType, weight: torch.Tensor, transposed: bool) -> TiledResidual:
    return TiledResidual.empty(weight, transposed, kernels.origin_of(weight.device, transposed))


@cache
def _launch() -> ModuleType | None:
    """Return the kernels, None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from loramgr.algebra.kernels import launch

    return launch


def _kernels(weight: torch.Tensor, change: Change) -> ModuleType | None:
    """Return the kernels if they merge the change into the weight, else None."""
    possible = weight.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    kernels = _launch() if possible and isinstance(change, Factors) and weight.numel() else None
    return kernels if kernels is not None and kernels.runs_on(weight) else None


def _understood(weight: torch.Tensor, change: Change, residual: Kept, unproven: bool) -> tuple[ModuleType | None, Kept]:
    """Return the residual in the form of what undoes it here, the kernels or (None) plain torch.

    Raises IncompatibleError for a residual of another tensor or of a computation that does not run here.
    """
    if tuple(residual.shape) != tuple(weight.shape) or residual.dtype != weight.dtype:
        described = f"{residual.dtype} tensor of shape {tuple(residual.shape)}"
        raise IncompatibleError(f"the residual belongs to a {described}, not to this weight")
    if isinstance(residual, Residual) and may_undo(residual.origin, plain.origin_of(change)):
        return None, residual
    kernels = _kernels(weight, change)
    if kernels is not None:
        turned = [way for way in (False, True) if may_undo(residual.origin, kernels.origin_of(weight.device, way))]
        if turned or unproven:
            way = turned[0] if turned else kernels.is_transposed(weight)
            near = residual.to(weight.device) if isinstance(residual, Residual) else residual
            return kernels, _tiled(near, way, kernels.origin_of(weight.device, way))
    if unproven and isinstance(residual, Residual):
        return None, residual
    raise IncompatibleError(
        f"the residual was made by {residual.origin}, which does not run here", "restore the base's tensor instead"
    )


def _tiled(residual: Kept, transposed: bool, origin: Origin) -> TiledResidual:
    form = residual if isinstance(residual, TiledResidual) else tiled(residual, transposed, origin)
    if form is None:
        raise IncompatibleError("the kernels cannot hold this residual", "unmerge on the CPU")
    return form


def _check(weight: torch.Tensor, change: Change) -> None:
    if weight.dim() != 2 or weight.dtype not in BITS:
        raise IncompatibleError(f"a {weight.dtype} tensor of shape {tuple(weight.shape)} is no weight to merge into")
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        raise IncompatibleError("elements of the weight share memory, so that it cannot be merged into in place")
    if isinstance(change, Factors):
        fast.check(weight, change)
