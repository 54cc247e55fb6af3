"""Tensors in another floating-point dtype, every value rounded once."""

from __future__ import annotations

import torch

from loramgr.algebra.float8 import FLOAT8, round_float8
from loramgr.algebra.rounding import round_float64

__all__ = ["rounded"]


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in another floating-point dtype, or itself when it has that dtype."""
    if tensor.dtype == dtype:
        return tensor
    return round_float8(tensor, dtype) if dtype in FLOAT8 else round_float64(tensor.double(), dtype)
