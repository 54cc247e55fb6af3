"""loralib's layers whose factors are not those of a plain product, as the plain products that they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from loramgr.adapter import LowRank
from loramgr.errors import IncompatibleError, UsageError
from loramgr.tensorfile import TensorSpec
from loramgr.views import ComputedTensor

if TYPE_CHECKING:
    import torch

__all__ = ["EMBEDDINGS", "convolution", "is_embedding", "merged_linear"]

EMBEDDINGS = frozenset({
    "embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "tok_embeddings",
    "embed_in", "shared", "embeddings", "embedding",
})  # fmt: skip


def is_embedding(module: str) -> bool:
    """Say whether a module is a table of embeddings, by the name that models give it."""
    return module.rpartition(".")[2] in EMBEDDINGS


def merged_linear(name: str, update: LowRank, spec: TensorSpec, enabled: tuple[bool, ...] | None) -> LowRank:
    """Return MergedLinear's update: slice g of the outputs changes by scaling · B_g A_g, the others not at all.

    lora_A is (r · n, in) and lora_B (out / slices · n, r) of the n enabled slices. The product of r · n columns has
    zeros in lora_B where a slice's rows meet another's columns. Raises UsageError where not all slices are enabled and
    nobody said which, and IncompatibleError where the shapes are no slices of the weight.
    """
    lora_A, lora_B = update.lora_A, update.lora_B
    (rows, inputs), (height, rank) = lora_A.spec.shape, lora_B.spec.shape
    count = rows // rank
    width = height // count
    outputs = _other(name, spec, inputs)
    if outputs % width or outputs // width < count:
        raise IncompatibleError(f"{name}: {count} slices of {width} rows are none of {outputs} outputs")
    chosen = _enabled(name, outputs // width, count, enabled)
    if lora_A.spec.dtype != lora_B.spec.dtype:
        raise IncompatibleError(f"{name}: lora_A is {lora_A.spec.dtype} and lora_B is {lora_B.spec.dtype}")

    def spread() -> torch.Tensor:
        import torch

        stored = lora_B.load()
        whole = torch.zeros((outputs, rows), dtype=stored.dtype)
        for index, place in enumerate(chosen):
            block = stored[index * width : (index + 1) * width]
            whole[place * width : (place + 1) * width, index * rank : (index + 1) * rank] = block
        return whole

    view = ComputedTensor(TensorSpec(lora_B.spec.name, lora_B.spec.dtype, (outputs, rows)), spread)
    return replace(update, kind="linear", lora_B=view, rank=rows)


def _other(name: str, spec: TensorSpec, inputs: int) -> int:
    """Return the outputs of a weight with so many inputs, stored either way."""
    if inputs not in spec.shape or len(spec.shape) != 2:
        raise IncompatibleError(f"{name}: lora_A has {inputs} inputs, and the weight is {list(spec.shape)}")
    return spec.shape[0] if spec.shape[1] == inputs else spec.shape[1]


def _enabled(name: str, slices: int, count: int, enabled: tuple[bool, ...] | None) -> list[int]:
    """Return the places of the enabled slices, in their order."""
    if count == slices:
        return list(range(slices))
    if enabled is None:
        raise UsageError(
            f"{name}: factors for {count} of {slices} slices of a fused weight, and the file does not say of which",
            "say it with --enable-lora, as true,false,true for q and v of q, k and v",
        )
    places = [place for place, flag in enumerate(enabled) if flag]
    if len(enabled) != slices or len(places) != count:
        raise UsageError(
            f"{name}: enable_lora names {len(places)} of {len(enabled)} slices, the file {count} of {slices}"
        )
    return places


def convolution(name: str, update: LowRank, spec: TensorSpec) -> LowRank:
    """Return ConvLoRA's update of a kernel (out, in, k…): lora_B lora_A, row after row, viewed as the kernel.

    lora_A is (r · k, in · k), lora_B (out · k^(d-1), r · k), d the dimensions of the kernel. A kernel's row is
    made of k^(d-1) rows of the product, so that the same delta is the product of lora_B, (out, k^(d-1) · r · k), and of
    as many copies of lora_A along a diagonal. Raises IncompatibleError for a grouped convolution.
    """
    lora_A, lora_B = update.lora_A, update.lora_B
    (rank, inner), height = lora_A.spec.shape, lora_B.spec.shape[0]
    outputs, kernel = spec.shape[0], spec.shape[2:]
    if len(set(kernel)) != 1 or height * inner != math.prod(spec.shape) or height % outputs or rank % kernel[0]:
        raise IncompatibleError(
            f"{name}: lora_B {list(lora_B.spec.shape)} times lora_A {list(lora_A.spec.shape)} is no kernel "
            f"{list(spec.shape)}"
        )
    copies = height // outputs
    whole = rank * copies
    first = ComputedTensor(
        TensorSpec(lora_A.spec.name, lora_A.spec.dtype, (whole, *spec.shape[1:])),
        lambda: _diagonal(lora_A.load(), copies).reshape(whole, *spec.shape[1:]),
    )
    shape = (outputs, whole, *(1 for _ in kernel))
    second = ComputedTensor(
        TensorSpec(lora_B.spec.name, lora_B.spec.dtype, shape), lambda: lora_B.load().reshape(shape)
    )
    scaling = update.alpha / (rank // kernel[0])
    return replace(update, kind="conv", lora_A=first, lora_B=second, rank=whole, scaling=scaling)


def _diagonal(tensor: torch.Tensor, copies: int) -> torch.Tensor:
    import torch

    whole = torch.zeros((tensor.shape[0] * copies, tensor.shape[1] * copies), dtype=tensor.dtype)
    for index in range(copies):
        rows, columns = index * tensor.shape[0], index * tensor.shape[1]
        whole[rows : rows + tensor.shape[0], columns : columns + tensor.shape[1]] = tensor
    return whole
