"""Factors in the shape that an update needs, made from stored tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

if TYPE_CHECKING:
    import torch

__all__ = ["core_applied", "multiplied", "reshaped"]


def reshaped(view: TensorView, shape: Sequence[int]) -> TensorView:
    """Return the tensor in another shape of as many values, itself where it has that shape."""
    if view.spec.shape == tuple(shape):
        return view
    spec = TensorSpec(view.spec.name, view.spec.dtype, tuple(shape))
    return ComputedTensor(spec, lambda: view.load().reshape(tuple(shape)))


def core_applied(core: TensorView, down: TensorView) -> TensorView:
    """Return Σ core[p, q, k…] down[q, in] as (p, in, k…), in float64 and a fixed order.

    `core` is (p, q, k…) and `down` (q, in), the parts of a Tucker decomposition (LyCORIS `modules/locon.py`).
    """
    rows, _, *kernel = core.spec.shape
    inputs = down.spec.shape[1]
    spec = TensorSpec(down.spec.name, "F64", (rows, inputs, *kernel))

    def make() -> torch.Tensor:
        from loramgr.products import product

        left = core.load().double().movedim(1, -1).reshape(-1, core.spec.shape[1])
        made = product(left, down.load().double())
        return made.reshape(rows, *kernel, inputs).movedim(-1, 1)

    return ComputedTensor(spec, make)


def multiplied(view: TensorView, factor: float) -> TensorView:
    """Return the tensor times the factor, rounded once, in float64 where it is stored so and in float32 else."""
    if factor == 1:
        return view
    dtype = "F64" if view.spec.dtype == "F64" else "F32"

    def make() -> torch.Tensor:
        from loramgr.tensors import torch_dtype

        return (view.load().double() * factor).to(torch_dtype(dtype))

    return ComputedTensor(TensorSpec(view.spec.name, dtype, view.spec.shape), make)
