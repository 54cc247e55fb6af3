"""The algorithms of LyCORIS, each module's tensors put together as updates of its parameters.

Formulas: LyCORIS 4.1 `modules/*.py`, as their forward pass has them; `alpha / rank` counts once (its `merge_to` applies
it twice for LoHa and LoKr). What has no formula here is kept whole and never applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from loramgr.adapter import Delta, Hadamard, Kronecker, Opaque, Scale, Shift, Update
from loramgr.formats.factor_views import reshaped
from loramgr.formats.factored import MAX_DIMENSIONS, Scaling, decomposed, low_rank, scaling_of
from loramgr.formats.scalars import scalar
from loramgr.formats.suffixed_keys import Module
from loramgr.tensorfile import TensorView

__all__ = ["Layer", "layer_of"]

_KEPT = {
    "oft_blocks": ("oft", "LyCORIS' Diag-OFT rotates the outputs under a constraint, which loramgr does not compute"),
    "a1": ("glora", "GLoRA's delta is a function of the weight (W A + B), which loramgr does not compute"),
    "lambda_layer": ("tlora", "T-LoRA changes with the time step and has no one delta"),
}
_BOFT = ("boft", "LyCORIS' BOFT rotates the outputs, which loramgr does not compute")


@dataclass(frozen=True, slots=True)
class Layer:
    """What one module's tensors make: its method, and its updates by the parameter (weight, bias).

    `scaling` is None where the method has none.
    """

    method: str
    updates: dict[str, Update] = field(default_factory=dict)
    scaling: Scaling | None = None


def layer_of(module: Module) -> Layer:
    """Return what the module's tensors make, by the tensors that are there.

    Raises IncompatibleError, naming the module and the tensor, for a set of tensors or shapes that no algorithm has.
    """
    found = [build for role, build in _ALGORITHMS.items() if role in module.tensors]
    if set(module.tensors) == {"diff_b"}:
        found = [_full]
    kept = [reason for role, reason in _KEPT.items() if role in module.tensors]
    if len(set(found)) + len(kept) != 1:
        there = ", ".join(sorted(module.tensors))
        raise module.refused(f"the file holds {there}: " + ("of several methods" if found else "no method has these"))
    return found[0](module) if found else _kept(module, *kept[0])


def _lora(module: Module) -> Layer:
    module.allow("down", "up", "mid", "alpha", "magnitude", "lora_bias", "diff_b")
    inner, scaling = low_rank(module)
    update = decomposed(module, inner, (inner.lora_B.spec.shape[0], inner.lora_A.spec.shape[1]))
    is_dora = "magnitude" in module.tensors
    updates: dict[str, Update] = {"weight": update}
    if "lora_bias" in module.tensors and "diff_b" in module.tensors:
        raise module.refused("two tensors move its bias")
    if "lora_bias" in module.tensors:
        updates["bias"] = _shift(module, "lora_bias", scaling.value, inner.lora_B.spec.shape[0])
    if "diff_b" in module.tensors:
        updates["bias"] = _shift(module, "diff_b", 1.0, inner.lora_B.spec.shape[0])
    is_convolution = "mid" in module.tensors or set(inner.lora_A.spec.shape[2:]) - {1}
    return Layer("dora" if is_dora else "locon" if is_convolution else "lora", updates, scaling)


def _loha(module: Module) -> Layer:
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    module.need(*parts)
    module.allow(*parts, "hada_t1", "hada_t2", "alpha", "magnitude", "scalar")
    w1_a, w1_b, w2_a, w2_b = (module.tensors[part] for part in parts)
    t1, t2 = module.tensors.get("hada_t1"), module.tensors.get("hada_t2")
    first, second = _factored(module, (w1_a, w1_b), t1), _factored(module, (w2_a, w2_b), t2)
    if first.layer != second.layer or first.kernel != second.kernel or (t1 is None) != (t2 is None):
        raise module.refused(f"its two factors are of different layers, {first.layer} and {second.layer}")
    scaling = scaling_of(module, first.rank)
    factors = (first.a, first.b, second.a, second.b)
    update = Hadamard(*factors, rank=first.rank, alpha=scaling.alpha, scaling=scaling.value, t1=t1, t2=t2)
    return Layer("loha", {"weight": decomposed(module, update, first.layer)}, scaling)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two factors of a matrix, as an update wants them: rank, (out, in) and kernel of what they make."""

    a: TensorView
    b: TensorView
    rank: int
    layer: tuple[int, int]
    kernel: tuple[int, ...]


def _factored(module: Module, pair: tuple[TensorView, TensorView], core: TensorView | None) -> _Pair:
    """Return the pair (out, r) and (r, in·k…), or (r, out) and (r, in) around a core (r, r, k…)."""
    a, b = pair
    shapes = f"{a.spec.shape} and {b.spec.shape}"
    if len(a.spec.shape) < 2 or len(b.spec.shape) < 2 or 0 in (*a.spec.shape, *b.spec.shape):
        raise module.refused(f"its factors are {shapes}: empty or flattened")
    if core is not None:
        rank = a.spec.shape[0]
        shape = core.spec.shape
        if not 2 < len(shape) <= MAX_DIMENSIONS or shape[:2] != (rank, b.spec.shape[0]) or 0 in shape:
            raise module.refused(f"its factors are {shapes}, and the core between them is {shape}")
        if len(a.spec.shape) != 2 or len(b.spec.shape) != 2 or shape[0] != shape[1]:
            raise module.refused(f"its factors are {shapes}, around a core {shape}")
        return _Pair(a, b, rank, (a.spec.shape[1], b.spec.shape[1]), shape[2:])
    rank, kernel = b.spec.shape[0], b.spec.shape[2:]
    if a.spec.shape[1] != rank or set(a.spec.shape[2:]) - {1} or len(b.spec.shape) > MAX_DIMENSIONS:
        raise module.refused(f"its factors are {shapes}: the ranks do not fit each other")
    columns = b.spec.elements // rank
    return _Pair(reshaped(a, a.spec.shape[:2]), reshaped(b, (rank, columns)), rank, (a.spec.shape[0], columns), kernel)


def _lokr(module: Module) -> Layer:
    module.allow(*(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")), "alpha", "magnitude")
    w1, rank_1 = _kronecker_side(module, "w1", None)
    w2, rank_2 = _kronecker_side(module, "w2", module.tensors.get("lokr_t2"))
    rank = rank_1 if rank_1 is not None else rank_2
    scaling = None if rank is None else scaling_of(module, rank)
    update = Kronecker(
        w1=w1,
        w2=w2,
        rank=rank,
        alpha=None if scaling is None else scaling.alpha,
        scaling=1.0 if scaling is None else scaling.value,
        t2=module.tensors.get("lokr_t2"),
    )
    if "magnitude" not in module.tensors:
        return Layer("lokr", {"weight": update}, scaling)
    (first_out, first_in), (second_out, second_in) = _side_shape(w1, None), _side_shape(w2, update.t2)
    layer = (first_out * second_out, first_in * second_in)
    return Layer("lokr", {"weight": decomposed(module, update, layer)}, scaling)


def _kronecker_side(module: Module, side: str, core: TensorView | None) -> tuple[tuple[TensorView, ...], int | None]:
    """Return one side of a Kronecker product, whole or as two factors, and its rank, None for a whole one."""
    whole, a, b = (module.tensors.get(f"lokr_{side}{part}") for part in ("", "_a", "_b"))
    if whole is not None:
        if a is not None or b is not None or core is not None:
            raise module.refused(f"lokr_{side} is there, and factors of it too")
        shape = whole.spec.shape
        if not 2 <= len(shape) <= (2 if side == "w1" else MAX_DIMENSIONS) or 0 in shape:
            raise module.refused(f"lokr_{side} is {shape}: empty or flattened")
        return (whole,), None
    if a is None or b is None:
        module.need(f"lokr_{side}_a", f"lokr_{side}_b")
        raise module.refused(f"half of lokr_{side}")
    pair = _factored(module, (a, b), core)
    return (pair.a, pair.b), pair.rank


def _side_shape(side: tuple[TensorView, ...], core: TensorView | None) -> tuple[int, int]:
    if len(side) == 1:
        return side[0].spec.shape[0], side[0].spec.shape[1]
    return side[0].spec.shape[1 if core is not None else 0], side[1].spec.shape[1]


def _ia3(module: Module) -> Layer:
    """W · (1 + v) per output, or per input where `on_input` is not 0 (LyCORIS `modules/ia3.py`)."""
    module.need("on_input", "weight")
    module.allow("on_input", "weight")
    vector = module.tensors["weight"]
    if vector.spec.elements != max((*vector.spec.shape, 1)) or vector.spec.elements == 0:
        raise module.refused(f"weight is {vector.spec.shape}, it must be a vector")
    on_input = scalar(module.tensors["on_input"]) != 0
    flat = reshaped(vector, (vector.spec.elements,))
    return Layer("ia3", {"weight": Scale(flat, side="input" if on_input else "output", offset=1.0)})


def _full(module: Module) -> Layer:
    module.allow("diff", "diff_b")
    updates: dict[str, Update] = {}
    if "diff" in module.tensors:
        updates["weight"] = Delta(module.tensors["diff"])
    if "diff_b" in module.tensors:
        updates["bias"] = Shift(module.tensors["diff_b"], 1.0)
    return Layer("full", updates)


def _norm(module: Module) -> Layer:
    module.allow("w_norm", "b_norm")
    updates: dict[str, Update] = {}
    for role, parameter in (("w_norm", "weight"), ("b_norm", "bias")):
        if role in module.tensors:
            updates[parameter] = Shift(module.tensors[role], 1.0)
    return Layer("norm", updates)


def _shift(module: Module, role: str, scaling: float, outputs: int) -> Shift:
    if module.shape(role) != (outputs,):
        raise module.refused(f"{role} is {module.shape(role)}, it must be ({outputs},)")
    return Shift(module.tensors[role], scaling)


def _kept(module: Module, method: str, reason: str) -> Layer:
    """Keep the tensors of a method without a formula here, each by its own name."""
    if "oft_blocks" in module.tensors and len(module.shape("oft_blocks")) == 4:
        method, reason = _BOFT
    return Layer(method, {role: Opaque(view, method, reason) for role, view in module.tensors.items()})


_ALGORITHMS: dict[str, Callable[[Module], Layer]] = {
    "down": _lora,
    "up": _lora,
    **{f"hada_{part}": _loha for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"lokr_{part}": _lokr for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    "on_input": _ia3,
    "diff": _full,
    "w_norm": _norm,
    "b_norm": _norm,
}
