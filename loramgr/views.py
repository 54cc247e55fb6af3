"""Tensors that are computed from an adapter's own when they are needed: transposed, cut out, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loramgr.tensorfile import Data, TensorSpec, TensorView

if TYPE_CHECKING:
    import torch

__all__ = ["ComputedTensor", "renamed_view", "transposed"]


@dataclass(frozen=True, slots=True)
class ComputedTensor:
    """A tensor that `make` computes, a `TensorView`; the spec says what comes out, and its name is that of a source."""

    spec: TensorSpec
    make: Callable[[], torch.Tensor]

    def load(self) -> torch.Tensor:
        """Return the tensor, contiguous on the CPU; ValueError when it is not what the spec announces."""
        from loramgr.tensors import torch_dtype

        tensor = self.make().contiguous()
        if tuple(tensor.shape) != self.spec.shape or tensor.dtype != torch_dtype(self.spec.dtype):
            raise ValueError(f"{self.spec.name} was made as {tuple(tensor.shape)} {tensor.dtype}")
        return tensor

    def read_bytes(self) -> Data:
        """Return the bytes of the tensor."""
        from loramgr.tensors import as_bytes

        return as_bytes(self.load())


def transposed(view: TensorView, first: int = -2, second: int = -1) -> ComputedTensor:
    """Return a view of the tensor with two of its dimensions exchanged, the last two where none are named."""
    shape = list(view.spec.shape)
    shape[first], shape[second] = shape[second], shape[first]
    spec = TensorSpec(view.spec.name, view.spec.dtype, tuple(shape))
    return ComputedTensor(spec, lambda: view.load().transpose(first, second))


def renamed_view(view: TensorView, name: str) -> ComputedTensor:
    """Return a view of the same tensor by another name."""
    return ComputedTensor(TensorSpec(name, view.spec.dtype, view.spec.shape), view.load)
