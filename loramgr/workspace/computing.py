"""From an adapter's updates to the terms of an exact merge, and from those to a tensor's new bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loramgr.adapter import LowRank, Replacement, Rows, Shift
from loramgr.errors import IncompatibleError
from loramgr.tensorfile import TensorSpec
from loramgr.workspace.contributions import Contribution, whole_tensor

if TYPE_CHECKING:
    import torch

    from loramgr.algebra.terms import Term

__all__ = ["Merger", "pick_device"]


def pick_device(asked: str) -> tuple[str, str | None]:
    """Return the device to compute on, and a sentence for the person when it is not the one that was asked for.

    Exact numerics need float64, which MPS devices lack: there the CPU computes. Raises IncompatibleError for a device
    that is not there.
    """
    import torch

    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return "cpu", None
    if asked == "mps":
        return "cpu", "exact numerics need float64, which MPS does not have: computed on the CPU"
    device = "cuda" if asked == "auto" else asked
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise IncompatibleError(
            f"the device {asked!r} is not there: {str(error).splitlines()[0]}", "--device cpu"
        ) from error
    return device, None


@dataclass(frozen=True, slots=True)
class Merger:
    """Computes merged tensors on a device; `force` lets results through that are not finite."""

    device: str
    force: bool

    def merge(
        self, target: TensorSpec, weight: torch.Tensor | None, contributions: Sequence[Contribution]
    ) -> torch.Tensor:
        """Return the merged tensor of the target's dtype and shape, on the CPU.

        `weight` is the base's tensor, None for a tensor that the base lacks or has in another shape; then the
        contribution that brings the whole tensor takes its place, whatever its weight. Raises IncompatibleError,
        naming the tensor, when the result is not finite.
        """
        from loramgr.algebra.casting import rounded
        from loramgr.algebra.exact import merge_exact
        from loramgr.tensors import torch_dtype

        dtype = torch_dtype(target.dtype)
        start, terms, by_column = _terms(weight, contributions)
        if terms:
            matrix = _matrix(start).to(self.device)
            merged = merge_exact(matrix, terms, dtype=dtype, by_column=by_column).cpu().reshape(start.shape)
        else:
            merged = rounded(start, dtype)
        if not self.force:
            _refuse_non_finite(target.name, merged, contributions)
        return merged.contiguous()


def _terms(weight: torch.Tensor | None, contributions: Sequence[Contribution]) -> tuple[torch.Tensor, list[Term], bool]:
    """Return the tensor to start from, the terms to add to it, and whether decomposed ones run over columns."""
    wholes = [view for item in contributions if (view := whole_tensor(item.update)) is not None]
    replaced = len(wholes) == len(contributions) == 1 and contributions[0].weight == 1
    start = wholes[0].load() if weight is None or replaced else weight
    terms: list[Term] = []
    by_column = False
    for item in contributions:
        terms += _terms_of(item, start, begun=start is not weight)
        by_column |= item.bound.transposed and isinstance(item.update, LowRank) and item.update.magnitude is not None
    return start, terms, by_column


def _terms_of(item: Contribution, start: torch.Tensor, *, begun: bool) -> list[Term]:
    """Return the terms of one contribution; `begun` says that the whole tensor it may bring is `start` already."""
    import torch

    from loramgr.algebra.terms import LowRankTerm, ReplacedTerm

    update, weight = item.update, item.weight
    whole = whole_tensor(update)
    terms: list[Term] = [] if whole is None or begun else [ReplacedTerm(_matrix(whole.load()), weight)]
    match update:
        case Replacement():
            return terms
        case Rows():
            changed = (start if whole is None else whole.load()).double()
            changed[list(update.indices)] = update.rows.load().double()
            return [ReplacedTerm(_matrix(changed), weight)]
        case Shift():
            one = torch.ones((1, 1))
            return [*terms, LowRankTerm(one, update.vector.load()[None], update.scaling, weight)]
        case LowRank():
            return _low_rank_terms(update, item, terms, begun=begun)


def _low_rank_terms(update: LowRank, item: Contribution, terms: list[Term], *, begun: bool) -> list[Term]:
    from loramgr.algebra.terms import DecomposedTerm, LowRankTerm

    lora_A, lora_B = update.lora_A.load().flatten(1), update.lora_B.load().flatten(1)
    if update.magnitude is not None:
        table = None if update.table is None or begun else update.table.load()
        table = table.T if table is not None and item.bound.transposed else table
        magnitude = update.magnitude.load().flatten()
        return [DecomposedTerm(lora_B, lora_A, update.scaling, magnitude, item.weight, table)]
    left, right = (lora_A.T, lora_B.T) if item.bound.transposed else (lora_B, lora_A)
    return [*terms, LowRankTerm(left, right, update.scaling, item.weight)]


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as the matrix that its update acts on: a vector as one row, a kernel flattened."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def _refuse_non_finite(name: str, merged: torch.Tensor, contributions: Sequence[Contribution]) -> None:
    if bool(merged.isfinite().all()):
        return
    count = int((~merged.isfinite()).sum())
    refs = ", ".join(item.pick.ref for item in contributions)
    raise IncompatibleError(
        f"{name}: {count} of {merged.numel()} merged weights are NaN or infinite in {merged.dtype} (with {refs})",
        "--dtype float32 where the range is too small, or --force to write it as it is",
    )
