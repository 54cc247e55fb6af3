"""The fast numerics in plain torch and the engine on them: within the bound, reproducible, and undone bit for bit."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from fast_bound import cases, exceeding
from hypothesis import given
from hypothesis import strategies as st

from loramgr.algebra import engine, fast
from loramgr.algebra.engine import ExactTerms
from loramgr.algebra.exact import merge_exact
from loramgr.algebra.factors import Factors, stacked
from loramgr.algebra.residual import BITS, Origin, encode
from loramgr.algebra.terms import LowRankTerm, ReplacedTerm
from loramgr.errors import IncompatibleError, UsageError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
U = 2.0**-24


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(BITS[one.dtype]), other.view(BITS[other.dtype]))


def example(shape: tuple[int, int], rank: int, dtype: torch.dtype, seed: int = 0, size: float = 0.05) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) / 50).to(dtype)
    left = torch.randn(shape[0], rank, generator=generator)
    right = torch.randn(rank, shape[1], generator=generator) * (size / 50 / max(1, rank) ** 0.5)
    return weight, Factors(left, right, 1.25)


def excess(weight: torch.Tensor, factors: Factors, merged: torch.Tensor) -> torch.Tensor:
    """Return how far beyond the stated bound each merged weight is, in float64; none may be above 0."""
    left, right = factors.left.double(), factors.right.double()
    exact = weight.double() + factors.scaling * (left @ right)
    size = abs(factors.scaling) * (left.abs() @ right.abs())
    bits = merged.view(BITS[merged.dtype])
    half = ((bits + 1).view(merged.dtype).double() - merged.double()).abs() / 2
    bound = half + U * (merged.double().abs() + (factors.rank + 2) * size)
    return (merged.double() - exact).abs() - bound * (1 + 2.0**-40)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16, 300])
def test_a_merge_is_within_the_stated_bound(dtype: torch.dtype, rank: int) -> None:
    weight, factors = example((65, 130), rank, dtype)
    cancelling = Factors(factors.left, factors.right, 30.0)
    for change in (factors, cancelling):
        assert float(excess(weight, change, fast.merge(weight, change)).max()) <= 0


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.9999), (torch.float16, 0.9995)], ids=str)
def test_nearly_all_merged_weights_are_correctly_rounded(dtype: torch.dtype, share: float) -> None:
    weight, factors = example((256, 512), 16, dtype)
    exact = merge_exact(weight, [LowRankTerm(factors.left, factors.right, factors.scaling)])
    assert float((fast.merge(weight, factors) == exact).double().mean()) >= share


def test_the_bits_do_not_depend_on_tiles_strides_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factors = example((70, 90), 5, torch.bfloat16)
    expected = fast.merge(weight, factors)
    turned = Factors(factors.left.T.contiguous().T, factors.right.T.contiguous().T, factors.scaling)
    assert same_bits(fast.merge(weight.T.contiguous().T, turned), expected)
    assert same_bits(fast.merge(weight.T, factors.transposed()).T.contiguous(), expected)
    monkeypatch.setattr(fast, "tile_rows", lambda weight: 3)
    assert same_bits(fast.merge(weight, factors), expected)
    assert same_bits(
        torch.cat([fast.merge(weight[i : i + 1], factors.rows(slice(i, i + 1))) for i in range(70)]), expected
    )


@st.composite
def changes(draw: st.DrawFn) -> tuple[torch.Tensor, list[Factors]]:
    dtype = draw(st.sampled_from(fast.WEIGHT_DTYPES))
    shape = draw(st.sampled_from([(0, 4), (4, 0), (1, 1), (3, 50), (17, 16), (20, 65)]))
    size = draw(st.sampled_from([0.0, 0.01, 0.3, 5.0, 1e30]))
    weight, first = example(shape, draw(st.integers(0, 5)), dtype, seed=1, size=size)
    _, second = example(shape, draw(st.integers(0, 5)), dtype, seed=2, size=size)
    special = draw(st.lists(st.sampled_from([0.0, -0.0, float("inf"), float("nan"), 1e-45, -6e-8]), max_size=3))
    for place, value in enumerate(special):
        if place < weight.numel():
            weight.view(-1)[place] = value
    if draw(st.booleans()) and first.rank and shape[1]:
        first.right[0, 0] = draw(st.sampled_from([float("inf"), float("nan")]))
    return weight, [first, second]


def placed(weight: torch.Tensor, how: str) -> torch.Tensor:
    """Return the same weight, contiguous, as a transposed view, or as a slice of something larger."""
    if how == "transposed":
        return weight.T.clone(memory_format=torch.contiguous_format).T
    if how == "sliced":
        larger = torch.zeros((weight.shape[0] * 2 + 1, weight.shape[1] + 3), dtype=weight.dtype)
        view = larger[1::2, 2:-1]
        view.copy_(weight)
        return view
    return weight.clone()


@given(changes(), st.sampled_from(["contiguous", "transposed", "sliced"]))
def test_merge_switch_and_unmerge_give_the_weight_back(drawn: tuple[torch.Tensor, list[Factors]], how: str) -> None:
    weight, (first, second) = drawn
    tensor = placed(weight, how)
    merged = engine.merge_(tensor, first, residual=True)
    assert merged.kernel == "torch"
    assert same_bits(tensor.contiguous(), fast.merge(weight, first)) or bool(tensor.isnan().any())
    switched = engine.switch_(tensor, first, merged.residual, second)
    assert engine.unmerge_(tensor, second, switched.residual) == "torch"
    assert same_bits(tensor.contiguous(), weight)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_exact_merges_are_undone_and_switched_too(dtype: torch.dtype) -> None:
    weight, factors = example((33, 70), 4, dtype)
    changes = [ExactTerms((LowRankTerm(factors.left, factors.right, scaling),)) for scaling in (1.25, -0.5)]
    tensor = weight.clone()
    merged = engine.merge_(tensor, changes[0], residual=True)
    assert same_bits(tensor, merge_exact(weight, changes[0].terms))
    switched = engine.switch_(tensor, changes[0], merged.residual, changes[1])
    assert switched.residual is not None
    assert switched.residual.origin == Origin("exact", 1, "any")
    engine.unmerge_(tensor, changes[1], switched.residual)
    assert same_bits(tensor, weight)


def test_a_switch_goes_from_one_numerics_to_the_other() -> None:
    weight, factors = example((20, 30), 4, torch.bfloat16)
    exact = ExactTerms((LowRankTerm(factors.left, factors.right, 2.0),))
    tensor = weight.clone()
    kept = engine.merge_(tensor, factors, residual=True).residual
    kept = engine.switch_(tensor, factors, kept, exact).residual
    kept = engine.switch_(tensor, exact, kept, factors).residual
    engine.unmerge_(tensor, factors, kept)
    assert same_bits(tensor, weight)


def test_without_a_residual_the_same_bits_are_merged() -> None:
    weight, factors = example((20, 30), 4, torch.float16)
    one, other = weight.clone(), weight.clone()
    assert engine.merge_(one, factors, residual=False).residual is None
    engine.merge_(other, factors, residual=True)
    assert same_bits(one, other)


def test_a_thousand_switches_change_nothing() -> None:
    weight, _ = example((16, 48), 2, torch.bfloat16)
    tasks = [example((16, 48), 2, torch.bfloat16, seed=seed)[1] for seed in range(8)]
    tensor = weight.clone()
    kept = engine.merge_(tensor, tasks[0], residual=True).residual
    for turn in range(1000):
        kept = engine.switch_(tensor, tasks[turn % 8], kept, tasks[(turn + 1) % 8]).residual
    engine.unmerge_(tensor, tasks[1000 % 8], kept)
    assert same_bits(tensor, weight)


def test_the_residual_of_another_computation_needs_proof() -> None:
    weight, factors = example((20, 30), 4, torch.bfloat16)
    tensor = weight.clone()
    engine.merge_(tensor, factors, residual=True)
    candidate = fast.recover(tensor, factors)
    elsewhere = encode(weight, candidate, Origin("fast", 1, "cuda:sm90/triton3.6.0"))
    merged = tensor.clone()
    with pytest.raises(IncompatibleError, match="cuda:sm90"):
        engine.unmerge_(tensor, factors, elsewhere)
    assert same_bits(tensor, merged), "a refusal changes nothing"
    engine.unmerge_(tensor, factors, elsewhere, unproven=True)
    assert same_bits(tensor, weight)


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    weight, factors = example((20, 30), 4, torch.bfloat16)
    kept = engine.merge_(weight.clone(), factors, residual=True).residual
    assert kept is not None
    tensor = weight.clone()
    replacement = ExactTerms((ReplacedTerm(torch.zeros(20, 30)),))
    with pytest.raises(IncompatibleError, match="does not fit a weight"):
        engine.merge_(tensor.T, factors, residual=True)
    with pytest.raises(IncompatibleError, match="share memory"):
        engine.merge_(torch.zeros(1, 30).expand(20, 30), factors, residual=False)
    with pytest.raises(IncompatibleError, match="the residual belongs to"):
        engine.unmerge_(tensor.float(), factors, kept)
    with pytest.raises(IncompatibleError, match="only sums of low-rank deltas"):
        engine.merge_(tensor, replacement, residual=True)
    with pytest.raises(IncompatibleError, match="float64"):
        engine.merge_(tensor.double(), factors, residual=False)
    assert same_bits(tensor, weight)


def test_factors_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="no product"):
        Factors(torch.zeros(3, 2), torch.zeros(3, 4), 1.0)
    with pytest.raises(IncompatibleError, match="exact numerics"):
        Factors(torch.zeros(3, 2).double(), torch.zeros(2, 4), 1.0)
    with pytest.raises(IncompatibleError, match="no finite float32"):
        Factors(torch.zeros(3, 2), torch.zeros(2, 4), 1e39)
    with pytest.raises(UsageError, match="at least one"):
        stacked([])
    terms = [LowRankTerm(torch.zeros(3, 1), torch.zeros(1, columns), 1.0) for columns in (4, 5)]
    with pytest.raises(IncompatibleError, match="different shapes"):
        stacked(terms)


def test_terms_of_one_coefficient_are_stacked_as_they_are() -> None:
    left, right = torch.randn(5, 2).bfloat16(), torch.randn(2, 7).bfloat16()
    factors = stacked([LowRankTerm(left, right, 4.0, 0.5), LowRankTerm(-left, right, 1.0, 2.0)])
    assert factors.scaling == 2.0
    assert factors.left.dtype == torch.bfloat16
    assert torch.equal(factors.left, torch.cat([left, -left], 1))
    assert torch.equal(stacked([LowRankTerm(left, right, 3.0)]).left, left)


def test_the_sum_of_several_adapters_is_within_the_bound() -> None:
    weight, _ = example((40, 50), 1, torch.float32)
    parts = [(example((40, 50), rank, torch.float32, seed=rank)[1], w) for rank, w in ((2, 0.7), (3, -0.3), (8, 1.1))]
    terms = [LowRankTerm(factors.left, factors.right.bfloat16(), factors.scaling, w) for factors, w in parts]
    factors = stacked(terms)
    merged = fast.merge(weight, factors)
    exact, size = weight.double(), torch.zeros(40, 50, dtype=torch.float64)
    for term in terms:
        coefficient = term.scaling * term.weight
        exact += coefficient * (term.left.double() @ term.right.double())
        size += abs(coefficient) * (term.left.double().abs() @ term.right.double().abs())
    bound = U * (2 * merged.double().abs() + (factors.rank + 2) * size)
    assert bool(((merged.double() - exact).abs() <= bound).all())


@given(cases(fast.WEIGHT_DTYPES, (4, 5), (1, 2, 3, 8, 33)))
def test_what_cancels_is_within_the_bound_too(drawn: tuple[torch.Tensor, Factors]) -> None:
    weight, factors = drawn
    assert exceeding(weight, factors, fast.merge(weight, factors)) == []


@given(st.lists(cases((torch.float32,), (3, 4), (1, 2, 5)), min_size=2, max_size=3), st.booleans())
def test_sums_that_cancel_are_within_the_bound_of_all_ranks(
    drawn: list[tuple[torch.Tensor, Factors]], opposed: bool
) -> None:
    parts = [factors for _, factors in drawn]
    if opposed:
        parts.append(Factors(-parts[0].left, parts[0].right, parts[0].scaling))
    weights = [0.7, 1.0, -0.3, 1 + 2.0**-30][: len(parts)]
    terms = [LowRankTerm(part.left, part.right, part.scaling, w) for part, w in zip(parts, weights, strict=True)]
    weight = sum((-term.weight * term.scaling * (term.left @ term.right) for term in terms), torch.zeros(3, 4))
    assert isinstance(weight, torch.Tensor)
    # What float64 loses of left factors and coefficients is less than what the bound has to spare, 2^-46 of the sum.
    folded = [term.left.double() * (term.scaling * term.weight) for term in terms]
    whole = _Wide(torch.cat(folded, 1), torch.cat([term.right.double() for term in terms]), 1.0)
    assert exceeding(weight, whole, fast.merge(weight, stacked(terms))) == []  # type: ignore[arg-type]


class _Wide(NamedTuple):
    """Factors in float64."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.left.shape[1]
