"""Whether an update without low-rank factors, or one of a convolution, is made for a tensor of that shape."""

from __future__ import annotations

import math

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
    Update,
)
from loramgr.tensorfile import TensorView

__all__ = ["is_shaped_for"]

Shape = tuple[int, ...]


def is_shaped_for(update: Update, shape: Shape) -> bool:
    """Say whether the update can be applied to a tensor of the shape; matrices stored as (in, out) apart."""
    match update:
        case Hadamard() | Kronecker() | Delta():
            return _fits_delta(update, shape)
        case Patch():
            return _are_places(update.indices, update.values)
        case Experts():
            return _fits_experts(update, shape)
        case Decomposed():
            counts = shape[update.by_input : update.by_input + 1]
            return (update.magnitude.spec.elements,) == counts and is_shaped_for(update.inner, shape)
    return len(shape) > 0 and _fits_layer(update, shape)


def _fits_layer(update: Update, shape: Shape) -> bool:
    inputs = math.prod(shape[1:])
    match update:
        case LowRank():
            a, b = update.lora_A.spec.shape, update.lora_B.spec.shape
            return len(shape) == len(a) == len(b) and shape == (b[0], *a[1:]) and set(b[2:]) <= {1} and a[0] == b[1]
        case Scale():
            return _fits_scale(update, shape)
        case Orthogonal():
            blocks = update.vectors.spec.shape[0]
            return inputs % update.block_size == 0 and (update.repeated or blocks == inputs // update.block_size)
        case Reflected():
            return len(update.vectors.spec.shape) == 2 and update.vectors.spec.shape[0] == inputs
        case Butterfly():
            factors = update.blocks.spec.shape
            return update.scale.spec.elements == shape[0] and factors[1] * factors[2] == inputs
    return False


def _fits_scale(update: Scale, shape: Shape) -> bool:
    """Say whether there is a factor for each output, or each input, those of all groups of a convolution counted."""
    size = update.vector.spec.elements
    if update.side == "output":
        return size == shape[0]
    return len(shape) > 1 and 0 < shape[1] <= size and size % shape[1] == 0 and shape[0] % (size // shape[1]) == 0


def _fits_hadamard(update: Hadamard, shape: Shape) -> bool:
    made = []
    for a, b, core in ((update.w1_a, update.w1_b, update.t1), (update.w2_a, update.w2_b, update.t2)):
        made.append(_tucker_shape(core, a, b) if core is not None else _product_shape((a, b)))
    return made[0] == made[1] and _is_reshaped(made[0], shape) and (update.t1 is None) == (update.t2 is None)


def _fits_kronecker(update: Kronecker, shape: Shape) -> bool:
    first = _product_shape(update.w1)
    if update.t2 is None:
        second = _product_shape(update.w2)
    else:
        second = _tucker_shape(update.t2, *update.w2) if len(update.w2) == 2 else None
    if first is None or second is None or len(first) != 2 or len(second) < 2:
        return False
    return _is_reshaped((first[0] * second[0], first[1] * second[1], *second[2:]), shape)


def _product_shape(views: tuple[TensorView, ...]) -> Shape | None:
    """Return the shape that one tensor has, or two give when multiplied; None where they do not multiply."""
    shapes = [view.spec.shape for view in views]
    if len(shapes) == 1:
        return shapes[0]
    if len(shapes) != 2 or len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][0]:
        return None
    return shapes[0][0], shapes[1][1]


def _tucker_shape(core: TensorView, a: TensorView, b: TensorView) -> Shape | None:
    ranks, one, other = core.spec.shape, a.spec.shape, b.spec.shape
    if len(ranks) < 2 or len(one) != 2 or len(other) != 2 or (one[0], other[0]) != ranks[:2]:
        return None
    return one[1], other[1], *ranks[2:]


def _is_reshaped(made: Shape | None, shape: Shape) -> bool:
    """Say whether the values belong into the shape: with as many outputs, and the rest flattened or not."""
    return made is not None and len(shape) > 0 and made[0] == shape[0] and math.prod(made) == math.prod(shape)


def _fits_delta(update: Hadamard | Kronecker | Delta, shape: Shape) -> bool:
    if isinstance(update, Hadamard):
        return _fits_hadamard(update, shape)
    if isinstance(update, Kronecker):
        return _fits_kronecker(update, shape)
    if update.indices is not None:
        return _are_places(update.indices, update.tensor)
    made = update.tensor.spec.shape
    return made == shape or _is_reshaped(made, shape)


def _are_places(indices: TensorView, values: TensorView) -> bool:
    return len(indices.spec.shape) == 1 and indices.spec.shape == values.spec.shape


def _fits_experts(update: Experts, shape: Shape) -> bool:
    a, b = update.lora_A.spec.shape, update.lora_B.spec.shape
    if not (len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2]):
        return False
    straight, turned = (a[0], b[1], a[2]), (a[0], a[2], b[1])
    if update.transposed is None:
        return shape in (straight, turned) and (straight != turned)
    return shape == (turned if update.transposed else straight)
