"""How the entries of several deltas become one: sums, and sums of those that agree on a sign."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["Consensus", "agreeing_mean", "agreeing_sum", "agreeing_weighted_mean", "weighted_sum"]

Consensus = Callable[[Sequence[torch.Tensor], Sequence[float]], torch.Tensor]


def weighted_sum(blocks: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return Σ wᵢ·xᵢ."""
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(block, alpha=weight)
    return total


def agreeing_mean(blocks: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return Σ wᵢ·xᵢ / n over the n entries with the sign of Σ xᵢ: TIES' disjoint mean with its λ as the weights."""
    positive = weighted_sum(blocks, [1.0] * len(blocks)) >= 0
    total, count = torch.zeros_like(blocks[0]), torch.zeros_like(blocks[0])
    for block, weight in zip(blocks, weights, strict=True):
        agrees = _agrees(block, positive)
        total.add_(torch.where(agrees, block, 0.0), alpha=weight)
        count += agrees
    return total / count.clamp_(min=1)


def agreeing_sum(blocks: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return Σ wᵢ·xᵢ over the terms with the sign of the whole sum Σ wᵢ·xᵢ."""
    scaled = [block * weight for block, weight in zip(blocks, weights, strict=True)]
    positive = weighted_sum(scaled, [1.0] * len(scaled)) >= 0
    return weighted_sum([torch.where(_agrees(term, positive), term, 0.0) for term in scaled], [1.0] * len(scaled))


def agreeing_weighted_mean(blocks: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return Σ wᵢ·xᵢ / Σ wᵢ over the terms with the sign of the whole sum Σ wᵢ·xᵢ.

    Where their weights cancel, as those of different signs may, nothing is divided.
    """
    positive = weighted_sum(blocks, weights) >= 0
    total, mass = torch.zeros_like(blocks[0]), torch.zeros_like(blocks[0])
    for block, weight in zip(blocks, weights, strict=True):
        agrees = _agrees(block * weight, positive)
        total.add_(torch.where(agrees, block, 0.0), alpha=weight)
        mass.add_(agrees, alpha=weight)
    return total / torch.where(mass.abs() < _NOTHING, 1.0, mass)


_NOTHING = 1e-8  # below which mergekit takes a divisor for zero


def _agrees(block: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Say which entries have the elected sign; a zero has none."""
    return torch.where(positive, block > 0, block < 0)
