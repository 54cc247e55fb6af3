"""One tensor of a model in memory: what is merged into it, and how it becomes the base's again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loramgr.algebra import engine
from loramgr.algebra.engine import Change, Kept, Merged
from loramgr.algebra.finite import all_finite
from loramgr.algebra.float8 import FLOAT8, largest
from loramgr.algebra.residual import BITS
from loramgr.errors import IncompatibleError, LoramgrError
from loramgr.tensorfile import TensorSpec
from loramgr.workspace.computing import Merger, pick_device
from loramgr.workspace.contributions import Contribution

if TYPE_CHECKING:
    import torch

__all__ = ["Content", "LiveTensor", "Rewrite", "Sum", "settle"]


@dataclass(frozen=True, slots=True)
class Sum:
    """Low-rank deltas, added in place and taken out again by a residual.

    No weight changes by more than `reach`, in exact arithmetic; `force` lets results through that are not finite.
    """

    change: Change
    reach: float
    force: bool


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Updates that no sum takes out again: the tensor is computed as on disk from its original, which is kept.

    With `fresh` the base has no such tensor, so that the one that an adapter brings counts whatever its weight.
    """

    spec: TensorSpec
    contributions: tuple[Contribution, ...]
    numerics: str
    fresh: bool
    force: bool


Content = Sum | Rewrite


class LiveTensor:
    """A tensor of the model, which keeps its storage, and what it takes to undo what was merged into it.

    `sha256` is the digest of the bytes it has without anything merged, None where nobody asked for proofs; `merged` is
    what the engine left behind for a Sum, None for anything else.
    """

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.tensor = tensor
        self.sha256: str | None = None
        self.content: Content | None = None
        self.merged: Merged | None = None
        self._largest = _largest(tensor)
        self._original: torch.Tensor | None = None
        self._unsure = False  # whether a change failed on its way, so that the bytes may not be all of what is merged

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory that undoing takes."""
        residual = 0 if self.merged is None else _residual(self.merged).nbytes
        return residual + (0 if self._original is None else self._original.numel() * self._original.element_size())

    def become(self, content: Content | None) -> str:
        """Change what is merged into the tensor, None for nothing, and return which kernel ran.

        What undoes a change is on record before anything else can fail. After a change that failed, the way to any
        content leads over the base, since a switch may have begun to take the old content out. A Sum is complete after
        `settle`. Raises IncompatibleError for a Rewrite that is not finite.
        """
        if content is self.content and not (self._unsure and content is not None):
            return "torch"
        again, self._unsure = self._unsure, True
        try:
            if again:
                self._restore()
            kernel = self._become(content)
        except LoramgrError as error:
            hint = "force=True to merge it as it is" if isinstance(content, Rewrite) else error.hint
            raise type(error)(f"{self.name}: {error.message.removeprefix(f'{self.name}: ')}", hint) from error
        self._unsure = False
        return kernel

    def check_finite(self) -> None:
        """Raise IncompatibleError when what is merged made NaN or infinities of the weights."""
        import torch

        if not isinstance(self.content, Sum) or self.content.force:
            return
        if self._largest + self.content.reach <= torch.finfo(self.tensor.dtype).max / 2:
            return
        tensor = self.tensor.detach()
        finite = all_finite(tensor) if tensor.dtype in FLOAT8 else torch.stack(torch.aminmax(tensor)).isfinite().all()
        if not finite:
            raise IncompatibleError(
                f"{self.name}: merged weights are NaN or infinite in {self.tensor.dtype}",
                "force=True to merge it as it is",
            )

    def recovered(self) -> torch.Tensor:
        """Return the tensor without what is merged into it; nothing is changed."""
        if self._original is not None:
            return self._original
        if not isinstance(self.content, Sum):
            return self.tensor.detach()
        scratch = _strided_copy(self.tensor)
        engine.unmerge_(_matrix(scratch), self.content.change, _residual(self.merged))
        return scratch

    def is_as_merged(self, recovered: torch.Tensor) -> bool:
        """Say whether merging into what `recovered` returned makes the tensor's bytes; it may be overwritten."""
        import torch

        match self.content:
            case Sum():
                engine.merge_(_matrix(recovered), self.content.change, residual=True)
            case Rewrite():
                recovered = _rewritten(self.content, recovered).to(self.tensor.device)
        bits = BITS[self.tensor.dtype]
        return torch.equal(recovered.view(bits), self.tensor.detach().view(bits))

    def _become(self, content: Content | None) -> str:
        if isinstance(content, Rewrite):
            return self._rewrite(content)
        if isinstance(content, Sum) and isinstance(self.content, Sum):
            old, residual = self.content.change, _residual(self.merged)
            merged = engine.switch_(_matrix(self.tensor), old, residual, content.change, wait=False)
        else:
            kernel = self._restore()
            if content is None:
                return kernel
            merged = engine.merge_(_matrix(self.tensor), content.change, residual=True, wait=False)
        self.content, self.merged = content, merged
        return merged.kernel

    def _rewrite(self, content: Rewrite) -> str:
        if self._original is None:
            self._restore()
        original = _strided_copy(self.tensor) if self._original is None else self._original
        made = _rewritten(content, original)
        self._original, self.content = original, content
        self.tensor.detach().copy_(made)
        return "torch"

    def _restore(self) -> str:
        """Give the tensor its bytes back; what that needs is let go of afterwards."""
        kernel = "torch"
        if self._original is not None:
            self.tensor.detach().copy_(self._original)
        elif isinstance(self.content, Sum):
            kernel = engine.unmerge_(_matrix(self.tensor), self.content.change, _residual(self.merged))
        self.content, self.merged, self._original = None, None, None
        return kernel


def settle(tensors: Sequence[LiveTensor]) -> None:
    """Complete what the tensors became, waiting once for all of them.

    Raises IncompatibleError, naming the tensor, for weights that are not finite; they can be taken back then, too.
    """
    engine.settle([each.merged for each in tensors if each.merged is not None])
    for each in tensors:
        each.check_finite()


def _residual(merged: Merged | None) -> Kept:
    assert merged is not None
    assert merged.residual is not None
    return merged.residual


def _rewritten(content: Rewrite, original: torch.Tensor) -> torch.Tensor:
    float8 = original.dtype in FLOAT8
    merger = Merger(pick_device(str(original.device))[0], content.force or float8, content.numerics)
    made = merger.merge(content.spec, None if content.fresh else original.cpu(), content.contributions).tensor
    if float8 and not (content.force or all_finite(made)):
        raise IncompatibleError(f"{content.spec.name}: merged weights are NaN or infinite in {made.dtype}")
    return made


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as (rows, columns), a view: what is not a matrix is contiguous where a Sum is for it."""
    own = tensor.detach()
    return own if own.dim() == 2 else own.view(own.shape[0], -1)


def _strided_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same strides: the bits of a delta may depend on them."""
    import torch

    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor.detach())


def _largest(tensor: torch.Tensor) -> float:
    """Return the largest absolute value, NaN where there is a NaN, 0 for an empty tensor."""
    import torch

    if not tensor.numel():
        return 0.0
    if tensor.dtype in FLOAT8:
        return largest(tensor.detach())
    return float(torch.stack(torch.aminmax(tensor.detach())).abs().max())
