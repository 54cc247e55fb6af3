"""Changes of a weight that are no sums of low-rank deltas, in float64 and a fixed order of operations.

Sums run term by term over elementwise products and differences, never through a library's matrix product, whose order
depends on threads and machine: the same inputs give the same bits everywhere.
"""

from __future__ import annotations

import torch

from loramgr.products import product, tucker

__all__ = [
    "butterfly",
    "decomposed",
    "expert_deltas",
    "hadamard",
    "kronecker",
    "reflected",
    "rotated",
    "rotation",
    "scaled",
]


def hadamard(
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    cores: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Return (a₁ b₁) ⊙ (a₂ b₂), (out, in) or with the kernel of the cores; see `loramgr.updates.Hadamard`."""
    if cores is None:
        return product(*first).mul_(product(*second))
    return tucker(cores[0], *first).mul_(tucker(cores[1], *second))


def kronecker(w1: tuple[torch.Tensor, ...], w2: tuple[torch.Tensor, ...], core: torch.Tensor | None) -> torch.Tensor:
    """Return w1 ⊗ w2 as (a·b, c·d…), the kernel flattened; see `loramgr.updates.Kronecker`."""
    left = w1[0].double() if len(w1) == 1 else product(*w1)
    whole = w2[0].double() if len(w2) == 1 else product(*w2) if core is None else tucker(core, *w2)
    right = whole.flatten(1) if whole.dim() < 3 else whole.flatten(2)
    kernel = right if right.dim() == 3 else right[..., None]
    joint = left[:, None, :, None, None] * kernel[None, :, None]
    return joint.reshape(left.shape[0] * kernel.shape[0], -1)


def expert_deltas(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, *, transposed: bool) -> torch.Tensor:
    """Return scaling · lora_B[e] lora_A[e] of every expert, (experts, out, in), or (experts, in, out)."""
    shape = (lora_A.shape[2], lora_B.shape[1]) if transposed else (lora_B.shape[1], lora_A.shape[2])
    deltas = torch.empty((lora_A.shape[0], *shape), dtype=torch.float64)
    for expert, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        deltas[expert] = product(a.T, b.T) if transposed else product(b, a)
    return deltas.mul_(scaling)


def scaled(weight: torch.Tensor, factors: torch.Tensor, dimension: int) -> torch.Tensor:
    """Return the weight with every slice along a dimension multiplied by its factor.

    Of a grouped convolution the factors are one for each input of all groups, and every group takes its own.
    """
    size = weight.shape[dimension] if weight.dim() else 1
    if dimension != 1 or factors.numel() == size:
        shape = [1] * weight.dim()
        shape[dimension] = -1
        return weight.double() * factors.double().reshape(shape)
    groups = factors.numel() // size
    grouped = weight.double().reshape(groups, -1, *weight.shape[1:])
    shape = [groups, 1, size] + [1] * (weight.dim() - 2)
    return (grouped * factors.double().reshape(shape)).reshape(weight.shape)


def rotation(vectors: torch.Tensor, size: int, terms: int | None) -> torch.Tensor:
    """Return the orthogonal blocks (blocks, size, size) that strict upper triangles (blocks, size(size-1)/2) give.

    With Q skew-symmetric they are (I - Q)(I + Q)⁻¹; or, for a number of terms, the start of its Neumann series.
    """
    row, column = torch.triu_indices(size, size, 1)
    skew = torch.zeros((vectors.shape[0], size, size), dtype=torch.float64)
    skew[:, row, column] = vectors.double()
    skew = skew - skew.mT
    return _cayley(skew) if terms is None else _neumann(skew, terms)


def rotated(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return W Rᵀ for a matrix (out, in) and the blocks of a block-diagonal R; one block stands for all."""
    size = blocks.shape[-1]
    parts = weight.double().reshape(weight.shape[0], -1, size)
    columns = blocks.mT.expand(parts.shape[1], size, size)
    result = torch.zeros_like(parts)
    for index in range(size):
        result += parts[:, :, index, None] * columns[None, :, index]
    return result.reshape(weight.shape)


def butterfly(weight: torch.Tensor, blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return scale ⊙ (W Mᵀ) for a matrix (out, in), M the product of the factors; see `loramgr.updates.Butterfly`.

    Factor i is P Dᵢ Pᵀ, with Dᵢ the orthogonal blocks and P the permutation that gathers what stands 2ⁱ blocks' halves
    apart; a single factor is not permuted.
    """
    factors, count, size, _ = blocks.shape
    inputs = count * size
    raw = blocks.double()
    skew = 0.5 * (raw - raw.mT)
    result = weight.double()
    for index in range(factors):
        order = _butterfly_order(inputs, count >> index, size // 2) if factors > 1 else torch.arange(inputs)
        gathered = torch.empty_like(result)
        gathered[:, order] = result
        result = rotated(gathered, _cayley(skew[index]))[:, order]
    return result * scale.double().reshape(-1, 1)


def reflected(weight: torch.Tensor, vectors: torch.Tensor, *, orthonormal: bool) -> torch.Tensor:
    """Return a matrix (out, in) reflected at every column of (in, r) in turn; see `loramgr.updates.Reflected`."""
    result = weight.double()
    units: list[torch.Tensor] = []
    for vector in vectors.double().T.contiguous():
        unit = vector[None]
        for before in units if orthonormal else ():
            unit = unit - _sum_of_columns(unit * before) * before
        unit = unit / _sum_of_columns(unit * unit).sqrt()
        units.append(unit)
        result = result - 2.0 * _sum_of_columns(result * unit)[:, None] * unit
    return result


def decomposed(weight: torch.Tensor, magnitude: torch.Tensor, dimension: int, epsilon: float) -> torch.Tensor:
    """Return magnitude · V / (‖V‖ + epsilon) for a float64 V, the norm over all dimensions but the one."""
    slices = weight.movedim(dimension, 0).flatten(1)
    norms = _sum_of_columns(slices * slices).sqrt() + epsilon
    shape = [1] * weight.dim()
    shape[dimension] = -1
    return weight * (magnitude.double().flatten() / norms).reshape(shape)


def _sum_of_columns(matrix: torch.Tensor) -> torch.Tensor:
    """Return the sum of every row, by adding halves of the columns until one is left."""
    while matrix.shape[1] > 1:
        half = matrix.shape[1] // 2
        rest = matrix[:, 2 * half :]
        matrix = torch.cat([matrix[:, :half] + matrix[:, half : 2 * half], rest], dim=1)
    return matrix[:, 0]


def _cayley(skew: torch.Tensor) -> torch.Tensor:
    """Return (I - Q)(I + Q)⁻¹, by elimination without a choice of pivots: none of them is below 1 for a skew Q."""
    size = skew.shape[-1]
    identity = torch.eye(size, dtype=torch.float64).expand_as(skew)
    system = torch.cat([identity + skew, identity - skew], dim=2)  # the two commute, so either side may be solved
    for pivot in range(size):
        row = system[:, pivot] / system[:, pivot, pivot, None]
        system = system - system[:, :, pivot, None] * row[:, None]
        system[:, pivot] = row
    return system[:, :, size:]


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """Return I + 2Q + 2Q² + … + Qⁿ as PEFT truncates it: n is terms - 1, but for three terms 3."""
    result = torch.eye(skew.shape[-1], dtype=torch.float64).expand_as(skew).clone()
    if terms > 1:
        result = result + 2.0 * skew
    power, last = skew, max(3, terms - 1)
    for index in range(2, last + 1 if terms > 2 else 0):
        power = _batched(power, skew)
        result = result + (1.0 if index == last else 2.0) * power
    return result


def _batched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(a)
    for index in range(a.shape[2]):
        result += a[:, :, index, None] * b[:, None, index]
    return result


def _butterfly_order(inputs: int, count: int, half: int) -> torch.Tensor:
    """Return for every place which one it takes: in each of `count` blocks the even halves first, then the odd ones."""
    size = inputs // count
    parts = torch.arange(size).reshape(-1, half)
    within = torch.cat([parts[::2], parts[1::2]]).flatten()
    return (torch.arange(0, inputs, size)[:, None] + within[None]).flatten()
