"""Midpoint-radius arithmetic: float64 tensors that carry a bound of their own error.

A `Ball` holds every real number within `radius + relative · |value|` of `value`, elementwise. Whatever order, thread
count or device the float64 operations behind it use, the exact result lies inside (Rump, "Fast and parallel interval
arithmetic", 1999). What overflows or divides by zero ends as a bound that is infinite or NaN, never as a small one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["SLACK", "TINY", "Ball", "U", "root_of_squares"]

U = 2.0**-53  # unit roundoff of float64
# Bounds are computed in rounded arithmetic too: a few operations of relative error U each, covered many times over.
SLACK = 1.0 + 2.0**-30
# More than a thousand roundings into the subnormal range (2^-1075 each), of a product or of its bound, can add up to.
TINY = 2.0**-1000
_BLOCK = 64
_SAFE_NORM = 2.0**400


@dataclass(frozen=True, slots=True)
class Ball:
    """Real numbers known to lie within `radius + relative · |value|` of `value`.

    `value` and `radius` are float64; the radius broadcasts to the value.
    """

    value: torch.Tensor
    radius: torch.Tensor
    relative: float = 0.0

    @classmethod
    def exactly(cls, tensor: torch.Tensor) -> Ball:
        """Return the ball of a tensor whose values are exact (every float dtype embeds in float64)."""
        value = tensor.to(torch.float64)
        return cls(value, torch.zeros((), dtype=torch.float64, device=value.device))

    def at(self, *places: torch.Tensor) -> Ball:
        """Return the ball (k,) of single entries, by one index tensor (k,) for each dimension."""
        return Ball(self.value[places], self.radius.expand_as(self.value)[places], self.relative)

    def error(self) -> torch.Tensor:
        """Return the bound as one tensor, which broadcasts to the value."""
        if not self.relative:
            return self.radius
        return torch.add(self.radius + TINY, self.value.abs(), alpha=self.relative * SLACK)

    def __add__(self, other: Ball) -> Ball:
        value = self.value + other.value
        return Ball(value, (self.error() + other.error() + value.abs() * U) * SLACK)

    def __sub__(self, other: Ball) -> Ball:
        value = self.value - other.value
        return Ball(value, (self.error() + other.error() + value.abs() * U) * SLACK)

    def __mul__(self, other: Ball) -> Ball:
        value, error, others = self.value * other.value, self.error(), other.error()
        spread = self.value.abs() * others + error * (other.value.abs() + others)
        return Ball(value, (spread + value.abs() * U) * SLACK + TINY)

    def __truediv__(self, other: Ball) -> Ball:
        """|A/B - a/b| = |A·b - a·B| / |B·b| ≤ (α + |a/b|·β) / (|b| - β), where |A - a| ≤ α and |B - b| ≤ β < |b|."""
        value, others = self.value / other.value, other.error()
        room = other.value.abs() - others * SLACK
        spread = (self.error() + value.abs() * others) / room
        radius = (spread + value.abs() * (2 * U)) * SLACK + TINY
        return Ball(value, torch.where(room > other.value.abs() * 2.0**-20, radius, torch.inf))


def root_of_squares(ball: Ball) -> Ball:
    """Return the Euclidean norm of every row of an (m, n) ball, as an (m, 1) ball.

    Squares are summed in blocks of 64, so the summation's bound is (64 + n/64)·U instead of n·U. Norms outside
    2^±400, whose squares may leave float64's range, get an infinite radius.
    """
    squares = ball.value.square()
    columns = squares.shape[1]
    pad = -columns % _BLOCK
    blocks = torch.nn.functional.pad(squares, (0, pad)).reshape(squares.shape[0], -1, _BLOCK)
    value = blocks.sum(dim=2).sum(dim=1, keepdim=True).sqrt()
    summing = (_BLOCK + blocks.shape[1] + 3) * U
    inherited = ball.error().expand_as(ball.value).norm(dim=1, keepdim=True) * (1 + columns * U)
    radius = (inherited + value * summing) * SLACK
    return Ball(value, torch.where((value > 1 / _SAFE_NORM) & (value < _SAFE_NORM), radius, torch.inf))
