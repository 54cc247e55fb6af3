"""Launching the kernels: one pass over a weight, and what tiles whose escaped weights overflow need after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton

from loramgr.algebra.factors import Factors
from loramgr.algebra.kernels.passes import restore_tiles, tile_pass
from loramgr.algebra.kernels.tiled import BLOCK, CAPACITY, TiledResidual
from loramgr.algebra.residual import BITS, Origin

__all__ = ["device_of", "is_transposed", "merged", "origin_of", "replaced", "runs_on", "settle", "unmerged"]

VERSION = 1  # goes up whenever the bits of a delta change, as they do with the steps of the rank
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WARPS = 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TENSOR_CORES = 8  # compute capability with bfloat16
_PAIRS = 9  # compute capability with operations on two 16-bit integers


def runs_on(weight: torch.Tensor) -> bool:
    """Say whether the kernels take the weight (m, n): its dtype and device, or the interpreter on the CPU."""
    if weight.dtype not in KINDS:
        return False
    if INTERPRETED:
        return weight.device.type == "cpu"
    if weight.device.type != "cuda" or torch.version.hip is not None:
        return False
    return _capability(weight.device)[0] >= _TENSOR_CORES


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def is_transposed(weight: torch.Tensor) -> bool:
    """Say whether the kernels see Wᵀ, because the columns of the weight are what is contiguous."""
    return weight.stride(0) == 1 and weight.stride(1) != 1


@cache
def origin_of(device: torch.device, transposed: bool) -> Origin:
    """Return which computation the kernels are on a device."""
    kind = "triton-interpreter"
    if not INTERPRETED:
        major, minor = _capability(device)
        kind = f"cuda:sm{major}{minor}"
    return Origin("fast", VERSION, f"{kind}/triton{triton.__version__}" + ("/transposed" if transposed else ""))


def merged(
    weight: torch.Tensor, factors: Factors, kept: TiledResidual | None, *, transposed: bool | None = None
) -> None:
    """Queue the merge of the factors into the weight (m, n), in place; `kept` receives the residual.

    `transposed` None stands for the residual's orientation, or the weight's own.
    """
    if kept is not None:
        kept.pending = weight, factors
    if transposed is None:
        transposed = is_transposed(weight) if kept is None else kept.transposed
    _pass(weight, None, factors, kept, transposed=transposed)


def unmerged(weight: torch.Tensor, factors: Factors, residual: TiledResidual) -> None:
    """Queue the return to the weight before the merge, in place; a residual that is not settled will do."""
    _prepare(weight, residual)
    _pass(weight, (factors, residual), None, None, transposed=residual.transposed)


def replaced(weight: torch.Tensor, old: Factors, residual: TiledResidual, new: Factors, kept: TiledResidual) -> None:
    """Queue one pass that takes the old factors out and merges the new ones; both residuals see one orientation."""
    _prepare(weight, residual)
    kept.pending = weight, new
    _pass(weight, (old, residual), new, kept, transposed=kept.transposed)


def settle(residuals: Sequence[TiledResidual]) -> None:
    """Merge the tiles whose escaped weights overflowed, and keep these tiles whole; waits for the devices.

    Until then such tiles are not merged. An exception leaves residuals that `unmerged` still takes.
    """
    waiting = [residual for residual in residuals if residual.pending is not None]
    overflowing = [(residual.counts > CAPACITY).any() for residual in waiting]
    for residual, overflows in zip(waiting, _together(overflowing), strict=True):
        if overflows:
            _keep_whole(residual)
        residual.pending = None


def _together(flags: Sequence[torch.Tensor]) -> list[bool]:
    """Return flags of one or several devices, waiting once for each device."""
    found: dict[int, bool] = {}
    for device in {flag.device for flag in flags}:
        places = [index for index, flag in enumerate(flags) if flag.device == device]
        found |= dict(zip(places, torch.stack([flags[index] for index in places]).tolist(), strict=True))
    return [found[index] for index in range(len(flags))]


def _prepare(weight: torch.Tensor, residual: TiledResidual) -> None:
    """Put the tiles that were kept whole back, and leave alone those that were never merged."""
    if residual.pending is not None:
        _mark_overflowing(residual)
        residual.pending = None
    if residual.whole_tiles.numel():
        bits = _oriented(weight, residual.transposed)
        with device_of(weight):
            restore_tiles[(residual.whole_tiles.numel(),)](
                bits, *bits.shape, *bits.stride(), residual.whole_tiles, residual.whole, BLOCK_M=BLOCK, BLOCK_N=BLOCK
            )


def _mark_overflowing(residual: TiledResidual) -> None:
    words = BLOCK // 16
    across = -(-residual.codes.shape[1] // words)
    for tile in (residual.counts > CAPACITY).nonzero()[:, 0].tolist():
        row, word = tile // across * BLOCK, tile % across * words
        residual.codes[row : row + BLOCK, word : word + words] = -1
        residual.counts[tile] = 0


def _keep_whole(residual: TiledResidual) -> None:
    assert residual.pending is not None
    weight, factors = residual.pending
    tiles = (residual.counts > CAPACITY).nonzero()[:, 0].int()
    whole = residual.whole.new_empty((tiles.numel(), BLOCK * BLOCK))
    _pass(weight, None, factors, residual, transposed=residual.transposed, whole=(tiles, whole))
    residual.counts[tiles.long()] = 0
    residual.whole_tiles, residual.whole = tiles, whole


def _pass(
    weight: torch.Tensor,
    old: tuple[Factors, TiledResidual] | None,
    new: Factors | None,
    kept: TiledResidual | None,
    *,
    transposed: bool,
    whole: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    bits = _oriented(weight, transposed)
    rows, columns = bits.shape
    unused = (bits, bits, bits)
    taken = unused if old is None else (old[1].codes, old[1].buckets, old[1].counts)
    given = unused if kept is None else (kept.codes, kept.buckets, kept.counts)
    tiles = -(-rows // BLOCK) * -(-columns // BLOCK)
    if whole is not None:
        tiles, given = whole[0].numel(), (given[0], whole[1], whole[0])
    with device_of(weight):
        tile_pass[(tiles,)](
            bits, rows, columns, *bits.stride(),
            *_arguments(bits, None if old is None else old[0], transposed), *_arguments(bits, new, transposed),
            *taken, *given, -(-columns // 16),
            TAKE=old is not None, PUT=new is not None, KEEP=kept is not None and whole is None, WHOLE=whole is not None,
            EVEN=rows % BLOCK == 0 and columns % BLOCK == 0, KIND=KINDS[weight.dtype], BLOCK_M=BLOCK, BLOCK_N=BLOCK,
            OLD_BLOCK=_step(old and old[0]), OLD_SINGLE=_is_single(old and old[0]),
            NEW_BLOCK=_step(new), NEW_SINGLE=_is_single(new), CAPACITY=CAPACITY,
            PACKED=_is_packed(weight), INTERPRETED=INTERPRETED,
            num_warps=WARPS, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip


def _arguments(bits: torch.Tensor, factors: Factors | None, transposed: bool) -> tuple[Any, ...]:
    """Return factors as the kernel takes them."""
    if factors is None:
        return bits, bits, 0.0, 0, 0, 0, 0, 0
    if transposed:
        factors = factors.transposed()
    left, right = factors.left, factors.right
    return left, right, factors.scaling, factors.rank, *left.stride(), *right.stride()


def _step(factors: Factors | None) -> int:
    """Return how many ranks the tensor cores add at once, which is part of what fixes the bits of a delta.

    Measured: float32 factors, which take six products, are faster in larger steps, 16-bit ones in smaller.
    """
    if factors is None or factors.rank <= 16:
        return 16
    single = torch.float32 in (factors.left.dtype, factors.right.dtype)
    return 64 if single and factors.rank > 32 else 32


def _is_single(factors: Factors | None) -> bool:
    return factors is None or factors.rank <= _step(factors)


def _is_packed(weight: torch.Tensor) -> bool:
    if INTERPRETED or weight.dtype == torch.float32:
        return False
    return _capability(weight.device)[0] >= _PAIRS


def _oriented(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return the bits of the weight as the kernels see them."""
    bits = weight.view(BITS[weight.dtype])
    return bits.T if transposed else bits


def device_of(weight: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the weight's GPU the current one for the block, so that kernels are launched there."""
    return torch.cuda.device(weight.device) if weight.is_cuda else nullcontext()
