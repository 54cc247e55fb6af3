"""Decides whether merged weights are correctly rounded, with nothing of loramgr's own arithmetic.

Values are computed in extended precision (numpy's longdouble, at least 64 bits) with a bound of their error, and in
rational arithmetic where that bound leaves the rounding open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

EPSILON = float(np.finfo(np.longdouble).eps)
_BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
}


@dataclass
class Expected:
    """An exact matrix: `value` in extended precision, off by at most `error`; `exactly(i, j)` for single entries."""

    value: np.ndarray
    error: np.ndarray
    exactly: Callable[[int, int], tuple[Fraction, Fraction]]


def extended(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values in extended precision."""
    return tensor.double().numpy().astype(np.longdouble)


def low_rank(weight: torch.Tensor, terms: list[tuple[torch.Tensor, torch.Tensor, Fraction]]) -> Expected:
    """Return weight + Σ coefficient · left @ right for (m, n), (m, r), (r, n)."""
    value = extended(weight)
    size = np.abs(value)
    for left, right, coefficient in terms:
        scale = np.longdouble(coefficient.numerator) / np.longdouble(coefficient.denominator)
        for k in range(left.shape[1]):
            product = np.multiply.outer(extended(left[:, k]) * scale, extended(right[k]))
            value = value + product
            size = size + np.abs(product)
    rank = sum(left.shape[1] for left, _, _ in terms)

    def exactly(i: int, j: int) -> tuple[Fraction, Fraction]:
        total = Fraction(weight[i, j].item())
        for left, right, coefficient in terms:
            total += coefficient * _dot(left[i], right[:, j])
        return total, total

    return Expected(value, size * EPSILON * (rank + 4), exactly)


def decomposed(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: Fraction, magnitude: torch.Tensor
) -> Expected:
    """Return magnitude · V / ‖V‖ with V = weight + scaling · left @ right and one norm per row."""
    direction = low_rank(weight, [(left, right, scaling)])
    norm = np.sqrt((direction.value**2).sum(axis=1, keepdims=True))
    value = extended(magnitude)[:, None] * direction.value / norm
    drift = np.sqrt((direction.error**2).sum(axis=1, keepdims=True)) / norm + EPSILON * (weight.shape[1] + 8)
    gain = np.abs(extended(magnitude)[:, None]) / norm

    def exactly(i: int, j: int) -> tuple[Fraction, Fraction]:
        row = [direction.exactly(i, column)[0] for column in range(weight.shape[1])]
        low, high = _root(sum(entry**2 for entry in row))
        ends = sorted(Fraction(magnitude[i].item()) * row[j] / root for root in (low, high))
        return ends[0], ends[1]

    return Expected(value, gain * direction.error * 2 + np.abs(value) * drift * 2, exactly)


def misrounded(merged: torch.Tensor, expected: Expected) -> list[tuple[int, int]]:
    """Return the entries of a merged matrix that are not the nearest number of its dtype, ties to even."""
    below, above = _neighbours(merged)
    here = extended(merged)
    low, high = (extended(below) + here) / 2, (extended(above) + here) / 2  # exact: one bit more than the dtype has
    sure = (expected.value - expected.error > low) & (expected.value + expected.error < high)
    wrong = []
    for i, j in zip(*np.nonzero(~sure), strict=True):
        ends = expected.exactly(int(i), int(j))
        if not all(_is_nearest(end, merged[i, j], below[i, j], above[i, j]) for end in ends):
            wrong.append((int(i), int(j)))
    return wrong


def _is_nearest(value: Fraction, here: torch.Tensor, below: torch.Tensor, above: torch.Tensor) -> bool:
    distances = [abs(value - Fraction(candidate.item())) for candidate in (here, below, above)]
    if distances[0] > min(distances):
        return False
    tied = distances.count(distances[0]) > 1
    return not tied or _is_even(here)


def _is_even(number: torch.Tensor) -> bool:
    integers, _ = _BITS[number.dtype]
    return int(number.reshape(1).view(integers)) % 2 == 0


def _neighbours(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next smaller and next larger number of the dtype for every entry."""
    integers, mask = _BITS[tensor.dtype]
    bits = tensor.contiguous().view(integers).long()
    ordered = torch.where(bits >= 0, bits, -(bits & mask))  # integers in the order of the numbers
    return _from_ordered(ordered - 1, tensor.dtype), _from_ordered(ordered + 1, tensor.dtype)


def _from_ordered(ordered: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    integers, mask = _BITS[dtype]
    sign = -(mask + 1)
    bits = torch.where(ordered >= 0, ordered, sign | -ordered)
    return bits.to(integers).view(dtype)


def _dot(left: torch.Tensor, right: torch.Tensor) -> Fraction:
    return sum((Fraction(a) * Fraction(b) for a, b in zip(left.tolist(), right.tolist(), strict=True)), Fraction(0))


def _root(square: Fraction) -> tuple[Fraction, Fraction]:
    scaled = (square.numerator << 600) // square.denominator
    root = math.isqrt(scaled)
    return Fraction(root, 1 << 300), Fraction(root + 1, 1 << 300)


@dataclass
class Delta:
    """One low-rank update of a PEFT adapter, read by the formulas of PEFT's documentation alone."""

    module: str
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: Fraction
    magnitude: torch.Tensor | None
    embedding: bool


def deltas(folder: Path) -> Iterator[Delta]:
    """Yield the low-rank updates of a PEFT adapter; patterns by exact suffix, as the test data has them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, lora_A in sorted(tensors.items()):
        for ending in (".lora_A.weight", ".lora_embedding_A"):
            if key.endswith(ending):
                module = key.removesuffix(ending).removeprefix("base_model.model.")
                other = key.removesuffix(ending) + ending.replace("_A", "_B")
                magnitude = tensors.get(key.removesuffix(ending) + ".lora_magnitude_vector")
                scaling = _scaling(config, module, lora_A.shape[0])
                yield Delta(module, lora_A, tensors[other], scaling, magnitude, "embedding" in ending)


def replaced(folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors that a PEFT adapter carries, by the parameter they replace."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for key, tensor in tensors.items()
        if ".lora_" not in key
    }


def _scaling(config: dict[str, object], module: str, rank: int) -> Fraction:
    alpha = config["lora_alpha"]
    for pattern, value in dict(config.get("alpha_pattern") or {}).items():
        if f".{module}".endswith(f".{pattern}"):
            alpha = value
    if config.get("use_rslora"):
        return Fraction(float(alpha) / math.sqrt(rank))
    return Fraction(float(alpha)) / rank
