"""Low-rank factors as the fast numerics take them: one product and one coefficient for everything that is added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramgr.algebra.terms import LowRankTerm
from loramgr.errors import IncompatibleError, UsageError

__all__ = ["FACTOR_DTYPES", "Factors", "stacked"]

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Factors:
    """scaling · left @ right with left (m, r) and right (r, n), in the weight's own (rows, columns) layout.

    The factors are float32, bfloat16 or float16, on one device, of any strides; the rank may be 0. Raises
    IncompatibleError for shapes, dtypes or devices that do not fit, and for a scaling outside of float32.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise IncompatibleError(f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)} have no product")
        if left.dtype not in FACTOR_DTYPES or right.dtype not in FACTOR_DTYPES:
            raise IncompatibleError(f"factors in {left.dtype} and {right.dtype} need exact numerics")
        if left.device != right.device:
            raise IncompatibleError(f"the factors lie on {left.device} and on {right.device}")
        if not abs(self.scaling) <= torch.finfo(torch.float32).max:
            raise IncompatibleError(f"a scaling of {self.scaling} is no finite float32 number")

    @property
    def rank(self) -> int:
        """The rank r, that of all terms together."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, n) of the product."""
        return self.left.shape[0], self.right.shape[1]

    def transposed(self) -> Factors:
        """Return the factors of the transposed product."""
        return Factors(self.right.T, self.left.T, self.scaling)

    def rows(self, rows: slice) -> Factors:
        """Return the factors of some rows of the product."""
        return Factors(self.left[rows], self.right, self.scaling)

    def to(self, device: torch.device) -> Factors:
        """Return the factors on a device."""
        return Factors(self.left.to(device), self.right.to(device), self.scaling)


def stacked(terms: Sequence[LowRankTerm]) -> Factors:
    """Return the factors of the sum of weighted terms: left (m, R) and right (R, n), R the sum of the ranks.

    Terms of one coefficient (weight · scaling) keep their factors as they are. Otherwise the left ones become float32
    with the coefficients folded in, every entry rounded once (a power of two is exact). That rounding takes the place
    of the one by the coefficient, so the bound in `fast` holds with r = R either way.
    Raises UsageError without terms, IncompatibleError for terms that do not fit each other.
    """
    if not terms:
        raise UsageError("a sum of adapters needs at least one adapter")
    if len({(term.left.shape[0], term.right.shape[1]) for term in terms}) > 1:
        raise IncompatibleError("the adapters to be summed have different shapes")
    coefficients = {term.scaling * term.weight for term in terms}
    if len(coefficients) == 1:
        return Factors(_joined([t.left for t in terms], 1), _joined([t.right for t in terms], 0), coefficients.pop())
    lefts = [(term.left.double() * (term.scaling * term.weight)).float() for term in terms]
    return Factors(torch.cat(lefts, 1), _joined([term.right for term in terms], 0), 1.0)


def _joined(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate in a dtype that holds every entry exactly: bfloat16 and float16 meet in float32."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors], dim)
