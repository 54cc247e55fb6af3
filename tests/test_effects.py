"""What updates make of a weight, densely and by rows, against the formulas written out."""

from __future__ import annotations

from math import isclose

import pytest
import torch

from loramgr.algebra import effects
from loramgr.algebra.comparison import Distances
from loramgr.algebra.effects import Added, Decomposed, Effect, Whole, effect_distance, effect_distances, matrix_norm
from loramgr.algebra.lowrank import Product

GENERATOR = torch.Generator().manual_seed(3)
W = torch.randn(70, 30, generator=GENERATOR)
OTHER = torch.randn(70, 30, generator=GENERATOR)
PRODUCT = Product(
    torch.randn(70, 4, generator=GENERATOR).double(), torch.randn(4, 30, generator=GENERATOR).double() * 0.1
)
MAGNITUDE = torch.rand(70, generator=GENERATOR) + 0.5
DELTA = PRODUCT.left @ PRODUCT.right


def decomposed(weight: torch.Tensor) -> torch.Tensor:
    direction = weight.double() + DELTA
    return MAGNITUDE.double()[:, None] * direction / direction.square().sum(1).sqrt()[:, None]


CASES: list[tuple[Effect | None, torch.Tensor]] = [
    (None, torch.zeros(70, 30).double()),
    (Whole(OTHER), OTHER.double() - W.double()),
    (Added(PRODUCT), DELTA),
    (Added(PRODUCT, OTHER), OTHER.double() + DELTA - W.double()),
    (Decomposed(PRODUCT, MAGNITUDE), decomposed(W) - W.double()),
    (Decomposed(PRODUCT, MAGNITUDE, OTHER), decomposed(OTHER) - W.double()),
]


def check(found: Distances, a: torch.Tensor, b: torch.Tensor) -> None:
    assert isclose(found.norm_a, float(a.norm()), rel_tol=1e-12)
    assert isclose(found.norm_b, float(b.norm()), rel_tol=1e-12)
    assert isclose(found.distance, float((a - b).norm()), rel_tol=1e-12)
    if found.cosine is not None:
        assert isclose(found.cosine, float((a * b).sum() / a.norm() / b.norm()), abs_tol=1e-13)


@pytest.mark.parametrize("tile", [1, 7 * 30, 1 << 20])
def test_every_pair_of_effects(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(effects, "_TILE", tile)
    for a, own in CASES:
        for b, other in CASES:
            check(effect_distances(a, b, W), own, other)


def test_replacements_cancel_the_weight_exactly() -> None:
    near = Whole(OTHER.double() + 1e-13 * DELTA)
    expected = float((near.tensor - OTHER.double()).norm())
    assert isclose(effect_distances(Whole(OTHER), near, 1e6 * W).distance, expected, rel_tol=1e-13)
    assert isclose(effect_distance(Whole(OTHER), near), expected, rel_tol=1e-13)
    assert effect_distances(Whole(OTHER), Whole(OTHER.clone()), W).cosine == 1.0


def test_a_row_without_a_direction_is_not_hidden() -> None:
    weight = W.clone()
    weight[3] = 0
    product = Product(PRODUCT.left.clone(), PRODUCT.right)
    product.left[3] = 0
    found = effect_distances(Decomposed(product, MAGNITUDE), None, weight)
    assert found.norm_a != found.norm_a


def test_the_norm_of_a_matrix_in_any_dtype() -> None:
    assert isclose(matrix_norm(W.bfloat16()), float(W.bfloat16().double().norm()), rel_tol=1e-13)
    assert matrix_norm(W[:0]) == 0.0
