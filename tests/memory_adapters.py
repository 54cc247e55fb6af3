"""Adapters made in memory, for tests of what happens after reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from loramgr.adapter import Adapter, LowRank, Replacement, Rows, Shift, Update
from loramgr.pickles import MemoryTensor
from loramgr.tensorfile import TensorSpec


def tensor(*shape: int, value: float = 0.5) -> MemoryTensor:
    """Return a float32 tensor of one value."""
    return MemoryTensor(TensorSpec("tensor", "F32", shape), torch.full(shape, value))


def low_rank(out: int, into: int, **changes: Any) -> LowRank:
    """Return a matrix's update of rank 2 and scaling 2."""
    return replace(LowRank("linear", tensor(2, into), tensor(out, 2), 2, 4.0, 2.0), **changes)


def embedding(vocabulary: int, dim: int, **changes: Any) -> LowRank:
    """Return an embedding's update of rank 2 and scaling 2."""
    return replace(LowRank("embedding", tensor(2, vocabulary), tensor(dim, 2), 2, 4.0, 2.0), **changes)


def saved(*shape: int) -> Replacement:
    """Return a tensor that was saved whole."""
    return Replacement(tensor(*shape))


def rows(indices: tuple[int, ...], dim: int) -> Rows:
    """Return trained rows."""
    return Rows(indices, tensor(len(indices), dim))


def shift(size: int) -> Shift:
    """Return an update of a bias."""
    return Shift(tensor(size), 2.0)


def adapter(updates: Mapping[str, Update], **changes: Any) -> Adapter:
    """Return an adapter that consists of the updates."""
    return replace(Adapter("peft", "lora", {}, dict(updates), {}, 4.0, 2.0, ()), **changes)


def specs(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, TensorSpec]:
    """Return the tensors of a base by their shapes."""
    return {name: TensorSpec(name, dtype, shape) for name, shape in shapes.items()}
