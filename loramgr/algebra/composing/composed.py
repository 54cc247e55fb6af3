"""One module's deltas combined by a method: the exact result, stored factors of a rank, and how far those are off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from loramgr.algebra.casting import rounded
from loramgr.algebra.composing.methods import METHODS, Elementwise, Method
from loramgr.algebra.composing.sparsity import Matrix, seed_of
from loramgr.algebra.composing.tiles import Tiled
from loramgr.algebra.lowrank import Product, decomposed, summed
from loramgr.errors import UsageError

__all__ = ["Parameters", "Stored", "compose_deltas", "is_dense", "method_named", "rank_of"]


@dataclass(frozen=True, slots=True)
class Parameters:
    """How to combine; only what the method takes means anything.

    `rank` None keeps what the method gives: the sum of the ranks, or for svd the largest of them; `density` is the
    share of entries that stay, above 0 and at most 1; `epsilon` the width of DELLA's probabilities; `space` dense or
    core: whether entries are those of the deltas or of their cores in shared bases.
    """

    method: str
    rank: int | None = None
    density: float = 1.0
    epsilon: float = 0.1
    seed: int = 0
    space: str = "dense"


@dataclass(frozen=True, slots=True)
class Stored:
    """Factors as they are stored, lora_A (r, n) and lora_B (m, r) on the CPU, and how good they are.

    `norm2` and `error2` are the squared Frobenius norms of the method's exact result and of what the stored product
    differs from it by; `bound2` is what the norm could have been at most, had the deltas not cancelled.
    """

    lora_A: torch.Tensor = field(repr=False)
    lora_B: torch.Tensor = field(repr=False)
    norm2: float
    error2: float
    bound2: float


def method_named(name: str) -> Method:
    """Return the entry of the table; UsageError, with the names that there are, for any other."""
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}", f"--method {'|'.join(METHODS)}")
    return METHODS[name]


def rank_of(ranks: Sequence[int], shape: tuple[int, int], parameters: Parameters) -> int:
    """Return the rank of a module's stored factors, from those of its deltas and its shape.

    A rank that was asked for is an upper bound: a module never gets more than its deltas have together, or its shorter
    side. Raises UsageError for a rank below 1.
    """
    if parameters.rank is not None and parameters.rank < 1:
        raise UsageError(f"a result of rank {parameters.rank} is none", "--rank 1, or more")
    if parameters.rank is not None:
        return min(parameters.rank, sum(ranks), *shape)
    method = method_named(parameters.method)
    if method.truncates:
        return min(max(ranks), *shape)
    return sum(ranks) if method.sums else min(sum(ranks), *shape)


def compose_deltas(
    products: Sequence[Product], weights: Sequence[float], parameters: Parameters, module: str, dtype: torch.dtype
) -> Stored:
    """Combine the deltas of one module; `module` is its name, which its random choices depend on.

    The weighted sum keeps the factors' own entries: lora_A as they are, lora_B times weight and scaling, each computed
    in float64 and rounded to the dtype. Raises as the method does.
    """
    method = method_named(parameters.method)
    rank = rank_of([each.rank for each in products], products[0].shape, parameters)
    if is_dense(parameters):
        tiled = _tiled(products, weights, parameters, module)
        return _stored_tiled(tiled, rank, seed_of(f"{parameters.seed}\0{module}\0range"), dtype)
    if isinstance(method.compute, Elementwise):
        exact = _in_core(products, weights, parameters, module)
    else:
        exact = method.compute(products, weights, parameters.density)
    return _stored_exact(exact, rank, dtype)


def is_dense(parameters: Parameters) -> bool:
    """Say whether the deltas' own entries have to be made, tile by tile."""
    return isinstance(method_named(parameters.method).compute, Elementwise) and parameters.space == "dense"


def _stored_exact(exact: Product, rank: int, dtype: torch.dtype) -> Stored:
    kept = exact if exact.rank <= rank else decomposed(exact).truncated(rank)
    lora_A, lora_B = rounded(kept.right, dtype), rounded(kept.left, dtype)
    stored = Product.of(lora_B, lora_A, device=exact.left.device)
    bound2 = _squared(float(exact.left.norm() * exact.right.norm()))
    norm2, error2 = _squares(exact, stored)
    return _padded(Stored(lora_A.cpu(), lora_B.cpu(), norm2, error2, bound2), rank)


def _squares(exact: Product, stored: Product) -> tuple[float, float]:
    """Return the squared norms of a product and of its difference to another, by one QR of the right factors."""
    if torch.equal(exact.right, stored.right):
        right, apart = exact.right, exact.left - stored.left
        upper = torch.linalg.qr(right.T, mode="r").R
        return _square(exact.left @ upper.T), _square(apart @ upper.T)
    upper = torch.linalg.qr(torch.cat([exact.right, stored.right]).T, mode="r").R
    first, second = upper.split([exact.rank, stored.rank], 1)
    whole = exact.left @ first.T
    return _square(whole), _square(whole - stored.left @ second.T)


def _square(matrix: torch.Tensor) -> float:
    return _squared(float(matrix.norm()))


def _squared(norm: float) -> float:
    """Return the square, infinite where it leaves float64: a power would raise."""
    return norm * norm


def _padded(stored: Stored, rank: int) -> Stored:
    """Return the factors with zeros up to the rank, where the method left fewer directions than it may."""
    missing = rank - stored.lora_A.shape[0]
    if missing <= 0:
        return stored
    lora_A = torch.cat([stored.lora_A, stored.lora_A.new_zeros(missing, stored.lora_A.shape[1])])
    lora_B = torch.cat([stored.lora_B, stored.lora_B.new_zeros(stored.lora_B.shape[0], missing)], 1)
    return Stored(lora_A, lora_B, stored.norm2, stored.error2, stored.bound2)


def _tiled(products: Sequence[Product], weights: Sequence[float], parameters: Parameters, module: str) -> Tiled:
    """Return an element-wise method's result, made block by block."""
    method = method_named(parameters.method).compute
    assert isinstance(method, Elementwise)
    shape = products[0].shape
    sources = [
        method.sparsify(
            Matrix(shape, each.rows, parameters.density, parameters.epsilon, f"{parameters.seed}\0{module}\0{position}")
        )
        for position, each in enumerate(products)
    ]
    device = products[0].left.device
    return Tiled(shape, device, lambda tile: method.combine([rows(tile) for rows in sources], weights))


def _stored_tiled(matrix: Tiled, rank: int, seed: int, dtype: torch.dtype) -> Stored:
    kept = matrix.best(rank, seed)
    lora_A, lora_B = rounded(kept.right, dtype), rounded(kept.left, dtype)
    norm2, error2 = matrix.squares(Product.of(lora_B, lora_A, device=matrix.device))
    return _padded(Stored(lora_A.cpu(), lora_B.cpu(), norm2, error2, norm2), rank)


def _in_core(products: Sequence[Product], weights: Sequence[float], parameters: Parameters, module: str) -> Product:
    """Return an element-wise method's result on the cores in shared bases, which has their rank.

    The bases are the singular vectors of all lora_B side by side and of all lora_A, as in Core Space merging
    (Panariello et al. 2025, arXiv 2509.17786), with the scaling in lora_B: what is done to entries depends on them.
    """
    whole = summed(products)
    left, right = _principal(whole.left), _principal(whole.right.T).T
    cores = [(left.T @ each.left) @ (each.right @ right.T) for each in products]
    rows = cores[0].shape[0]
    units = torch.eye(rows, dtype=torch.float64, device=left.device)
    merged = _tiled([Product(units, core) for core in cores], weights, parameters, module).rows(slice(0, rows))
    return Product(left @ merged, right)


def _principal(columns: torch.Tensor) -> torch.Tensor:
    """Return the left singular vectors of a tall matrix, by a QR first."""
    basis = torch.linalg.qr(columns)
    turned: torch.Tensor = basis.Q @ torch.linalg.svd(basis.R, full_matrices=False).U
    return turned
