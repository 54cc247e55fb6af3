"""From an adapter's updates to the terms of an exact merge, and from those to a tensor's new bytes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from loramgr.adapter import LowRank, Opaque, Patch, Replacement, Rows, Shift
from loramgr.errors import IncompatibleError, IntegrityError, LoramgrError
from loramgr.memory import Memory, fresh
from loramgr.tensorfile import Data, TensorSpec
from loramgr.workspace.applied import Additive, Rebuilding, applied, delta_of, patched
from loramgr.workspace.contributions import Contribution, whole_tensor

if TYPE_CHECKING:
    import torch

    from loramgr.algebra.plain import Change
    from loramgr.algebra.terms import Term

__all__ = ["Computed", "Merger", "check_device", "pick_device"]


def pick_device(asked: str) -> tuple[str, str | None]:
    """Return the device to compute on, and a sentence for the person when it is not the one that was asked for.

    Exact numerics need float64, which MPS devices lack: there the CPU computes. Raises IncompatibleError for a device
    that is not there.
    """
    if asked == "cpu" or (asked == "auto" and not _may_have_gpu()):
        return "cpu", None
    if asked == "mps":
        return "cpu", "exact numerics need float64, which MPS does not have: computed on the CPU"
    import torch

    if asked == "auto" and not torch.cuda.is_available():
        return "cpu", None
    device = "cuda" if asked == "auto" else asked
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise IncompatibleError(
            f"the device {asked!r} is not there: {str(error).splitlines()[0]}", "--device cpu"
        ) from error
    return device, None


def _may_have_gpu() -> bool:
    """Say whether torch is worth asking for GPUs: on Linux they have one of these devices (NVIDIA, WSL, AMD)."""
    nodes = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    return sys.platform != "linux" or any(Path(node).exists() for node in nodes)


def check_device(device: str, touched: Sequence[TensorSpec], jobs: int) -> None:
    """Raise LoramgrError when the device has too little memory left for the largest tensors that are computed on it."""
    if not device.startswith("cuda") or not touched:
        return
    import torch

    free, _ = torch.cuda.mem_get_info(torch.device(device))
    largest = sorted((spec.nbytes for spec in touched), reverse=True)[:jobs]
    needed = _COPIES_ON_DEVICE * sum(largest)
    if needed > free:
        raise LoramgrError(f"{device}: {needed:,} bytes are needed on the device and {free:,} are free", "--device cpu")


_COPIES_ON_DEVICE = 6  # the weight, what is made of it, and tiles in float64


class Computed(NamedTuple):
    """A merged tensor, on the CPU, and which kernel ran, "torch" or "triton".

    `parts` are the packed residual, each part with its dtype and shape; empty where none is kept or there is none.
    """

    tensor: torch.Tensor
    kernel: str
    parts: dict[str, tuple[TensorSpec, Data]]


@dataclass(frozen=True, slots=True)
class Merger:
    """Computes merged tensors on a device; `force` lets results through that are not finite.

    On "cuda" the tensors are spread over all GPUs that there are. `numerics` fast computes sums of low-rank deltas in
    float32, everything else exactly. Several threads may use it at once.
    """

    device: str
    force: bool
    numerics: str = "exact"

    def merge(
        self,
        target: TensorSpec,
        weight: torch.Tensor | None,
        contributions: Sequence[Contribution],
        *,
        residual: bool = False,
        memory: Memory = fresh,
    ) -> Computed:
        """Return the merged tensor of the target's dtype and shape, with its residual where one is wanted.

        `weight` is the base's tensor, None for a tensor that the base lacks or has in another shape; then the
        contribution that brings the whole tensor takes its place, whatever its weight. Only sums of low-rank deltas
        have a residual. The result may lie in the memory's slot "result". Raises IncompatibleError, naming the tensor,
        when it is not finite.
        """
        from loramgr.algebra.casting import rounded
        from loramgr.algebra.exact import merge_exact, merges_by_kernel
        from loramgr.tensors import from_bytes, torch_dtype

        dtype = torch_dtype(target.dtype)
        start, terms, by_column = _terms(weight, contributions)
        device = self._device_for(target.name)
        change = self._change(terms, device) if start is weight and start.dtype == dtype else None
        if change is not None and (residual or self.numerics == "fast"):
            computed = _merge_in_place(_matrix(start).to(device), start, change, residual=residual)
        elif terms:
            matrix, out = _matrix(start).to(device), None
            if device == "cpu" and start.shape == target.shape:
                out = from_bytes(memory("result", target.nbytes), target).view(matrix.shape)
            merged = merge_exact(matrix, terms, dtype=dtype, by_column=by_column, out=out).cpu().reshape(start.shape)
            kernel = "triton" if merges_by_kernel(matrix, terms, dtype) else "torch"
            computed = Computed(merged.contiguous(), kernel, {})
        else:
            computed = Computed(rounded(start, dtype).contiguous(), "torch", {})
        if not self.force:
            _refuse_non_finite(target.name, computed.tensor, contributions)
        return computed

    def unmerge(
        self, name: str, merged: torch.Tensor, contributions: Sequence[Contribution], parts: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the tensor of that name as it was, on the CPU, from its packed residual; its digest has to prove it.

        Raises IntegrityError for a residual that is damaged or belongs to another tensor.
        """
        from loramgr.algebra.engine import unmerge_
        from loramgr.algebra.packing import unpack

        _, terms, _ = _terms(merged, contributions)
        device = self._device_for(name)
        change = self._change(terms, device)
        if change is None:
            raise IntegrityError("the residual belongs to another merge", "loramgr unmerge, with the base at hand")
        weight = _matrix(merged).to(device)
        unmerge_(weight, change, unpack(parts), unproven=True)
        return weight.cpu().reshape(merged.shape)

    def _device_for(self, name: str) -> str:
        """Return where a tensor is computed: of several GPUs always the same one for the same name."""
        import torch

        if self.device != "cuda" or torch.cuda.device_count() < 2:
            return self.device
        return f"cuda:{crc32(name.encode()) % torch.cuda.device_count()}"

    def _change(self, terms: Sequence[Term], device: str) -> Change | None:
        """Return the sum that a residual can undo; None where it is not one of low-rank deltas alone."""
        from loramgr.algebra.factors import stacked
        from loramgr.algebra.plain import ExactTerms
        from loramgr.algebra.terms import LowRankTerm

        low_rank = [term for term in terms if isinstance(term, LowRankTerm)]
        if not terms or len(low_rank) != len(terms):
            return None
        on_device = [replace(t, left=t.left.to(device), right=t.right.to(device)) for t in low_rank]
        return stacked(on_device) if self.numerics == "fast" else ExactTerms(tuple(on_device))


def _merge_in_place(matrix: torch.Tensor, start: torch.Tensor, change: Change, *, residual: bool) -> Computed:
    """Merge the change into the matrix, a copy of `start` unless that is on the same device."""
    from loramgr.algebra.engine import merge_, portable
    from loramgr.algebra.packing import pack
    from loramgr.tensors import as_bytes

    matrix = matrix.clone() if matrix.data_ptr() == start.data_ptr() else matrix
    done = merge_(matrix, change, residual=residual)
    packed = {} if done.residual is None else pack(portable(done.residual))
    parts = {name: (TensorSpec(name, "U8", tuple(part.shape)), as_bytes(part)) for name, part in packed.items()}
    return Computed(matrix.cpu().reshape(start.shape), done.kernel, dict(parts))


def _terms(weight: torch.Tensor | None, contributions: Sequence[Contribution]) -> tuple[torch.Tensor, list[Term], bool]:
    """Return the tensor to start from, the terms to add to it, and whether decomposed ones run over columns."""
    wholes = [view for item in contributions if (view := whole_tensor(item.update)) is not None]
    replaced = len(wholes) == len(contributions) == 1 and contributions[0].weight == 1
    start = wholes[0].load() if weight is None or replaced else weight
    alone = contributions[0] if len(contributions) == 1 else None
    if alone is not None and alone.weight == 1 and isinstance(alone.update, Patch):
        return patched(alone.update, start), [], False  # copied, not computed: every bit is the adapter's
    terms: list[Term] = []
    by_column = False
    for item in contributions:
        terms += _terms_of(item, start, begun=start is not weight)
        by_column |= item.bound.transposed and isinstance(item.update, LowRank) and item.update.magnitude is not None
    return start, terms, by_column


def _terms_of(item: Contribution, start: torch.Tensor, *, begun: bool) -> list[Term]:
    """Return the terms of one contribution; `begun` says that the whole tensor it may bring is `start` already."""
    import torch

    from loramgr.algebra.terms import AddedTerm, LowRankTerm, ReplacedTerm

    update, weight = item.update, item.weight
    whole = whole_tensor(update)
    terms: list[Term] = [] if whole is None or begun else [ReplacedTerm(_matrix(whole.load()), weight)]
    match update:
        case Replacement():
            return terms
        case Rows():
            changed = (start if whole is None else whole.load()).to(torch.float64, copy=True)
            changed[list(update.indices)] = update.rows.load().double()
            return [ReplacedTerm(_matrix(changed), weight)]
        case Shift():
            one = torch.ones((1, 1))
            return [*terms, LowRankTerm(one, update.vector.load()[None], update.scaling, weight)]
        case LowRank():
            return _low_rank_terms(update, item, terms, begun=begun)
        case Opaque():
            raise IncompatibleError(f"{update.tensor.spec.name}: {update.method}: {update.reason}")
    if isinstance(update, Additive):
        return [AddedTerm(_matrix(delta_of(update, tuple(start.shape))), weight)]
    assert isinstance(update, Rebuilding)
    return [ReplacedTerm(_matrix(applied(update, start, transposed=item.bound.transposed)), weight)]


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
    from loramgr.algebra.finite import all_finite

    if all_finite(merged):
        return
    count = int((~merged.isfinite()).sum())
    refs = ", ".join(item.pick.ref for item in contributions)
    raise IncompatibleError(
        f"{name}: {count} of {merged.numel()} merged weights are NaN or infinite in {merged.dtype} (with {refs})",
        "--dtype float32 where the range is too small, or --force to write it as it is",
    )
