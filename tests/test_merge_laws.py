"""For every kind of update: a merge of weight 1 is what the update says, rounded once; of weight 0 nothing moves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rationals import LAYOUTS, bits, nearest

from loramgr.adapter import (
    Butterfly,
    Decomposed,
    Delta,
    Experts,
    Hadamard,
    Kronecker,
    LowRank,
    Opaque,
    Orthogonal,
    Patch,
    Reflected,
    Replacement,
    Rows,
    Scale,
    Shift,
    Update,
)
from loramgr.checkpoints.binding import BoundUpdate
from loramgr.errors import IncompatibleError
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.workspace.computing import Merger
from loramgr.workspace.contributions import Contribution, Pick

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
EXAMPLES = 400 if os.environ.get("LORAMGR_SOAK") else 12
Draw = Callable[[tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor in memory, as a view."""

    spec: TensorSpec
    tensor: torch.Tensor

    def load(self) -> torch.Tensor:
        return self.tensor

    def read_bytes(self) -> bytes:
        return self.tensor.contiguous().view(torch.uint8).numpy().tobytes()


def view(tensor: torch.Tensor) -> TensorView:
    return Stored(TensorSpec("t", NAMES[tensor.dtype], tuple(tensor.shape)), tensor)


@dataclass(frozen=True)
class Case:
    """An update, the shape of its weight, and what it makes of a weight in float64, None where it is an exact sum."""

    update: Update
    shape: tuple[int, ...]
    applied: Callable[[torch.Tensor], torch.Tensor] | None = None
    delta: Callable[[], list[list[Fraction]]] | None = None


def _fractions(tensor: torch.Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in tensor.double().reshape(tensor.shape[0], -1).tolist()]


def _product(b: torch.Tensor, a: torch.Tensor, scaling: float) -> list[list[Fraction]]:
    left, right = _fractions(b), _fractions(a)
    columns = range(len(right[0]))
    return [
        [Fraction(scaling) * sum((x * right[k][j] for k, x in enumerate(row)), Fraction(0)) for j in columns]
        for row in left
    ]


def _low_rank(draw: Draw) -> Case:
    a, b = draw((2, 4)), draw((6, 2))
    return Case(LowRank("linear", view(a), view(b), 2, 3.0, 1.5), (6, 4), delta=lambda: _product(b, a, 1.5))


def _shift(draw: Draw) -> Case:
    vector = draw((6,))
    return Case(Shift(view(vector), 0.75), (6,), delta=lambda: _product(torch.ones(1, 1), vector[None], 0.75))


def _replacement(draw: Draw) -> Case:
    tensor = draw((6, 4))
    return Case(Replacement(view(tensor)), (6, 4), lambda weight: tensor.double())


def _rows(draw: Draw) -> Case:
    rows = draw((2, 4))

    def applied(weight: torch.Tensor) -> torch.Tensor:
        made = weight.clone()
        made[[4, 1]] = rows.double()
        return made

    return Case(Rows((4, 1), view(rows)), (6, 4), applied)


def _hadamard(draw: Draw) -> Case:
    a, b, c, d = draw((6, 2)), draw((2, 4)), draw((6, 2)), draw((2, 4))
    update = Hadamard(view(a), view(b), view(c), view(d), 2, 1.0, 0.5)
    return Case(update, (6, 4), lambda w: w + 0.5 * (a.double() @ b.double()) * (c.double() @ d.double()))


def _kronecker(draw: Draw) -> Case:
    one, left, right = draw((2, 2)), draw((3, 2)), draw((2, 2))
    update = Kronecker((view(one),), (view(left), view(right)), 2, 1.0, 0.5)
    return Case(update, (6, 4), lambda w: w + 0.5 * torch.kron(one.double(), left.double() @ right.double()))


def _scale(draw: Draw) -> Case:
    vector = draw((6, 1))
    return Case(Scale(view(vector), "output", offset=1.0), (6, 4), lambda w: w * (vector.double() + 1.0))


def _cayley(skew: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(skew.shape[0], dtype=torch.float64)
    return (eye - skew) @ torch.linalg.inv(eye + skew)


def _orthogonal(draw: Draw) -> Case:
    vectors = draw((2, 1))

    def applied(weight: torch.Tensor) -> torch.Tensor:
        blocks = [_cayley(torch.tensor([[0.0, v], [-v, 0.0]], dtype=torch.float64)) for v in vectors[:, 0].tolist()]
        return weight @ torch.block_diag(*blocks).T

    return Case(Orthogonal(view(vectors), 2), (6, 4), applied)


def _butterfly(draw: Draw) -> Case:
    blocks, scale = draw((1, 2, 2, 2)), draw((6, 1))

    def applied(weight: torch.Tensor) -> torch.Tensor:
        turned = [_cayley((block - block.T) / 2) for block in blocks[0].double()]
        return (weight @ torch.block_diag(*turned).T) * scale.double()

    return Case(Butterfly(view(blocks), view(scale)), (6, 4), applied)


def _reflected(draw: Draw) -> Case:
    vectors = draw((4, 2))

    def applied(weight: torch.Tensor) -> torch.Tensor:
        for u in vectors.double().T:
            weight = weight - 2 * (weight @ u)[:, None] * u / (u @ u)
        return weight

    return Case(Reflected(view(vectors)), (6, 4), applied)


def _delta(draw: Draw) -> Case:
    tensor = draw((6, 4))
    return Case(Delta(view(tensor), 0.5), (6, 4), delta=lambda: _product(torch.eye(6), tensor, 0.5))


def _patch(draw: Draw) -> Case:
    values, places = draw((3,)), torch.tensor([23, 0, 7])

    def applied(weight: torch.Tensor) -> torch.Tensor:
        made = weight.flatten().clone()
        made[places] = values.double()
        return made.reshape(weight.shape)

    return Case(Patch(view(places), view(values)), (6, 4), applied)


def _experts(draw: Draw) -> Case:
    a, b = draw((3, 2, 4)), draw((3, 5, 2))
    update = Experts(view(a), view(b), 2, 1.0, 0.5)
    return Case(update, (3, 5, 4), lambda w: w + 0.5 * torch.einsum("eor,eri->eoi", b.double(), a.double()))


def _decomposed(draw: Draw) -> Case:
    magnitude, tensor = draw((4,)), draw((6, 4))
    update = Decomposed(Delta(view(tensor)), view(magnitude), by_input=True, epsilon=0.5)

    def applied(weight: torch.Tensor) -> torch.Tensor:
        direction = weight + tensor.double()
        return direction * (magnitude.double() / (direction.norm(dim=0) + 0.5))

    return Case(update, (6, 4), applied)


def _opaque(draw: Draw) -> Case:
    return Case(Opaque(view(draw((6, 4))), "prompt_tuning", "it changes no weight"), (6, 4))


MAKERS: dict[type[Any], Callable[[Draw], Case]] = {
    LowRank: _low_rank, Shift: _shift, Replacement: _replacement, Rows: _rows, Hadamard: _hadamard,
    Kronecker: _kronecker, Scale: _scale, Orthogonal: _orthogonal, Butterfly: _butterfly, Delta: _delta,
    Reflected: _reflected, Patch: _patch, Experts: _experts, Decomposed: _decomposed, Opaque: _opaque,
}  # fmt: skip


def test_every_kind_has_a_case() -> None:
    assert set(get_args(Update)) == set(MAKERS)


def _merged(update: Update, weight: torch.Tensor, factor: float) -> torch.Tensor:
    spec = TensorSpec("w", NAMES[weight.dtype], tuple(weight.shape))
    pick = cast(Pick, _Picked(factor))
    item = Contribution(pick, BoundUpdate("w", "w", update, "linear"))
    return Merger("cpu", force=False).merge(spec, weight.clone(), [item]).tensor


@dataclass(frozen=True)
class _Picked:
    weight: float
    ref: str = "a@v1"


@pytest.mark.parametrize("kind", list(MAKERS), ids=lambda kind: kind.__name__)
@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(list(LAYOUTS)), stored=st.sampled_from(list(LAYOUTS)))
def test_weight_one_applies_and_weight_zero_changes_nothing(
    kind: type[Any], seed: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(stored)

    case = MAKERS[kind](draw)
    weight = torch.randn(case.shape, generator=generator).to(dtype)
    if kind is Opaque:
        with pytest.raises(IncompatibleError, match="prompt_tuning: it changes no weight"):
            _merged(case.update, weight, 1.0)
        return
    assert bits(_merged(case.update, weight, 0.0)) == bits(weight)
    assert bits(_merged(case.update, weight, -0.0)) == bits(weight)
    merged = _merged(case.update, weight, 1.0)
    assert (merged.dtype, merged.shape) == (weight.dtype, weight.shape)
    if case.delta is not None:
        rows = zip(_fractions(weight if weight.dim() > 1 else weight[None]), case.delta(), strict=True)
        exact = [w + d for row, added in rows for w, d in zip(row, added, strict=True)]
        assert bits(merged) == [nearest(value, dtype) for value in exact]
        return
    assert case.applied is not None
    expected = case.applied(weight.double())
    step = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).tiny
    assert ((merged.double() - expected).abs() <= 0.5001 * step + 1e-12).all()
    half = _merged(case.update, weight, 0.5).double()
    middle = (weight.double() + expected) / 2
    assert (
        (half - middle).abs() <= 0.5001 * (torch.finfo(dtype).eps * middle.abs() + torch.finfo(dtype).tiny) + 1e-12
    ).all()
