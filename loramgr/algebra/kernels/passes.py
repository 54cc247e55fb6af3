"""The Triton kernel: recover a weight from its residual, merge into it, and make a residual, tile by tile.

Every program works on one tile of a weight of 16- or 32-bit floats, which it sees as integers. With TAKE it recovers
the weight from the merged one, with PUT it merges, with KEEP it also leaves a residual; a switch does all three.
The residual's codes are those of `residual.py`; the escaped weights of a tile lie in a bucket of its own, as
(position in the tile) << 16 | bits, or as two words each for 32-bit floats, in row-major order.

WHOLE, with PUT alone, merges the tiles whose numbers `new_counts` lists, marks all of their weights as escaped and
writes the tiles whole, as they were, one after the other into `new_buckets`.
"""

import triton
import triton.language as tl

from loramgr.algebra.kernels.codes import counted, decoded, encoded, merged_bits, turned
from loramgr.algebra.kernels.deltas import tile_delta

__all__ = ["restore_tiles", "tile_pass"]


@triton.jit
def _sum_and_max(sum1, max1, sum2, max2):
    return sum1 + sum2, tl.maximum(max1, max2)


@triton.jit
def _sum_and_last(sum1, count1, word1, sum2, count2, word2):
    # What only passes through comes out in the same layout as the sums, and no conversion is left for the loop.
    return sum1 + sum2, count2, word2


@triton.jit
def _list_escapes(
    weight, bucket, escapes, slots, most, row, column, stride_m, stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPACITY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the escaped weights of a tile, which the memory of the weight still holds, into the tile's bucket."""
    words: tl.constexpr = BLOCK_N // 16
    index = tl.arange(0, BLOCK_M * words)
    line = index // words
    for _ in range(most):
        lowest = escapes & (~escapes + 1)
        # The exponent of a power of four is twice the place of its bit pair.
        place = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127) >> 1
        found = escapes != 0
        across = (index % words) * 16 + place
        bits = tl.load(weight + (row + line) * stride_m + (column + across) * stride_n, mask=found, other=0)
        position = line * BLOCK_N + across
        if WIDE:
            tl.store(bucket + slots, position, mask=found)
            tl.store(bucket + CAPACITY + slots, bits, mask=found)
        else:
            tl.store(bucket + slots, (position << 16) | (bits.to(tl.int32) & 0xFFFF), mask=found)
        slots += found.to(tl.int32)
        escapes = escapes & (escapes - 1)


@triton.jit
def _prefetch(weight, row, column, m, stride_m, stride_n, BLOCK_M: tl.constexpr):
    """Ask for the rows of a tile, which are loaded once its escaped weights are in place."""
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), m - 1)
    places = (weight + rows * stride_m + column * stride_n).to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [places], tl.int32, False, 1)


@triton.jit
def _bucket(bucket, CAPACITY: tl.constexpr, KIND: tl.constexpr):
    """Return positions in the tile and bits of all slots of a bucket, those that are not used too.

    Masked by the count, this load would have to wait for that of the count.
    """
    slots = tl.arange(0, CAPACITY)
    entry = tl.load(bucket + slots)
    if KIND == "fp32":
        position = entry
        bits = tl.load(bucket + CAPACITY + slots)
    else:
        position = (entry >> 16) & 0xFFFF
        bits = entry.to(tl.int16)
    return position, bits


@triton.jit
def _kept(
    weight, words, bucket, count_at, row, column, stride_m, stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPACITY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Write the bucket of a tile that memory still holds unmerged, and its count; return whether all fits."""
    escapes = tl.reshape(words & (words >> 1) & 0x55555555, (BLOCK_M * BLOCK_N // 16,))
    counts = counted(escapes)
    count, most = tl.reduce((counts, counts), 0, _sum_and_max)
    ends, counts, escapes = tl.associative_scan((counts, counts, escapes), 0, _sum_and_last)
    tl.store(count_at, count)
    fits = count <= CAPACITY
    tl.debug_barrier()
    if fits:
        _list_escapes(
            weight, bucket, escapes, ends - counts, most, row, column, stride_m, stride_n,
            BLOCK_M, BLOCK_N, CAPACITY, KIND == "fp32",
        )  # fmt: skip
    tl.debug_barrier()
    return fits


@triton.jit
def _inside(rows, columns, m, n, EVEN: tl.constexpr):
    """Return which elements of a tile, or of its words, exist."""
    if EVEN:
        inside = tl.full((rows.shape[0], columns.shape[0]), 1, tl.int1)
    else:
        inside = (rows < m)[:, None] & (columns < n)[None, :]
    return inside


@triton.jit
def tile_pass(
    weight, m, n, stride_m, stride_n,
    old_left, old_right, old_scaling, old_rank, old_left_row, old_left_rank, old_right_rank, old_right_column,
    new_left, new_right, new_scaling, new_rank, new_left_row, new_left_rank, new_right_rank, new_right_column,
    old_codes, old_buckets, old_counts, new_codes, new_buckets, new_counts, words_per_row,
    TAKE: tl.constexpr, PUT: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPACITY: tl.constexpr,
    OLD_BLOCK: tl.constexpr, OLD_SINGLE: tl.constexpr, NEW_BLOCK: tl.constexpr, NEW_SINGLE: tl.constexpr,
    PACKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Work on one tile of the weight (m, n)."""
    tile = tl.load(new_counts + tl.program_id(0)) if WHOLE else tl.program_id(0)
    row = (tile // tl.cdiv(n, BLOCK_N)).to(tl.int64) * BLOCK_M
    column = (tile % tl.cdiv(n, BLOCK_N)).to(tl.int64) * BLOCK_N
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    word_columns = column // 16 + tl.arange(0, BLOCK_N // 16)
    inside = _inside(rows, columns, m, n, EVEN)
    words_inside = _inside(rows, word_columns, m, words_per_row, EVEN)
    places = weight + rows[:, None] * stride_m + columns[None, :] * stride_n
    word_places = rows[:, None] * words_per_row + word_columns[None, :]
    bucket = tile.to(tl.int64) * (CAPACITY * (2 if KIND == "fp32" else 1))
    if TAKE:
        used = tl.arange(0, CAPACITY) < tl.load(old_counts + tile)
        position, escaped = _bucket(old_buckets + bucket, CAPACITY, KIND)
        if not INTERPRETED:
            _prefetch(weight, row, column, m, stride_m, stride_n, BLOCK_M)
        words = tl.load(old_codes + word_places, mask=words_inside, other=0).to(tl.uint32, bitcast=True)
        delta = tile_delta(
            old_left, old_right, old_scaling, old_rank, old_left_row, old_left_rank, old_right_rank, old_right_column,
            rows, columns, m, n, BLOCK_M, BLOCK_N, OLD_BLOCK, OLD_SINGLE, EVEN, INTERPRETED,
        )  # fmt: skip
        spots = weight + (row + position // BLOCK_N) * stride_m + (column + position % BLOCK_N) * stride_n
        tl.store(spots, escaped, mask=used)
        tl.debug_barrier()
        bits = decoded(tl.load(places, mask=inside, other=0), delta, turned(words, True), KIND, PACKED)
        if KEEP or not PUT:
            tl.store(places, bits, mask=inside)
    else:
        bits = tl.load(places, mask=inside, other=0)
    if WHOLE:
        whole = new_buckets + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N)
        tl.store(whole + (tl.arange(0, BLOCK_M) * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :], bits)
        tl.store(new_codes + word_places, tl.full(word_places.shape, -1, tl.int32), mask=words_inside)
    if PUT:
        delta = tile_delta(
            new_left, new_right, new_scaling, new_rank, new_left_row, new_left_rank, new_right_rank, new_right_column,
            rows, columns, m, n, BLOCK_M, BLOCK_N, NEW_BLOCK, NEW_SINGLE, EVEN, INTERPRETED,
        )  # fmt: skip
        if KEEP:
            merged, words = encoded(bits, delta, KIND, PACKED, INTERPRETED)
            tl.store(new_codes + word_places, turned(words, False).to(tl.int32, bitcast=True), mask=words_inside)
            if _kept(
                weight, words, new_buckets + bucket, new_counts + tile, row, column, stride_m, stride_n,
                BLOCK_M, BLOCK_N, CAPACITY, KIND,
            ):  # fmt: skip
                tl.store(places, merged, mask=inside)
        else:
            tl.store(places, merged_bits(bits, delta, KIND, INTERPRETED), mask=inside)


@triton.jit
def restore_tiles(
    weight, m, n, stride_m, stride_n, tiles, whole, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the tiles that WHOLE kept back into the weight."""
    tile = tl.load(tiles + tl.program_id(0))
    tiles_n = tl.cdiv(n, BLOCK_N)
    rows = (tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = whole + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N)
    bits = tl.load(kept + (tl.arange(0, BLOCK_M) * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :])
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(weight + rows[:, None] * stride_m + columns[None, :] * stride_n, bits, mask=inside)
