"""The exact merge against rational arithmetic: every bit, for whatever it is given."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rationals import DTYPES, FEWER, NAN, bits, entry, infinity, merged, tensors

from loramgr.algebra import exact
from loramgr.algebra.exact import merge_exact
from loramgr.algebra.terms import DecomposedTerm, LowRankTerm, ReplacedTerm, Term, transposed

SCALINGS = st.sampled_from([1.0, 2.0, 16 / 3, 16 / sqrt(3), -0.125, 0.0, 1e-40])
WEIGHTS = st.sampled_from([1.0, 0.7, -0.3, 1.0, 0.5])
GENTLE = ["moderate", "integers", "ones", "zero"]
Shape = tuple[int, int]


def low_rank(draw: st.DrawFn, shape: Shape, kinds: list[str] | None = None) -> LowRankTerm:
    rank, dtype = draw(st.integers(0, 3)), draw(st.sampled_from(DTYPES))
    left = draw(tensors((shape[0], rank), dtype, kinds or ()))
    right = draw(tensors((rank, shape[1]), dtype, kinds or ()))
    return LowRankTerm(left, right, draw(SCALINGS), draw(WEIGHTS))


def replaced(draw: st.DrawFn, shape: Shape) -> ReplacedTerm:
    return ReplacedTerm(draw(tensors(shape, draw(st.sampled_from(DTYPES)))), draw(WEIGHTS))


def decomposed(draw: st.DrawFn, shape: Shape) -> DecomposedTerm:
    part = low_rank(draw, shape, GENTLE)
    magnitude = draw(tensors(shape[:1], draw(st.sampled_from(DTYPES))))
    start = draw(st.none() | tensors(shape, draw(st.sampled_from(DTYPES))))
    return DecomposedTerm(part.left, part.right, part.scaling, magnitude, part.weight, start)


@st.composite
def merges(draw: st.DrawFn, *makers: Callable[[st.DrawFn, Shape], Term]) -> tuple[torch.Tensor, list[Term]]:
    """Draw a weight and up to three terms."""
    shape = draw(st.sampled_from([(1, 1), (1, 5), (4, 1), (3, 3), (2, 4)]))
    weight = draw(tensors(shape, draw(st.sampled_from(DTYPES))))
    count = draw(st.integers(0 if len(makers) > 1 else 1, 3))
    return weight, [draw(st.sampled_from(makers))(draw, shape) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@FEWER
@given(merge=merges(low_rank))
def test_low_rank_terms_are_added_with_one_rounding(dtype: torch.dtype, merge: tuple[torch.Tensor, list[Term]]) -> None:
    assert bits(merge_exact(*merge, dtype=dtype)) == merged(*merge, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@FEWER
@given(merge=merges(low_rank, replaced))
def test_replaced_tensors_are_mixed_with_one_rounding(
    dtype: torch.dtype, merge: tuple[torch.Tensor, list[Term]]
) -> None:
    assert bits(merge_exact(*merge, dtype=dtype)) == merged(*merge, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@FEWER
@given(merge=merges(low_rank, decomposed, replaced))
def test_decomposed_terms_are_added_with_one_rounding(
    dtype: torch.dtype, merge: tuple[torch.Tensor, list[Term]]
) -> None:
    assert bits(merge_exact(*merge, dtype=dtype)) == merged(*merge, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@FEWER
@given(data=st.data())
def test_a_delta_that_cancels_the_weight_leaves_the_exact_rest(dtype: torch.dtype, data: st.DataObject) -> None:
    left = data.draw(tensors((3, 2), torch.float32, GENTLE))
    right = data.draw(tensors((2, 3), torch.float32, GENTLE))
    scaling = data.draw(SCALINGS)
    weight = -(left.double() @ right.double() * scaling).to(data.draw(st.sampled_from(DTYPES)))
    terms = [LowRankTerm(left, right, scaling)]
    assert bits(merge_exact(weight, terms, dtype=dtype)) == merged(weight, terms, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaling", [2.0, 16 / 3])
def test_a_tensor_of_many_tiles(
    dtype: torch.dtype, factors: torch.dtype, scaling: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "TILE", 1000)
    monkeypatch.setattr(exact, "_GATHER", 300)
    generator = torch.Generator().manual_seed(7)
    weight = (torch.randn(67, 131, generator=generator) / 50).to(dtype)
    left = (torch.randn(67, 16, generator=generator) / 50).to(factors)
    right = (torch.randn(16, 131, generator=generator) / 50).to(factors)
    left[5], right[:, 9], weight[5:7] = 0, 0, -0.0
    terms = [LowRankTerm(left, right, scaling, 0.5), LowRankTerm(left[:, :3], right[5:8], -1.0)]
    result = bits(merge_exact(weight, terms))
    places = [(row, column) for row in (0, 5, 6, 31, 66) for column in range(0, 131, 3)]
    assert [result[row * 131 + column] for row, column in places] == [
        entry(weight, terms, dtype, row, column) for row, column in places
    ]


def sample(dtype: torch.dtype, rows: int = 13, columns: int = 29) -> tuple[torch.Tensor, list[Term]]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 8

    weight = normal(rows, columns).to(dtype)
    left, right = normal(rows, 8).bfloat16(), normal(8, columns).bfloat16()
    return weight, [
        LowRankTerm(left, right, 16 / 3, 0.7),
        DecomposedTerm(normal(rows, 4), normal(4, columns), 0.5, normal(rows), -0.3),
        ReplacedTerm(normal(rows, columns).half(), 0.25),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3])
def test_tiles_and_threads_do_not_change_a_bit(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, terms = sample(dtype)
    expected = bits(merge_exact(weight, terms[:count]))
    threads = torch.get_num_threads()
    try:
        for number, tile in ((1, 1), (1, 100), (2, 29), (3, 1 << 20)):
            torch.set_num_threads(number)
            monkeypatch.setattr(exact, "TILE", tile)
            assert bits(merge_exact(weight, terms[:count])) == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_change_a_bit(dtype: torch.dtype) -> None:
    weight, terms = sample(dtype)
    expected = bits(merge_exact(weight, terms))
    wide = torch.zeros(13, 58, dtype=dtype)
    wide[:, ::2] = weight
    for view in (wide[:, ::2], weight.T.contiguous().T, weight[None].expand(2, -1, -1)[1]):
        assert bits(merge_exact(view, terms)) == expected
    low = terms[0]
    assert isinstance(low, LowRankTerm)
    strided = LowRankTerm(low.left.T.contiguous().T, low.right.T.contiguous().T, low.scaling, low.weight)
    assert bits(merge_exact(weight, [strided, *terms[1:]])) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_column_is_the_merge_of_the_transposed(dtype: torch.dtype) -> None:
    weight, terms = sample(dtype)
    turned = [transposed(term) for term in terms]
    result = merge_exact(weight.T.contiguous(), turned, by_column=True)
    assert result.is_contiguous()
    assert bits(result.T) == bits(merge_exact(weight, terms))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matmul", ["highest", "medium"])
def test_reduced_precision_of_float32_products_changes_nothing(dtype: torch.dtype, matmul: str) -> None:
    weight, terms = sample(dtype, 128, 256)
    expected = bits(merge_exact(weight, terms[:1]))
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        assert bits(merge_exact(weight, terms[:1])) == expected
    finally:
        torch.set_float32_matmul_precision(former)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_merges_to_nothing(dtype: torch.dtype, shape: Shape) -> None:
    terms = [LowRankTerm(torch.ones(shape[0], 2), torch.ones(2, shape[1]), 1.0)]
    for by_column in (False, True):
        result = merge_exact(torch.empty(shape), terms, dtype=dtype, by_column=by_column)
        assert (result.shape, result.dtype) == (torch.Size(shape), dtype)


def float64(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("weight", "left", "right", "scaling"),
    [
        pytest.param(float64([1.0]), [2.0**-53, 2.0**-100], [1.0, 2.0**-100], 1.0, id="above a float64 tie by 2^-200"),
        pytest.param(float64([-0.0]).float(), [1e-200], [1e-200], 1.0, id="product below float64"),
        pytest.param(float64([0.0]).float(), [1e-200], [-1e-200], 1.0, id="negative product below float64"),
        pytest.param(float64([1.0]).bfloat16(), [3e38], [1e-38], 2.0, id="factor beyond float32"),
        pytest.param(float64([1.0]).half(), [3e38, 3e38, -3e38, -3e38], [1.0] * 4, 1.0, id="sum beyond float32"),
        pytest.param(float64([1.5e308]), [1e308, -1e308], [1.0, 1.0], 1.0, id="sum beyond float64"),
        pytest.param(float64([1.0]), [2.0**1000], [2.0**-1060], 1.0, id="factor too large to be split"),
        pytest.param(float64([1.0]).float(), [1e200], [0.0], 1.0, id="huge times zero"),
        pytest.param(float64([1.0]).float(), [1e300], [1e-300], 1e-200, id="coefficient far away"),
        pytest.param(float64([1e300]), [1e300], [1e300], 5e-324, id="subnormal coefficient"),
        pytest.param(
            float64([1.0]).float(),
            [2.0**-60 * (1 + 2.0**-52), 2.0**-120, -1.0, -(2.0**-60) * (1 + 2.0**-52), 2.0**-140],
            [1.0] * 5,
            1.0,
            id="cancellation beyond twice float64",
        ),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(
    weight: torch.Tensor, left: list[float], right: list[float], scaling: float, dtype: torch.dtype
) -> None:
    terms = [LowRankTerm(float64(left), float64(right).T, scaling)]
    assert bits(merge_exact(weight, terms, dtype=dtype)) == merged(weight, terms, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("term", ["none", "zero left", "zero right", "zero weight", "same", "cancelling"])
def test_a_weight_to_which_nothing_is_added_keeps_its_bits(dtype: torch.dtype, term: str) -> None:
    weight = torch.tensor([[-0.0, 0.0, 1.5], [-2.0, -0.0, 3.0]], dtype=dtype)
    ones = torch.ones(2, 2)
    terms: dict[str, list[Term]] = {
        "none": [],
        "zero left": [LowRankTerm(-ones * 0, torch.ones(2, 3), 1.0)],
        "zero right": [LowRankTerm(ones, -torch.zeros(2, 3), 0.3)],
        "zero weight": [LowRankTerm(ones, torch.ones(2, 3), 0.3, 0.0)],
        "same": [ReplacedTerm(weight.clone(), 0.7)],
        "cancelling": [LowRankTerm(torch.tensor([[1.0, -1.0]] * 2), torch.ones(2, 3), 0.3)],
    }
    assert bits(merge_exact(weight, terms[term])) == bits(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_of_zero_is_positive(dtype: torch.dtype) -> None:
    terms = [LowRankTerm(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 1.0)]
    assert bits(merge_exact(torch.tensor([[1.0]], dtype=dtype), terms)) == [0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_stays_so_and_harms_no_other(dtype: torch.dtype) -> None:
    weight = torch.tensor([[nan, inf, -inf, 1.0]], dtype=dtype)
    low = LowRankTerm(torch.ones(1, 1), torch.ones(1, 4), 1.0)
    for terms, last in (([], 1.0), ([low], 2.0), ([low, ReplacedTerm(torch.full((1, 4), 3.0))], 4.0)):
        result = merge_exact(weight, terms)
        assert bits(result)[:1] == [NAN]
        assert result[0, 1:].tolist() == [inf, -inf, last]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_factor_that_is_not_finite_gives_nan_where_it_acts(dtype: torch.dtype, bad: float) -> None:
    weight = torch.ones(2, 3, dtype=dtype)
    left, right, other = torch.ones(2, 2), torch.ones(2, 3), torch.ones(2, 3)
    left[0, 1], right[1, 2], other[1, 1] = bad, bad, bad
    terms = [LowRankTerm(left, torch.ones(2, 3), 1.0), LowRankTerm(torch.ones(2, 2), right, 1.0), ReplacedTerm(other)]
    result = merge_exact(weight, terms)
    assert bits(result) == [NAN, NAN, NAN, *bits(torch.tensor([5.0], dtype=dtype)), NAN, NAN]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [nan, inf])
def test_a_scaling_that_is_not_finite_gives_nan(dtype: torch.dtype, scaling: float) -> None:
    ones, weight = torch.ones(2, 2), torch.ones(2, 2, dtype=dtype)
    for term in (LowRankTerm(ones, ones, scaling), LowRankTerm(ones, ones, 1.0, scaling), ReplacedTerm(ones, scaling)):
        assert bits(merge_exact(weight, [term])) == [NAN] * 4
    assert bits(merge_exact(weight, [DecomposedTerm(ones, ones, scaling, ones[0])])) == [NAN] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("where", ["weight", "start", "left", "right", "magnitude"])
def test_a_norm_that_is_not_finite_gives_nan(dtype: torch.dtype, bad: float, where: str) -> None:
    parts = {"left": torch.ones(2, 1), "right": torch.ones(1, 3), "magnitude": torch.ones(2), "start": torch.ones(2, 3)}
    weight = torch.ones(2, 3, dtype=dtype)
    (weight if where == "weight" else parts[where]).view(-1)[0] = bad
    start = None if where == "weight" else parts["start"]
    term = DecomposedTerm(parts["left"], parts["right"], 1.0, parts["magnitude"], start=start)
    result = merge_exact(weight, [term])
    assert bool(result[0, 1:].isnan().all())
    assert bool(result[1].isfinite().all()) == (where != "right")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_zero_gives_nan(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=dtype)
    left = torch.tensor([[0.0, 0.0, 0.0], [0.1, -0.1, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    terms = [DecomposedTerm(left, torch.ones(3, 2), 1.0, torch.tensor([1.0, 1.0, -1.0]))]
    result = bits(merge_exact(weight, terms))
    assert result[:4] == [NAN] * 4
    assert result == merged(weight, terms, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_norms_whose_squares_leave_float64(dtype: torch.dtype, scale: float) -> None:
    start = float64([3.0, 4.0], [1.0, 1.0]) * scale
    terms = [DecomposedTerm(torch.zeros(2, 1), torch.ones(1, 2), 1.0, torch.tensor([5.0, 1.0]), start=start)]
    weight = torch.tensor([[1.0, 2.0], [3.0, -0.0]], dtype=dtype)
    assert bits(merge_exact(weight, terms)) == merged(weight, terms, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [[1.0, 1.0], [3.0, 4.0], [2.0, 8.0]])
def test_decomposed_terms_that_cancel_leave_exact_ties(dtype: torch.dtype, row: list[float]) -> None:
    weight = torch.tensor([row, [1 + 2.0**-8, 1 + 2.0**-24 + 2.0**-11]], dtype=torch.float64)
    weight = torch.cat([weight, torch.zeros(1, 2).double() - 0.0])
    start = torch.tensor([row] * 3)
    left, right, magnitude = torch.zeros(3, 1), torch.ones(1, 2), torch.ones(3)
    one = DecomposedTerm(left, right, 1.0, magnitude, 0.3, start)
    # The same direction three times as long, and the weight's own part is given back by the second one.
    other = DecomposedTerm(left, right, 1.0, magnitude, -0.3, start * 3)
    result = merge_exact(weight, [one, other], dtype=dtype)
    assert bits(result) == bits(merge_exact(weight, [], dtype=dtype))


def test_an_overflow_is_the_rounded_value() -> None:
    weight = torch.tensor([[65504.0, 65504.0, -65504.0]], dtype=torch.float16)
    terms = [LowRankTerm(torch.ones(1, 1), torch.tensor([[15.99, 16.0, -16.0]]), 1.0)]
    assert merge_exact(weight, terms).tolist() == [[65504.0, inf, -inf]]
    assert bits(merge_exact(weight, terms))[1] == infinity(torch.float16)


@pytest.mark.parametrize("by_column", [False, True])
def test_the_result_goes_where_it_is_wanted(by_column: bool) -> None:
    weight, term = torch.randn(7, 5), LowRankTerm(torch.randn(7, 2), torch.randn(2, 5), 0.5)
    out = torch.full((7, 5), torch.nan)
    assert merge_exact(weight, [term], by_column=by_column, out=out) is out
    assert torch.equal(out, merge_exact(weight, [term]))
