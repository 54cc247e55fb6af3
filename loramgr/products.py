"""Products of factors in float64 and a fixed order: the same bits on every machine, with any number of threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["product", "tucker"]

_TILE = 1 << 18  # values of a tile of rows: it and its addend stay in the cache


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right, (m, r) times (r, n) of any float dtypes, in float64 and summed rank by rank."""
    import torch

    left, right = left.double(), right.double()
    result = torch.zeros((left.shape[0], right.shape[1]), dtype=torch.float64)
    height = max(1, _TILE // max(1, right.shape[1]))
    for start in range(0, left.shape[0], height):
        rows, tile = left[start : start + height], result[start : start + height]
        for rank in range(left.shape[1]):
            tile += rows[:, rank, None] * right[None, rank]
    return result


def tucker(core: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return Σ core[i, j, k…] outputs[i, o] inputs[j, n] as (o, n, k…), in float64, summed over j, then over i."""
    kernel = core.shape[2:]
    flat = core.flatten(2).movedim(1, 0).flatten(1)  # (j, i·k)
    inner = product(inputs.T, flat).reshape(inputs.shape[1], core.shape[0], -1)  # (n, i, k)
    outer = product(outputs.T, inner.movedim(1, 0).flatten(1))  # (o, n·k)
    return outer.reshape(outputs.shape[1], inputs.shape[1], *kernel)
