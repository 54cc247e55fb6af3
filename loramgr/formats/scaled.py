"""Factors whose scaling, rank or dtype is made fit for a reader that knows fewer of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from loramgr.adapter import LowRank
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

if TYPE_CHECKING:
    import torch

__all__ = ["as_dtype", "commonest", "padded", "times"]


def commonest(values: Iterable[float]) -> float:
    """Return the value that stands there most often, the first of several."""
    return Counter(values).most_common(1)[0][0]


def times(update: LowRank, factor: float) -> LowRank:
    """Return the update with lora_B multiplied by the factor and the scaling divided by it, in float32 or float64.

    Products are rounded once; a factor of 1 changes nothing.
    """
    if factor == 1:
        return update
    stored = update.lora_B
    dtype = "F64" if stored.spec.dtype == "F64" else "F32"

    def make() -> torch.Tensor:
        from loramgr.tensors import torch_dtype

        return (stored.load().double() * factor).to(torch_dtype(dtype))

    view = ComputedTensor(TensorSpec(stored.spec.name, dtype, stored.spec.shape), make)
    return replace(update, lora_B=view, scaling=update.scaling / factor)


def as_dtype(view: TensorView, dtype: str) -> TensorView:
    """Return the tensor in a dtype, itself where it has that."""
    if view.spec.dtype == dtype:
        return view

    def make() -> torch.Tensor:
        from loramgr.tensors import torch_dtype

        return view.load().to(torch_dtype(dtype))

    return ComputedTensor(TensorSpec(view.spec.name, dtype, view.spec.shape), make)


def padded(view: TensorView, dimension: int, size: int) -> TensorView:
    """Return the tensor with zeros behind its values in one dimension, so that it has that size."""
    shape = list(view.spec.shape)
    if shape[dimension] == size:
        return view
    own = shape[dimension]
    shape[dimension] = size

    def make() -> torch.Tensor:
        import torch

        whole = torch.zeros(shape, dtype=view.load().dtype)
        whole.narrow(dimension, 0, own).copy_(view.load())
        return whole

    return ComputedTensor(TensorSpec(view.spec.name, view.spec.dtype, tuple(shape)), make)
