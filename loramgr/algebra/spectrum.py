"""Singular values and norms of low-rank deltas from their factors, without building the delta.

With QR of both factors, B A = Q_B (R_B R_Aᵀ) Q_Aᵀ has the singular values of the small core R_B R_Aᵀ. In float64; Gram
matrices would lose half of the digits.
"""

from __future__ import annotations

import torch

__all__ = ["effective_rank", "frobenius_norm", "singular_values"]


def singular_values(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the singular values of scaling · lora_B @ lora_A, largest first, float64, at most min(r, in, out).

    `lora_A` is (r, in), `lora_B` (out, r).
    """
    core_A = torch.linalg.qr(lora_A.double().T, mode="r").R
    core_B = torch.linalg.qr(lora_B.double(), mode="r").R
    values: torch.Tensor = torch.linalg.svdvals(core_B @ core_A.T) * abs(scaling)
    return values


def frobenius_norm(values: torch.Tensor) -> float:
    """Return the Frobenius norm of the matrix with these singular values."""
    return float(values.norm())


def effective_rank(values: torch.Tensor) -> float:
    """Return exp of the entropy of the normalised singular values; 0 for a zero matrix.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality" (2007).
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())
