"""The residual as the kernels keep it: codes in place, and a bucket of escaped weights for every tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramgr.algebra.factors import Factors
from loramgr.algebra.residual import BITS, Origin, Residual, code_words, codes_of

__all__ = ["BLOCK", "CAPACITY", "TiledResidual", "tiled"]

BLOCK = 64  # rows and columns of a tile; 64 × 64 on 4 warps measured best on an H100 (docs/residual.md)
CAPACITY = 128  # escaped weights that a tile's bucket holds, 1/32 of the tile; a power of two
_SIZE = BLOCK * BLOCK


@dataclass(slots=True)
class TiledResidual:
    """The residual of one two-dimensional weight, on its device.

    `shape` and `dtype` are the weight's. With `transposed`, everything else describes Wᵀ. `codes` are as in `Residual`;
    `buckets` is int32 (tiles, capacity), twice as wide for 32-bit floats, of which the first `counts` (tiles,) are
    used: (position in the tile) << 16 | bits, or positions and then bits. Tiles with more escaped weights are kept
    `whole` (k, tile's size), their numbers in `whole_tiles` (k,); their codes say that all is escaped and they count
    none. `pending` holds the weight and what was merged until it is known which tiles overflow.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool
    origin: Origin
    codes: torch.Tensor
    buckets: torch.Tensor
    counts: torch.Tensor
    whole_tiles: torch.Tensor
    whole: torch.Tensor
    pending: tuple[torch.Tensor, Factors] | None = None

    @classmethod
    def empty(cls, weight: torch.Tensor, transposed: bool, origin: Origin) -> TiledResidual:
        """Allocate the residual of a weight (m, n), of any content."""
        rows, columns = weight.shape
        if transposed:
            rows, columns = columns, rows
        tiles = -(-rows // BLOCK) * -(-columns // BLOCK)
        bits = BITS[weight.dtype]
        new = weight.new_empty
        return cls(
            (weight.shape[0], weight.shape[1]),
            weight.dtype,
            transposed,
            origin,
            codes=new((rows, -(-columns // 16)), dtype=torch.int32),
            buckets=new((tiles, CAPACITY * (2 if bits == torch.int32 else 1)), dtype=torch.int32),
            counts=new((tiles,), dtype=torch.int32),
            whole_tiles=new((0,), dtype=torch.int32),
            whole=new((0, _SIZE), dtype=bits),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the residual takes."""
        parts = (self.codes, self.buckets, self.counts, self.whole_tiles, self.whole)
        return sum(part.numel() * part.element_size() for part in parts)

    def portable(self) -> Residual:
        """Return the residual in the form that every device reads, on the same device."""
        rows, columns = self.shape[::-1] if self.transposed else self.shape
        tile, local, values = self._escaped()
        across = -(-columns // BLOCK)
        row, column = tile // across * BLOCK + local // BLOCK, tile % across * BLOCK + local % BLOCK
        inside = (row < rows) & (column < columns)
        codes = codes_of(self.codes, columns)
        if self.transposed:
            row, column, codes = column, row, codes.T
        positions, order = (row * self.shape[1] + column)[inside].sort()
        return Residual(self.shape, self.dtype, code_words(codes), positions, values[inside][order], self.origin)

    def _escaped(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the escaped weights: the numbers of their tiles, positions in them and bits, all (k,)."""
        bits = BITS[self.dtype]
        tile, slot = (torch.arange(CAPACITY, device=self.counts.device) < self.counts[:, None]).nonzero().unbind(1)
        entry = self.buckets[tile, slot]
        if bits == torch.int32:
            local, values = entry, self.buckets[tile, slot + CAPACITY]
        else:
            local, values = (entry >> 16) & 0xFFFF, entry.to(torch.int16)
        everywhere = torch.arange(_SIZE, device=tile.device).repeat(self.whole_tiles.numel())
        tiles = torch.cat([tile, self.whole_tiles.long().repeat_interleave(_SIZE)])
        return tiles, torch.cat([local.long(), everywhere]), torch.cat([values, self.whole.view(-1)])


def tiled(residual: Residual, transposed: bool, origin: Origin) -> TiledResidual | None:
    """Return a residual of a two-dimensional weight in the kernels' form, on its device.

    None where a tile has more escaped weights than its bucket holds and yet not all of it: the kernels make no such.
    """
    rows, columns = residual.shape
    like = torch.empty((), dtype=residual.dtype, device=residual.codes.device).expand(rows, columns)
    result = TiledResidual.empty(like, transposed, origin)
    row, column = residual.positions // max(1, columns), residual.positions % max(1, columns)
    codes = codes_of(residual.codes, columns)
    if transposed:
        row, column, rows, columns, codes = column, row, columns, rows, codes.T
    tile = row // BLOCK * -(-columns // BLOCK) + column // BLOCK
    local = row % BLOCK * BLOCK + column % BLOCK
    counts = torch.bincount(tile, minlength=result.counts.numel())
    full = counts > CAPACITY
    if bool((counts != _sizes(rows, columns, counts.device))[full].any()):
        return None
    result.codes = code_words(codes)
    result.counts = counts.masked_fill(full, 0).int()
    _keep_whole(result, full, tile, local, residual.values)
    listed = ~full[tile]
    _fill_buckets(result, tile[listed], local[listed], residual.values[listed])
    return result


def _sizes(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return how many weights each tile holds: fewer at the edges."""
    heights = (rows - torch.arange(0, rows, BLOCK, device=device)).clamp(max=BLOCK)
    widths = (columns - torch.arange(0, columns, BLOCK, device=device)).clamp(max=BLOCK)
    return (heights[:, None] * widths).view(-1)


def _keep_whole(
    result: TiledResidual, full: torch.Tensor, tile: torch.Tensor, local: torch.Tensor, values: torch.Tensor
) -> None:
    tiles = full.nonzero()[:, 0]
    number = (full.cumsum(0) - 1)[tile]
    result.whole_tiles = tiles.int()
    result.whole = values.new_zeros((tiles.numel(), _SIZE))
    inside = full[tile]
    result.whole[number[inside], local[inside]] = values[inside]


def _fill_buckets(result: TiledResidual, tile: torch.Tensor, local: torch.Tensor, values: torch.Tensor) -> None:
    tile, order = tile.sort(stable=True)
    local, values = local[order], values[order]
    starts = torch.searchsorted(tile, torch.arange(result.counts.numel(), device=tile.device))
    slot = torch.arange(tile.numel(), device=tile.device) - starts[tile]
    if values.dtype == torch.int32:
        result.buckets[tile, slot] = local.int()
        result.buckets[tile, slot + CAPACITY] = values
    else:
        result.buckets[tile, slot] = (local.int() << 16) | (values.int() & 0xFFFF)
