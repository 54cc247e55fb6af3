"""The first pass of the exact merge as a Triton kernel: float32, with a bound that says which weights it leaves open.

It multiplies and adds on the common cores, in which every operation is rounded by itself, or fused, as IEEE 754 says:
what tensor cores do with the low bits is not specified, and nothing could be proved of it.
"""

import torch
import triton
import triton.language as tl

from loramgr.algebra.kernels.codes import rounded, valued
from loramgr.algebra.kernels.launch import INTERPRETED, KINDS, device_of, runs_on
from loramgr.algebra.residual import BITS
from loramgr.algebra.stack import SingleStack

__all__ = ["screen_by_kernel", "takes"]

_BLOCK_M, _BLOCK_N = 32, 128
_PLACES = 1 << 27  # weights whose marks are held at once
_LARGE = tl.constexpr(3.0e38)


@triton.jit
def _screen_tile(
    weight, result, marks, left, right, row_bound, column_bound, relative, floor, m, n, rank, stride_m, stride_n,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Merge one tile and mark what is open: where the ends of the interval round differently, or are not finite."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_there, column_there = rows < m, columns < n
    inside = row_there[:, None] & column_there[None, :]
    bits = tl.load(weight + rows[:, None] * stride_m + columns[None, :] * stride_n, mask=inside, other=0)
    value = valued(bits, KIND)
    for k in range(rank):
        factor = tl.load(left + k * m + rows, mask=row_there, other=0.0)
        other = tl.load(right + k * n + columns, mask=column_there, other=0.0)
        value += factor[:, None] * other[None, :]
    row_part = tl.load(row_bound + rows, mask=row_there, other=0.0)
    column_part = tl.load(column_bound + columns, mask=column_there, other=0.0)
    reach = row_part[:, None] * column_part[None, :] + relative * tl.abs(value) + floor
    high = rounded(value + reach, KIND, INTERPRETED)
    is_open = (high != rounded(value - reach, KIND, INTERPRETED)) | ~(reach < _LARGE)
    places = rows[:, None] * n + columns[None, :]
    tl.store(result + places, high, mask=inside)
    tl.store(marks + places, is_open.to(tl.int8), mask=inside)


def takes(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Say whether the kernel merges such a weight (m, n) into a result of that dtype: one of 16 bits, on a GPU."""
    return weight.dtype == dtype and dtype in (torch.bfloat16, torch.float16) and runs_on(weight)


def screen_by_kernel(weight: torch.Tensor, stack: SingleStack, result: torch.Tensor) -> torch.Tensor:
    """Round the merged weight (m, n) into `result`, contiguous; return the places that are left open, ascending."""
    m, n = weight.shape
    step = max(1, _PLACES // n)
    found = []
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        bits, into = (tensor[rows].view(BITS[weight.dtype]) for tensor in (weight, result))
        marks = torch.empty(bits.shape, dtype=torch.int8, device=weight.device)
        left = stack.left[rows].T.contiguous()
        grid = (triton.cdiv(bits.shape[0], _BLOCK_M) * triton.cdiv(n, _BLOCK_N),)
        with device_of(weight):
            _screen_tile[grid](
                bits, into, marks, left, stack.right, stack.rows[rows], stack.columns, stack.relative, stack.floor,
                *bits.shape, left.shape[0], *bits.stride(),
                KIND=KINDS[weight.dtype], BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, INTERPRETED=INTERPRETED,
            )  # fmt: skip
        found.append(marks.view(-1).nonzero()[:, 0] + start * n)
    return torch.cat(found)
