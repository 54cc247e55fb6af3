"""The delta of a tile: scaling · left @ right in float32, with the same bits whenever it is computed.

Its operands alone enter the tensor cores, it is multiplied by the scaling before anything is added to it, and kernels
are compiled without fusing multiplications and additions.
"""

import triton
import triton.language as tl

__all__ = ["tile_delta"]


@triton.jit
def _pieces(x):
    """Split float32 into three bfloat16 numbers whose sum is x to 2^-27 of it (8 bits each, and the signs)."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    return first, second, third


@triton.jit
def _product(left, right, INTERPRETED: tl.constexpr):
    """Return left @ right in float32, float32 operands without loss to tf32 or bfloat16.

    Of the nine products of pieces the three smallest, each below 2^-25 of the whole, are left out; the sums begin with
    the small ones.
    """
    total = tl.zeros((left.shape[0], right.shape[1]), tl.float32)
    if left.dtype == tl.float16 and right.dtype != tl.float16:
        left = left.to(tl.float32)
    if right.dtype == tl.float16 and left.dtype != tl.float16:
        right = right.to(tl.float32)
    if INTERPRETED:
        # The interpreter reads the bits of bfloat16 operands of a dot as integers.
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    elif left.dtype == tl.float32 and right.dtype == tl.float32:
        left1, left2, left3 = _pieces(left)
        right1, right2, right3 = _pieces(right)
        total = tl.dot(left2, right2, total)
        total = tl.dot(left1, right3, total)
        total = tl.dot(left3, right1, total)
        total = tl.dot(left1, right2, total)
        total = tl.dot(left2, right1, total)
        total = tl.dot(left1, right1, total)
    elif left.dtype == tl.float32:
        left1, left2, left3 = _pieces(left)
        total = tl.dot(left3, right, total)
        total = tl.dot(left2, right, total)
        total = tl.dot(left1, right, total)
    elif right.dtype == tl.float32:
        right1, right2, right3 = _pieces(right)
        total = tl.dot(left, right3, total)
        total = tl.dot(left, right2, total)
        total = tl.dot(left, right1, total)
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def _step(
    left, right, start, rank, left_row, left_rank, right_rank, right_column, rows, columns, m, n,
    BLOCK_R: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the sum of the products of BLOCK_R ranks."""
    ranks = start + tl.arange(0, BLOCK_R)
    lefts = left + rows[:, None] * left_row + ranks[None, :] * left_rank
    rights = right + ranks[:, None] * right_rank + columns[None, :] * right_column
    factor = tl.load(lefts, mask=(rows < m)[:, None] & (ranks < rank)[None, :], other=0.0)
    other = tl.load(rights, mask=(ranks < rank)[:, None] & (columns < n)[None, :], other=0.0)
    return _product(factor, other, INTERPRETED)


@triton.jit
def _outer(
    left, right, left_row, right_column, rows, columns, m, n,
):  # fmt: skip
    """Return the products of a column and a row, each rounded once: tensor cores would lose more than the bound has."""
    factor = tl.load(left + rows * left_row, mask=rows < m, other=0.0).to(tl.float32)
    other = tl.load(right + columns * right_column, mask=columns < n, other=0.0).to(tl.float32)
    return factor[:, None] * other[None, :]


@triton.jit
def tile_delta(
    left, right, scaling, rank, left_row, left_rank, right_rank, right_column, rows, columns, m, n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SINGLE: tl.constexpr,
    EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return scaling · left @ right of one tile in float32, 0 outside of the weight.

    Tensor cores truncate when they accumulate, so the sums of BLOCK_R ranks are added up outside of them.
    """
    if BLOCK_R == 1:
        delta = scaling * _outer(left, right, left_row, right_column, rows, columns, m, n)
    elif SINGLE:
        delta = scaling * _step(
            left, right, 0, rank, left_row, left_rank, right_rank, right_column, rows, columns, m, n,
            BLOCK_R, INTERPRETED,
        )  # fmt: skip
    else:
        delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, rank, BLOCK_R):
            # The scaling in between keeps the compiler from making this sum the accumulator of the tensor cores.
            delta += scaling * _step(
                left, right, start, rank, left_row, left_rank, right_rank, right_column, rows, columns, m, n,
                BLOCK_R, INTERPRETED,
            )  # fmt: skip
    if not EVEN:
        # An infinite factor times the 0 of a row or column outside would be NaN.
        delta = tl.where((rows < m)[:, None] & (columns < n)[None, :], delta, 0.0)
    return delta
