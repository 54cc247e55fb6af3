"""Factors that stand for larger ones with zeros in known places, expanded when they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramgr.errors import IncompatibleError
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

if TYPE_CHECKING:
    import torch

__all__ = ["block_diagonal", "merged_linear"]


def merged_linear(
    module: str, lora_A: TensorView, lora_B: TensorView, enabled: tuple[bool, ...]
) -> tuple[TensorView, ComputedTensor]:
    """Return lora_A and lora_B of the whole fused weight, from those of its enabled slices (loralib's MergedLinear).

    With n of k slices enabled `lora_A` is (n·r, in), slice after slice, and `lora_B` (n·out/k, r), perhaps with a last
    dimension of 1; the result's lora_B is (out, n·r), each slice's rows at its place and zero elsewhere. Raises
    IncompatibleError, naming the module, for shapes that are not those of that many slices.
    """
    a, b = lora_A.spec.shape, lora_B.spec.shape
    count = sum(enabled)
    fits = len(a) == 2 and (len(b) == 2 or (len(b) == 3 and b[2] == 1)) and count > 0
    if not (fits and a[0] == count * b[1] and b[0] % count == 0 and 0 not in (*a, *b)):
        raise IncompatibleError(
            f"module {module}: lora_A is {a} and lora_B is {b}: not the factors of {count} of {len(enabled)} slices"
        )
    rank, height = b[1], b[0] // count

    def expanded() -> torch.Tensor:
        stored = lora_B.load().reshape(count, height, rank)
        result = stored.new_zeros((len(enabled), height, count, rank))
        places = [place for place, is_enabled in enumerate(enabled) if is_enabled]
        for index, place in enumerate(places):
            result[place, :, index] = stored[index]
        return result.reshape(len(enabled) * height, count * rank)

    spec = TensorSpec(lora_B.spec.name, lora_B.spec.dtype, (len(enabled) * height, count * rank))
    return lora_A, ComputedTensor(spec, expanded)


def block_diagonal(view: TensorView, blocks: int) -> ComputedTensor:
    """Return the matrix whose diagonal blocks are the view's rows, cut into that many pieces (BD-LoRA).

    (m, n) becomes (m, n·blocks). Raises IncompatibleError for rows that cannot be cut so.
    """
    shape = view.spec.shape
    if len(shape) != 2 or shape[0] % blocks or 0 in shape:
        raise IncompatibleError(f"{view.spec.name} is {shape}, which has no {blocks} diagonal blocks")

    def expanded() -> torch.Tensor:
        rows = view.load().reshape(blocks, shape[0] // blocks, shape[1])
        result = rows.new_zeros((blocks, shape[0] // blocks, blocks, shape[1]))
        for index in range(blocks):
            result[index, :, index] = rows[index]
        return result.reshape(shape[0], shape[1] * blocks)

    return ComputedTensor(TensorSpec(view.spec.name, view.spec.dtype, (shape[0], shape[1] * blocks)), expanded)
