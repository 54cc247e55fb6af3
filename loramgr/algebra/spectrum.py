"""Singular values and norms of low-rank deltas from their factors, without building the delta.

With QR of both factors, B A = Q_B (R_B R_Aᵀ) Q_Aᵀ has the singular values of the small core R_B R_Aᵀ. In float64; Gram
matrices would lose half of the digits.
"""

from __future__ import annotations

import math

import torch

__all__ = ["binary_scale", "effective_rank", "frobenius_norm", "singular_values"]


def singular_values(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the singular values of scaling · lora_B @ lora_A, largest first, float64, at most min(r, in, out).

    `lora_A` is (r, in), `lora_B` (out, r).
    """
    core_A = torch.linalg.qr(lora_A.double().T, mode="r").R
    core_B = torch.linalg.qr(lora_B.double(), mode="r").R
    values: torch.Tensor = torch.linalg.svdvals(core_B @ core_A.T) * abs(scaling)
    return values


def frobenius_norm(values: torch.Tensor) -> float:
    """Return the Frobenius norm of a matrix, or of the one with these singular values, also where squares overflow."""
    scale = binary_scale(values)
    return scale * float((values / scale).norm())


def binary_scale(values: torch.Tensor) -> float:
    """Return the power of two by which the largest magnitude is at least 1 and below 2; 1 where all are zero."""
    peak = float(values.abs().amax()) if values.numel() else 0.0
    return math.ldexp(1.0, math.frexp(peak)[1] - 1) if peak and math.isfinite(peak) else 1.0


def effective_rank(values: torch.Tensor) -> float:
    """Return exp of the entropy of the normalised singular values; 0 for a zero matrix.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality" (2007).
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())
