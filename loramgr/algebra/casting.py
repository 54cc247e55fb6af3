"""Tensors in another floating-point dtype, every value rounded once."""

from __future__ import annotations

import torch

from loramgr.algebra.rounding import round_float64

__all__ = ["rounded"]


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in another floating-point dtype, or itself when it has that dtype."""
    return tensor if tensor.dtype == dtype else round_float64(tensor.double(), dtype)
