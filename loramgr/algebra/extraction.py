"""Factors of low rank out of a dense matrix, such as the difference of two weights, with an error that is measured.

The range is found by random projection and power iterations (Halko, Martinsson & Tropp 2011, arXiv 0909.4061), in
float32 where that is enough for the directions; the factors come from a projection in float64. Small matrices, and
ranks that are a large part of the matrix, take the full decomposition, which is then the cheaper way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from hashlib import sha256

import torch

from loramgr.algebra.casting import rounded
from loramgr.algebra.goals import Goal
from loramgr.errors import IncompatibleError

__all__ = ["Extraction", "Near", "decomposed_near", "extracted", "residual_norm"]

_START = 32  # columns of the first sketch where the rank is not known yet
_CHEAPER = 4  # a sketch pays while it has at most this part of the smaller side
_MOST_ITERATIONS = 12
_GAIN = 1e-4  # of the energy found: a power iteration that brings less is the last one
_NEEDS_FLOAT64 = 1e-4  # relative errors below this are near what the rounding of a float32 sketch leaves
_TILE = {"cpu": 1 << 21, "cuda": 1 << 25}  # elements


@dataclass(frozen=True, slots=True)
class Near:
    """A matrix D as left · diag(values) · right and a rest: left (m, k) and right (k, n) orthonormal, float64.

    The rest is orthogonal to what the columns of `left` span; `rest` is its Frobenius norm, 0 where nothing is left,
    and `norm` that of D. `values` (k,) are the singular values of the part found, largest first, none above D's own.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    norm: float
    rest: float

    @property
    def rank(self) -> int:
        """The number of values that are more than the rounding of the first one."""
        if not self.values.numel():
            return 0
        rounding = max(self.left.shape[0], self.right.shape[1]) * torch.finfo(torch.float64).eps
        return int((self.values > float(self.values[0]) * rounding).sum())

    def errors(self) -> torch.Tensor:
        """Return the squared Frobenius norms (k + 1,) of what is left of D when the first 0, 1, … k values are kept."""
        squares = torch.cat([self.values.square(), torch.tensor([self.rest**2], dtype=torch.float64).to(self.values)])
        return squares.flip(0).cumsum(0).flip(0)

    def rank_for(self, goal: Goal) -> int | None:
        """Return the smallest rank that reaches the goal, None where more than this part of D is needed."""
        if goal.rank is not None:
            return min(goal.rank, self.rank)
        lost = goal.lost
        assert lost is not None
        if lost == 0:
            return self.rank if self.rest == 0 else None
        kept = (self.errors() <= lost * self.norm**2).nonzero()
        return max(1, int(kept[0, 0])) if len(kept) else None


@dataclass(frozen=True, slots=True)
class Extraction:
    """lora_B (m, r) and lora_A (r, n), in the dtype they are kept in, with scaling 1.

    `norm` is the Frobenius norm of the matrix, `error` that of the matrix minus lora_B lora_A as they are: it is
    summed from the differences themselves, and right to 1e-6 of itself unless it is below 1e-9 of the norm.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    norm: float
    error: float

    @property
    def rank(self) -> int:
        """The rank r of the factors, 0 for a matrix of zeros."""
        return self.lora_A.shape[0]


def extracted(matrix: torch.Tensor, goal: Goal, name: str, dtype: torch.dtype = torch.float32) -> Extraction:
    """Return the factors that reach the goal for a float64 matrix (m, n) on any device; its entries are finite.

    The random numbers follow from the name, so equal inputs give equal factors on one device. Raises
    IncompatibleError, naming the module, where the factors' dtype cannot hold the matrix or reach a largest error.
    """
    peak = float(matrix.abs().amax()) if matrix.numel() else 0.0
    if peak == 0:
        empty = torch.zeros(0, dtype=dtype)
        return Extraction(empty.view(0, 1).expand(0, matrix.shape[1]), empty.expand(matrix.shape[0], 0), 0.0, 0.0)
    scale = math.ldexp(1.0, math.frexp(peak)[1])
    scaled = matrix / scale  # a power of two: squares neither overflow nor vanish, and no digit is lost
    near = decomposed_near(scaled, goal, name)
    found = _smallest(scaled, near, goal, scale, dtype)
    if near.rest and not _reached(found, goal):  # the sketch sufficed but for the rounding of the factors
        found = _smallest(scaled, _whole(scaled), goal, scale, dtype)
    _check(found, goal, name)
    return replace(found, norm=found.norm * scale, error=found.error * scale)


def decomposed_near(matrix: torch.Tensor, goal: Goal, name: str) -> Near:
    """Return as much of the decomposition of a float64 matrix (m, n) as the goal needs, or all of it."""
    width = _START if goal.rank is None else goal.rank + max(10, goal.rank // 2)
    while width * _CHEAPER <= min(matrix.shape):
        near = _sketched(matrix, width, goal, name)
        if near.rank_for(goal) is not None:
            return near
        width *= 2
    return _whole(matrix)


def residual_norm(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """Return ‖matrix − left @ right‖ (Frobenius), the differences taken one by one in float64, tile by tile.

    ‖D‖² − ‖QᵀD‖² is the same square for an orthonormal Q, and has no digit left where the error is small.
    """
    step = max(1, _TILE.get(matrix.device.type, _TILE["cpu"]) // max(1, matrix.shape[1]))
    squares = [
        (matrix[start : start + step] - left[start : start + step] @ right).square_().sum()
        for start in range(0, matrix.shape[0], step)
    ]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0


def _whole(matrix: torch.Tensor) -> Near:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Near(left, values, right, float(matrix.norm()), 0.0)


def _sketched(matrix: torch.Tensor, width: int, goal: Goal, name: str) -> Near:
    """Return the part of the matrix in a space of `width` dimensions, found in float32 where that is enough."""
    near = _projected(matrix, _range(matrix.float(), width, goal, name))
    rank = near.rank_for(goal)
    left = near.errors()[-1 if rank is None else rank].sqrt()
    if float(left) >= _NEEDS_FLOAT64 * near.norm:
        return near
    return _projected(matrix, _range(matrix, width, goal, name))


def _range(matrix: torch.Tensor, width: int, goal: Goal, name: str) -> torch.Tensor:
    """Return orthonormal columns (m, width) that hold most of the matrix, in its dtype.

    Each power iteration (arXiv 0909.4061, algorithm 4.4) brings more energy into the first columns; it ends when one
    brings next to nothing.
    """
    seed = int.from_bytes(sha256(name.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64).to(matrix)
    basis: torch.Tensor = torch.linalg.qr(matrix @ test).Q
    found = 0.0
    for _ in range(_MOST_ITERATIONS):
        back = torch.linalg.qr(matrix.T @ basis)
        energy = _energy(back.R, goal.rank)
        if energy - found <= _GAIN * energy:
            break
        found = energy
        basis = torch.linalg.qr(matrix @ back.Q).Q
    return basis


def _energy(core: torch.Tensor, rank: int | None) -> float:
    """Return the squared norm of the best approximation of that rank, None for all, of a matrix with this R of QR."""
    if rank is None:
        return float(core.double().square().sum())
    return float(torch.linalg.svdvals(core.double().cpu())[:rank].square().sum())


def _projected(matrix: torch.Tensor, basis: torch.Tensor) -> Near:
    """Return the decomposition of the matrix's projection on the basis's columns, in float64."""
    basis = torch.linalg.qr(basis.double()).Q
    lower = torch.linalg.qr(matrix.T @ basis)
    # a GPU takes longer for so small a matrix than the way to the CPU and back
    turn, values, right = (part.to(matrix.device) for part in torch.linalg.svd(lower.R.T.cpu(), full_matrices=False))
    left, right = basis @ turn, right @ lower.Q.T
    rest = residual_norm(matrix, left * values, right)
    return Near(left, values, right, float(matrix.norm()), rest)


def _smallest(scaled: torch.Tensor, near: Near, goal: Goal, scale: float, dtype: torch.dtype) -> Extraction:
    """Return the factors of the smallest rank that reach the goal as they are kept, or those of every rank there is."""
    rank = near.rank_for(goal) or near.rank
    while True:
        found = _stored(scaled, near, rank, scale, dtype)
        if rank == near.rank or _reached(found, goal):
            return found
        rank = min(near.rank, rank + max(1, rank // 8))


def _check(found: Extraction, goal: Goal, name: str) -> None:
    """Refuse factors that cannot hold the matrix, or that miss a largest error, in their dtype."""
    dtype = found.lora_A.dtype
    if not all(bool(factor.isfinite().all()) for factor in (found.lora_A, found.lora_B)):
        raise IncompatibleError(f"{name}: its difference is too large for factors in {dtype}", "--dtype float32")
    relative = found.error / found.norm
    if relative >= 1:
        raise IncompatibleError(f"{name}: its difference rounds to nothing in factors of {dtype}", "--dtype float32")
    if goal.max_error is not None and relative > goal.max_error:
        raise IncompatibleError(
            f"{name}: with factors in {dtype} the error is {relative:.3g} at any rank",
            "a larger --max-error, or --dtype float64",
        )


def _stored(scaled: torch.Tensor, near: Near, rank: int, scale: float, dtype: torch.dtype) -> Extraction:
    """Return the factors of that rank as they are kept, their error and norm those of the scaled matrix."""
    roots = (near.values[:rank] * scale).sqrt()
    lora_B = rounded(near.left[:, :rank] * roots, dtype)
    lora_A = rounded(roots[:, None] * near.right[:rank], dtype)
    error = residual_norm(scaled, lora_B.double() / scale, lora_A.double())
    return Extraction(lora_A.cpu().contiguous(), lora_B.cpu().contiguous(), near.norm, error)


def _reached(found: Extraction, goal: Goal) -> bool:
    lost = goal.lost
    return lost is None or lost == 0 or not found.error**2 > lost * found.norm**2
