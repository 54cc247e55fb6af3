"""Midpoint-radius arithmetic: float64 tensors that carry a bound of their own error.

A `Ball` holds every real number within `radius` of `value`, elementwise. Whatever order, thread count or device the
float64 operations behind it use, the exact result lies inside (Rump, "Fast and parallel interval arithmetic", 1999).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Ball", "U", "product", "root_of_squares"]

U = 2.0**-53  # unit roundoff of float64
_BLOCK = 64
# Radii are computed in rounded arithmetic too: a few operations of relative error U each, covered many times over.
_SLACK = 1.0 + 2.0**-30


@dataclass(frozen=True, slots=True)
class Ball:
    """Real numbers known to lie within `radius` of `value`; both float64, broadcastable to each other."""

    value: torch.Tensor
    radius: torch.Tensor

    @classmethod
    def exactly(cls, tensor: torch.Tensor) -> Ball:
        """Return the ball of a tensor whose values are exact (every float dtype embeds in float64)."""
        value = tensor.to(torch.float64)
        return cls(value, torch.zeros((), dtype=torch.float64, device=value.device))

    def __add__(self, other: Ball) -> Ball:
        value = self.value + other.value
        return Ball(value, (self.radius + other.radius + value.abs() * U) * _SLACK)

    def __sub__(self, other: Ball) -> Ball:
        value = self.value - other.value
        return Ball(value, (self.radius + other.radius + value.abs() * U) * _SLACK)

    def __mul__(self, other: Ball) -> Ball:
        value = self.value * other.value
        spread = self.value.abs() * other.radius + self.radius * (other.value.abs() + other.radius)
        return Ball(value, (spread + value.abs() * U) * _SLACK)

    def __truediv__(self, other: Ball) -> Ball:
        value = self.value / other.value
        spread = (self.radius + value.abs() * other.radius) / (other.value.abs() - other.radius)
        return Ball(value, (spread + value.abs() * (2 * U)) * _SLACK)


def product(left: torch.Tensor, right: torch.Tensor, left_error: int = 0) -> Ball:
    """Return left @ right for float64 factors (m, r) and (r, n) with an a-priori bound of its error.

    `left_error` counts the roundings that each entry of `left` already went through. The bound
    γ(r + 1 + left_error)·Σ|l·r| holds for any summation order (Higham, Accuracy and Stability, §3.5); Σ|l·r| is bounded
    by the product of the norms of row and column (Cauchy-Schwarz), so it costs no second product.
    """
    terms = left.shape[1] + 1 + left_error
    gamma = terms * U / (1 - terms * U)
    norms = left.norm(dim=1, keepdim=True) * right.norm(dim=0, keepdim=True)
    return Ball(left @ right, norms * (gamma * _SLACK))


def root_of_squares(ball: Ball) -> Ball:
    """Return the Euclidean norm of every row of an (m, n) ball, as an (m, 1) ball.

    Squares are summed in blocks of 64, so the summation's bound is (64 + n/64)·U instead of n·U.
    """
    squares = ball.value.square()
    columns = squares.shape[1]
    pad = -columns % _BLOCK
    blocks = torch.nn.functional.pad(squares, (0, pad)).reshape(squares.shape[0], -1, _BLOCK)
    value = blocks.sum(dim=2).sum(dim=1, keepdim=True).sqrt()
    summing = (_BLOCK + blocks.shape[1] + 3) * U
    inherited = torch.broadcast_to(ball.radius, ball.value.shape).norm(dim=1, keepdim=True) * (1 + columns * U)
    return Ball(value, (inherited + value * summing) * _SLACK)
