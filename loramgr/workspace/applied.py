"""What updates without low-rank factors do to a tensor: in float64, and the same bits on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramgr.adapter import (
    Butterfly,
    Decomposed,
    Delta,
    Experts,
    Hadamard,
    Kronecker,
    LowRank,
    Orthogonal,
    Patch,
    Reflected,
    Scale,
)
from loramgr.errors import IncompatibleError

if TYPE_CHECKING:
    import torch

__all__ = ["Additive", "Rebuilding", "applied", "delta_of", "patched"]

Additive = Hadamard | Kronecker | Delta | Experts  # the tensor gets a delta that depends on the adapter alone
Rebuilding = (
    Scale | Orthogonal | Butterfly | Reflected | Decomposed | Patch
)  # what the tensor becomes depends on what it was


def delta_of(update: Additive | LowRank, shape: tuple[int, ...] | None) -> torch.Tensor:
    """Return what is added to a tensor of the shape, in float64; a low-rank one's for layers stored as (out, in).

    Without a shape it has the one that its tensors give. Raises IncompatibleError for places outside of the tensor,
    and for such places where no shape is known.
    """
    delta = _delta(update, shape)
    return delta if shape is None else delta.reshape(shape)


def _delta(update: Additive | LowRank, shape: tuple[int, ...] | None) -> torch.Tensor:
    from loramgr.algebra import dense

    match update:
        case LowRank():
            from loramgr.products import product

            left, right = update.lora_B.load().flatten(1), update.lora_A.load().flatten(1)
            return product(left, right).mul_(update.scaling)
        case Hadamard():
            first, second = (update.w1_a.load(), update.w1_b.load()), (update.w2_a.load(), update.w2_b.load())
            cores = None if update.t1 is None or update.t2 is None else (update.t1.load(), update.t2.load())
            return dense.hadamard(first, second, cores).mul_(update.scaling)
        case Kronecker():
            w1, w2 = (tuple(view.load() for view in views) for views in (update.w1, update.w2))
            core = None if update.t2 is None else update.t2.load()
            return dense.kronecker(w1, w2, core).mul_(update.scaling)
        case Experts():
            turned = (update.lora_A.spec.shape[2], update.lora_B.spec.shape[1])
            transposed = (
                update.transposed if update.transposed is not None else shape is not None and shape[1:] == turned
            )
            return dense.expert_deltas(
                update.lora_A.load(), update.lora_B.load(), update.scaling, transposed=transposed
            )
    return _plain_delta(update, shape)


def _plain_delta(update: Delta, shape: tuple[int, ...] | None) -> torch.Tensor:
    import torch

    values = update.tensor.load().double() * update.scaling
    if update.indices is None:
        return values
    if shape is None:
        raise IncompatibleError(f"{update.indices.spec.name}: only the base says in what shape these places are")
    result = torch.zeros(shape, dtype=torch.float64)
    result.view(-1)[_places(update.indices.load(), result.numel(), update.indices.spec.name)] = values
    return result


def applied(update: Rebuilding, start: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Return what the update makes of a tensor, in float64; with `transposed` a matrix is stored as (in, out)."""
    if isinstance(update, Patch):
        return patched(update, start.double())
    weight = start.T if transposed else start
    result = _applied(update, weight)
    return result.T if transposed else result


def _applied(update: Scale | Orthogonal | Butterfly | Reflected | Decomposed, weight: torch.Tensor) -> torch.Tensor:
    from loramgr.algebra import dense

    match update:
        case Scale():
            factors = update.vector.load().double().flatten() + update.offset
            return dense.scaled(weight, factors, int(update.side == "input"))
        case Orthogonal():
            blocks = dense.rotation(update.vectors.load(), update.block_size, update.terms)
            return dense.rotated(weight.flatten(1), blocks).reshape(weight.shape)
        case Butterfly():
            flat = weight.flatten(1)
            return dense.butterfly(flat, update.blocks.load(), update.scale.load()).reshape(weight.shape)
        case Reflected():
            return dense.reflected(weight.flatten(1), update.vectors.load(), orthonormal=update.orthonormal).reshape(
                weight.shape
            )
        case Decomposed():
            direction = weight.double() + delta_of(update.inner, tuple(weight.shape))
            return dense.decomposed(direction, update.magnitude.load(), int(update.by_input), update.epsilon)


def patched(update: Patch, start: torch.Tensor) -> torch.Tensor:
    """Return a copy of the tensor with the values in their places; IncompatibleError for places outside of it."""
    result = start.clone().contiguous()
    places = _places(update.indices.load(), result.numel(), update.indices.spec.name)
    result.view(-1)[places] = update.values.load().to(result.dtype)
    return result


def _places(indices: torch.Tensor, size: int, name: str) -> torch.Tensor:
    places = indices.long()
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < size:
        raise IncompatibleError(f"{name}: names a place outside of the tensor's {size} values")
    return places
