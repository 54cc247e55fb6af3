"""One parameter that two adapters update: how far their deltas are from each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from loramgr.adapter import (
    Butterfly,
    Decomposed,
    Experts,
    Hadamard,
    Kronecker,
    LowRank,
    Opaque,
    Orthogonal,
    Replacement,
    Rows,
    Scale,
    Shift,
    Update,
    whole_tensor,
)
from loramgr.errors import IncompatibleError
from loramgr.records import ModuleDifference
from loramgr.workspace.applied import Additive
from loramgr.workspace.effects import effect_of, product_alone, whole_rows
from loramgr.workspace.weights import Weight, Weights, without_own_table

if TYPE_CHECKING:
    from loramgr.algebra.comparison import Comparison, Distances
    from loramgr.algebra.effects import Effect
    from loramgr.algebra.lowrank import Product

__all__ = ["Pair", "compare", "kind_alone", "module_name", "needs_weight"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The two updates of one parameter, None for an adapter that has none; at least one is there."""

    name: str
    a: Update | None
    b: Update | None

    @property
    def updates(self) -> list[Update]:
        """Those that are there."""
        return [update for update in (self.a, self.b) if update is not None]

    @property
    def status(self) -> str:
        """Added, removed, or changed as long as nobody has compared them."""
        return "added" if self.a is None else "removed" if self.b is None else "changed"


def module_name(name: str) -> str:
    """Return what a person calls the parameter: the module, for its weight."""
    return name.removesuffix(".weight")


def kind_alone(name: str, update: Update) -> str:
    """Return the kind of an update as far as the adapter says."""
    if isinstance(update, Shift):
        return "bias"
    if isinstance(update, Rows):
        return "tokens"
    if isinstance(update, Opaque):
        return "opaque"
    if name.endswith(".bias"):
        return "bias"
    if isinstance(update, Replacement):
        return "saved"
    return "experts" if isinstance(update, Experts) else _layer_alone(update)


def _layer_alone(update: Update) -> str:
    match update:
        case LowRank() if update.kind == "embedding":
            return "embedding"
        case Orthogonal() if update.is_embedding:
            return "embedding"
        case Decomposed():
            return _layer_alone(update.inner)
    dimensions = _kernel_dimensions(update)
    if dimensions:
        return f"conv{dimensions}d"
    is_turned = isinstance(update, LowRank | Scale | Orthogonal | Butterfly) and update.fan_in_fan_out
    return "conv1d" if is_turned else "linear"


def _kernel_dimensions(update: Update) -> int:
    """Return how many dimensions the kernel of a convolution has, 0 for other layers and where only the base tells."""
    match update:
        case LowRank() if update.kind == "conv":
            return len(update.lora_A.spec.shape) - 2
        case Scale():  # PEFT keeps the vector as (1, n, 1…), as many dimensions as the kernel has
            return max(0, len(update.vector.spec.shape) - 2)
        case Butterfly():  # PEFT keeps the scale of a plain layer as (out, 1)
            return 2 if update.scale.spec.shape[0] == 1 < update.scale.spec.shape[1] else 0
        case Hadamard():
            return 0 if update.t1 is None else len(update.t1.spec.shape) - 2
        case Kronecker():
            core = update.t2 if update.t2 is not None else update.w2[0] if len(update.w2) == 1 else None
            return 0 if core is None else len(core.spec.shape) - 2
    return 0


def needs_weight(pair: Pair) -> bool:
    """Say whether all figures of the pair can be told only with the base: its deltas do not follow from the adapter."""
    return not (all(map(_is_product, pair.updates)) or all(map(_is_delta, pair.updates)))


def compare(pair: Pair, weights: Weights | None, *, spectrum: bool) -> ModuleDifference:
    """Compare two updates, by their factors where both have nothing else, else densely by rows.

    Without `weights`, what is measured against the base stays None. Raises IncompatibleError, naming the parameter,
    for deltas of different shapes, and for NaN or infinite values.
    """
    kind = weights.kind(pair.updates[0]) if weights is not None else kind_alone(pair.name, pair.updates[0])
    blank = ModuleDifference(module_name(pair.name), pair.status, kind)
    weight = None
    if weights is not None and needs_weight(pair):
        weight = weights.weight(pair.updates)
        settled = [None if each is None else without_own_table(each, weight) for each in (pair.a, pair.b)]
        pair = replace(pair, a=settled[0], b=settled[0] if pair.a is pair.b else settled[1])
    if not needs_weight(pair):
        products = all(map(_is_product, pair.updates))
        return _compared(pair, blank, spectrum=spectrum) if products else _compared_deltas(pair, blank)
    return _compared_densely(pair, blank, weight)


def _is_product(update: Update) -> bool:
    match update:
        case LowRank():
            return update.magnitude is None and update.table is None
        case Shift():
            return update.table is None
    return False


def _is_delta(update: Update) -> bool:
    """Say whether the update adds what the adapter alone tells."""
    return _is_product(update) or (isinstance(update, Additive) and getattr(update, "indices", None) is None)


def _compared_deltas(pair: Pair, blank: ModuleDifference) -> ModuleDifference:
    """Compare deltas that are not all products of two factors; the weight is in neither of them."""
    import torch

    from loramgr.algebra.effects import effect_distances

    a, b = (None if each is None else effect_of(each, None, transposed=False) for each in (pair.a, pair.b))
    if pair.a is pair.b:
        b = a
    shapes = {each.shape for each in (a, b) if each is not None}
    if len(shapes) > 1:
        raise IncompatibleError(f"{blank.name}: the deltas are of different shapes: adapters of different bases")
    return _with_distances(blank, effect_distances(a, b, torch.zeros(()).expand(shapes.pop())))


def _compared(pair: Pair, blank: ModuleDifference, *, spectrum: bool) -> ModuleDifference:
    from loramgr.algebra.comparison import compared
    from loramgr.algebra.spectrum import effective_rank

    a, b = _products(pair)
    if a.shape != b.shape:
        shapes = " and ".join(f"{rows} × {columns}" for rows, columns in (a.shape, b.shape))
        raise IncompatibleError(f"{blank.name}: the deltas are {shapes}: adapters of different bases")
    result = compared(a, b)
    told = _with_distances(blank, result.distances)
    if not all(isinstance(update, LowRank) for update in pair.updates):
        return told
    told = replace(
        told,
        rank_a=result.rank_a,
        rank_b=result.rank_b,
        effective_rank_a=effective_rank(result.values_a),
        effective_rank_b=effective_rank(result.values_b),
        subspace_similarity=result.inputs.similarity,
        output_similarity=result.outputs.similarity,
    )
    return _with_spectra(told, result) if spectrum else told


def _products(pair: Pair) -> tuple[Product, Product]:
    """Return the two deltas as products, each read once; that of an update that is not there is zero."""
    from loramgr.algebra.lowrank import Product

    a = None if pair.a is None else product_alone(pair.a)
    b = a if pair.a is pair.b else None if pair.b is None else product_alone(pair.b)
    known = a if a is not None else b
    assert known is not None
    zero = Product(known.left[:, :0], known.right[:0])
    return a if a is not None else zero, b if b is not None else zero


def _with_distances(blank: ModuleDifference, found: Distances) -> ModuleDifference:
    if not all(map(math.isfinite, (found.norm_a, found.norm_b, found.distance))):
        raise IncompatibleError(f"{blank.name}: NaN or infinite values, or deltas that exceed float64")
    return replace(
        blank,
        status="same" if found.distance == 0 and blank.status == "changed" else blank.status,
        norm_a=found.norm_a,
        norm_b=found.norm_b,
        distance=found.distance,
        relative_distance=found.relative_distance,
        cosine=found.cosine,
    )


def _with_spectra(told: ModuleDifference, result: Comparison) -> ModuleDifference:
    return replace(
        told,
        spectrum_a=result.values_a.tolist(),
        spectrum_b=result.values_b.tolist(),
        spectrum_difference=result.values_difference.tolist(),
        input_angles=result.inputs.angles.tolist(),
        output_angles=result.outputs.angles.tolist(),
        similarities=result.inputs.similarities.tolist(),
    )


def _compared_densely(pair: Pair, blank: ModuleDifference, weight: Weight | None) -> ModuleDifference:
    if weight is None:
        return _compared_alone(pair, blank)
    from loramgr.algebra.effects import effect_distances

    a, b = (
        None if each is None else effect_of(each, weight.tensor, weight.transposed, weight.shape)
        for each in (pair.a, pair.b)
    )
    own = weight.tensor
    shapes = {each.shape for each in (a, b) if each is not None} | (set() if own is None else {tuple(own.shape)})
    if len(shapes) > 1:
        return blank
    if own is None:  # the base lacks the parameter: what it is measured against is zero
        import torch

        own = torch.zeros(()).expand(shapes.pop())
    return _with_distances(blank, effect_distances(a, b, own))


def _compared_alone(pair: Pair, blank: ModuleDifference) -> ModuleDifference:
    """Compare as far as the adapters alone say: whole tensors among themselves, and whether everything is equal."""
    if pair.a is None or pair.b is None:
        return blank
    if _are_equal(pair.a, pair.b):
        return replace(blank, status="same", distance=0.0, relative_distance=0.0, cosine=1.0)
    transposed = any(isinstance(each, LowRank) and _is_transposed(each) for each in pair.updates)
    if isinstance(pair.a, Rows) and isinstance(pair.b, Rows) and pair.a.indices == pair.b.indices:
        effects: list[Effect] = [whole_rows(each) for each in (pair.a, pair.b)]
    elif all(isinstance(each, Opaque) or whole_tensor(each) is not None for each in pair.updates):
        effects = [effect_of(each, None, transposed) for each in (pair.a, pair.b)]
    else:
        return blank
    if effects[0].shape != effects[1].shape:
        return blank
    from loramgr.algebra.effects import effect_distance

    distance = effect_distance(*effects)
    if not math.isfinite(distance):
        raise IncompatibleError(f"{blank.name}: NaN or infinite values, or deltas that exceed float64")
    return replace(blank, status="changed" if distance else "same", distance=distance)


def _are_equal(a: Update, b: Update) -> bool:
    """Say whether two updates are the same, byte for byte."""
    if a is b:
        return True
    views = list(a.views()), list(b.views())
    if type(a) is not type(b) or _facts(a) != _facts(b):
        return False
    return all(first.read_bytes() == second.read_bytes() for first, second in zip(*views, strict=True))


def _facts(update: Update) -> tuple[object, ...]:
    """Return what an update is beside the bytes of its tensors."""
    shapes = tuple((view.spec.dtype, view.spec.shape) for view in update.views())
    match update:
        case LowRank():
            layout = (update.kind, update.scaling, update.magnitude is None, update.table is None)
            return (*shapes, *layout, _is_transposed(update))
        case Shift():
            return (*shapes, update.scaling, update.table is None)
        case Rows():
            return (*shapes, update.indices, update.table is None)
    numbers = (getattr(update, each.name) for each in fields(update))
    return (*shapes, *(each for each in numbers if isinstance(each, int | float | str)))


def _is_transposed(update: LowRank) -> bool:
    return update.kind == "embedding" or update.fan_in_fan_out
