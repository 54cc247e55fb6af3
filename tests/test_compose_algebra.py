"""Every method on true deltas against dense float64 computations, and the laws that all of them obey."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramgr.algebra.composing.composed import Parameters, Stored, compose_deltas, method_named, rank_of
from loramgr.algebra.composing.methods import METHODS, Elementwise
from loramgr.algebra.composing.tiles import Tiled, kth_largest, tiles
from loramgr.algebra.lowrank import Product
from loramgr.errors import IncompatibleError, UsageError

ULP = 2.0**-24  # of a value that is rounded to float32
ELEMENTWISE = [name for name, method in METHODS.items() if isinstance(method.compute, Elementwise)]


def product(rows: int, columns: int, rank: int, seed: int = 0) -> Product:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return Product.of(left, right, 0.5)


def dense(each: Product) -> torch.Tensor:
    return each.left @ each.right


def made(stored: Stored) -> torch.Tensor:
    return stored.lora_B.double() @ stored.lora_A.double()


def rounding(stored: Stored) -> float:
    """Return how far two factors that were rounded to float32 can be from those before it, in the Frobenius norm."""
    return 2.01 * ULP * float(stored.lora_B.double().norm() * stored.lora_A.double().norm()) + 1e-12


def composed(
    products: Sequence[Product], weights: Sequence[float], parameters: Parameters, module: str = "m"
) -> Stored:
    return compose_deltas(products, weights, parameters, module, torch.float32)


@pytest.mark.parametrize("space", ["dense", "core"])
@pytest.mark.parametrize("method", METHODS)
def test_one_delta_with_weight_1_gives_itself_back(method: str, space: str) -> None:
    for rows, columns, rank in ((40, 30, 4), (5, 40, 3), (40, 5, 3), (6, 6, 6), (1, 7, 1)):
        delta = product(rows, columns, rank)
        stored = composed([delta], [1.0], Parameters(method, space=space))
        assert stored.lora_A.shape == (rank, columns)
        assert stored.lora_B.shape == (rows, rank)
        assert float((made(stored) - dense(delta)).norm()) <= rounding(stored), (rows, columns, rank)


@pytest.mark.parametrize("space", ["dense", "core"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_reported_is_the_distance_to_the_exact_result(method: str, space: str) -> None:
    """The norm and error of any rank, against the result of full rank, which is exact but for its rounding."""
    deltas = [product(12, 10, 6, seed) for seed in (1, 2)]
    parameters = Parameters(method, density=0.6, space=space)
    if METHODS[method].truncates:
        parameters = Parameters(method, rank=10)
    exact = made(composed(deltas, [0.7, 0.4], parameters))
    short = composed(deltas, [0.7, 0.4], Parameters(method, rank=3, density=0.6, space=space))
    assert short.lora_A.shape == (3, 10)
    values = torch.linalg.svdvals(exact)
    assert math.sqrt(short.norm2) == pytest.approx(float(exact.norm()), rel=1e-6)
    assert math.sqrt(short.error2) == pytest.approx(float((made(short) - exact).norm()), rel=1e-6)
    assert math.sqrt(short.error2) == pytest.approx(float(values[3:].norm()), rel=1e-6)  # the optimal truncation


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_linear_is_the_weighted_sum(shape: tuple[int, int], ranks: list[int], weights: list[float], seed: int) -> None:
    deltas = [product(*shape, rank, seed + place) for place, rank in enumerate(ranks)]
    stored = composed(deltas, weights[: len(ranks)], Parameters("linear"))
    wanted = sum(
        (dense(each) * weight for each, weight in zip(deltas, weights, strict=False)), torch.zeros(shape).double()
    )
    assert stored.lora_A.shape[0] == sum(ranks)
    assert float((made(stored) - wanted).norm()) <= rounding(stored)
    assert math.sqrt(stored.norm2) == pytest.approx(float(wanted.norm()), rel=1e-6, abs=1e-12)
    assert torch.equal(stored.lora_A, torch.cat([each.right for each in deltas]).float())


@given(factor=st.floats(0.01, 100), seed=st.integers(0, 100), method=st.sampled_from(sorted(METHODS)))
def test_scaling_every_delta_scales_the_result(factor: float, seed: int, method: str) -> None:
    deltas = [product(7, 9, 2, seed), product(7, 9, 3, seed + 1)]
    parameters = Parameters(method, density=0.7, seed=seed)
    once = composed(deltas, [0.5, 0.5], parameters)
    scaled = composed([each.scaled(factor) for each in deltas], [0.5, 0.5], parameters)
    apart = float((made(scaled) - made(once) * factor).norm())
    assert apart <= 1e-6 * factor * max(1.0, math.sqrt(once.norm2))


@pytest.mark.parametrize(("method", "peft"), [
    ("ties", "ties"), ("ties_peft", "ties"), ("magnitude_prune", "magnitude_prune"), ("linear", "task_arithmetic"),
])  # fmt: skip
@pytest.mark.parametrize("density", [0.2, 0.55, 0.9])
def test_methods_are_those_of_peft_on_whole_matrices(method: str, peft: str, density: float) -> None:
    from peft.utils import merge_utils

    deltas = [product(12, 10, 6, seed) for seed in (3, 4)]
    weights = [0.7, -0.4]
    arguments = [] if peft == "task_arithmetic" else [density]
    wanted = getattr(merge_utils, peft)([dense(each) for each in deltas], torch.tensor(weights).double(), *arguments)
    parameters = Parameters(method, density=1.0 if method == "linear" else density)
    stored = composed(deltas, weights, parameters)
    # PEFT leaves out all of the entries beyond the k-th, we keep those that equal it: none do in random numbers
    assert float((made(stored) - wanted).norm()) <= rounding(stored)


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    threshold = delta.abs().flatten().sort(descending=True).values[max(1, int(density * delta.numel())) - 1]
    return delta * (delta.abs() >= threshold)


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_ties_as_in_mergekit_elects_among_weighted_entries_and_divides_by_their_weights(density: float) -> None:
    deltas, weights = [product(12, 10, 6, seed) for seed in (3, 4)], [0.7, 0.2]
    wanted = torch.zeros(12, 10).double()
    kept = [trimmed(dense(each), density) for each in deltas]
    for row in range(12):
        for column in range(10):
            terms = [(float(each[row, column]) * w, w) for each, w in zip(kept, weights, strict=True)]
            sign = 1 if sum(value for value, _ in terms) >= 0 else -1
            agreeing = [(value, w) for value, w in terms if value * sign > 0]
            if agreeing:
                wanted[row, column] = sum(value for value, _ in agreeing) / sum(w for _, w in agreeing)
    stored = composed(deltas, weights, Parameters("ties_mergekit", density=density))
    assert float((made(stored) - wanted).norm()) <= rounding(stored)


@pytest.mark.parametrize("method", ["dare_linear", "dare_linear_mergekit"])
def test_dare_keeps_some_entries_and_scales_them(method: str) -> None:
    delta = product(30, 20, 20)
    stored = composed([delta], [1.0], Parameters(method, density=0.4, seed=7))
    result, before = made(stored), dense(delta)
    kept = result.abs() > 1e-4 * before.abs()
    scale = result[kept] / before[kept]
    expected = 1 / 0.4
    if method == "dare_linear_mergekit":
        expected = float(before.abs().sum() / before[kept].abs().sum())
    assert float((scale - expected).abs().max()) <= 1e-3
    # 600 draws of probability 0.4: five standard deviations are 60
    assert abs(int(kept.sum()) - 240) <= 60


def test_dare_keeps_the_expectation() -> None:
    delta = product(6, 5, 5)
    runs = torch.stack(
        [made(composed([delta], [1.0], Parameters("dare_linear", density=0.5, seed=s))) for s in range(400)]
    )
    # an entry is 0 or 2x with equal chances: its mean over 400 runs has the standard deviation |x| / 20
    assert bool(((runs.mean(0) - dense(delta)).abs() <= 6 * dense(delta).abs() / 20 + 1e-6).all())


def test_della_keeps_larger_entries_more_often() -> None:
    delta = product(4, 8, 4)
    parameters = [Parameters("della", density=0.5, epsilon=0.4, seed=seed) for seed in range(400)]
    runs = torch.stack([made(composed([delta], [1.0], each)) for each in parameters])
    kept = (runs.abs() > 1e-5).double().mean(0)
    order = dense(delta).abs().argsort(1)
    wanted = 0.5 + 0.4 * ((torch.arange(8).double() + 0.5) / 8 - 0.5)
    # 400 draws: six standard deviations are at most 0.15
    assert float((kept.gather(1, order) - wanted).abs().max()) <= 0.15
    assert bool(((runs.mean(0) - dense(delta)).abs() <= 6 * dense(delta).abs() * math.sqrt(7 / 3) / 20 + 1e-6).all())


@pytest.mark.parametrize("space", ["dense", "core"])
@pytest.mark.parametrize("method", [name for name in METHODS if "seed" in METHODS[name].takes])
def test_a_seed_gives_the_same_result_and_another_one_another(method: str, space: str) -> None:
    deltas = [product(12, 10, 4, seed) for seed in (3, 4)]

    def result(seed: int, module: str = "m") -> torch.Tensor:
        return made(composed(deltas, [0.5, 0.5], Parameters(method, density=0.5, seed=seed, space=space), module))

    assert torch.equal(result(1), result(1))
    assert not torch.allclose(result(1), result(2), atol=1e-3)
    assert not torch.allclose(result(1), result(1, "other"), atol=1e-3)


def test_the_same_adapter_twice_has_two_masks() -> None:
    delta = product(12, 10, 5)
    stored = composed([delta, delta], [0.5, 0.5], Parameters("dare_linear", density=0.5))
    ratios = (made(stored) / dense(delta)).round(decimals=2)
    assert {0.0, 1.0, 2.0} <= {abs(value) for value in ratios.flatten().tolist()}


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_a_matrix_of_several_tiles_is_combined_as_one(method: str) -> None:
    shape = (1200, 1000)
    assert len(list(tiles(shape))) == 2
    deltas = [product(*shape, 2, seed) for seed in (1, 2)]
    stored = composed(deltas, [0.5, 0.25], Parameters(method, density=0.5))
    assert 0 < stored.error2 < stored.norm2
    if method == "magnitude_prune":
        wanted = sum(trimmed(dense(each), 0.5) * weight for each, weight in zip(deltas, [0.5, 0.25], strict=True))
        assert isinstance(wanted, torch.Tensor)
        assert math.sqrt(stored.norm2) == pytest.approx(float(wanted.norm()), rel=1e-9)
        assert math.sqrt(stored.error2) == pytest.approx(float((made(stored) - wanted).norm()), rel=1e-6)


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, 1e-300, 0.1, 7.5]) | st.floats(-10, 10), min_size=1),
    data=st.data(),
)
def test_the_kth_largest_magnitude(values: list[float], data: st.DataObject) -> None:
    matrix = torch.tensor(values, dtype=torch.float64)[None]
    k = data.draw(st.integers(1, len(values)))
    assert kth_largest((1, len(values)), lambda tile: matrix[tile], k) == sorted(map(abs, values), reverse=True)[k - 1]


def test_the_kth_largest_magnitude_of_several_tiles() -> None:
    matrix = torch.randn(1500, 1000, generator=torch.Generator().manual_seed(0)).double()
    ordered = matrix.abs().flatten().sort(descending=True).values
    for k in (1, 750_000, 1_500_000):
        assert kth_largest((1500, 1000), lambda tile: matrix[tile], k) == float(ordered[k - 1])


def test_the_range_finder_is_nearly_optimal() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 260, generator=generator).double() + 3 * dense(product(300, 260, 12))
    stored = Tiled((300, 260), matrix.device, lambda tile: matrix[tile]).best(20, 5)
    best = float(torch.linalg.svdvals(matrix)[20:].norm())
    assert best <= float((dense(stored) - matrix).norm()) <= 1.05 * best


def test_core_space_is_the_dense_one_in_shared_bases() -> None:
    deltas, weights = [product(12, 10, 3, seed) for seed in (3, 4)], [0.5, 0.5]
    left = torch.linalg.svd(torch.cat([each.left for each in deltas], 1), full_matrices=False).U
    right = torch.linalg.svd(torch.cat([each.right for each in deltas]), full_matrices=False).Vh
    cores = [trimmed(left.T @ dense(each) @ right.T, 0.5) for each in deltas]
    wanted = left @ (cores[0] + cores[1]) @ right / 2
    stored = composed(deltas, weights, Parameters("magnitude_prune", density=0.5, space="core"))
    assert stored.lora_A.shape[0] == 6
    assert float((made(stored) - wanted).norm()) <= rounding(stored)


def test_slerp_goes_along_the_arc() -> None:
    first, second = product(12, 10, 3, 1), product(12, 10, 4, 2)
    second = second.scaled(float(dense(first).norm() / dense(second).norm()))
    length = float(dense(first).norm())
    angle = math.acos(float((dense(first) * dense(second)).sum()) / length**2)
    for share in (0.0, 0.2, 0.5, 1.0):
        result = made(composed([first, second], [1 - share, share], Parameters("slerp")))
        assert float(result.norm()) == pytest.approx(length, rel=1e-6)
        turned = float((dense(first) * result).sum()) / length / float(result.norm())
        assert math.acos(min(1.0, turned)) == pytest.approx(share * angle, abs=1e-3)
    twice = made(composed([first, second], [1.0, 1.0], Parameters("slerp")))
    assert float(twice.norm()) == pytest.approx(2 * length, rel=1e-6)


def test_slerp_of_parallel_deltas_is_the_sum() -> None:
    first = product(12, 10, 3)
    stored = composed([first, first.scaled(2.0)], [0.25, 0.75], Parameters("slerp"))
    assert float((made(stored) - 1.75 * dense(first)).norm()) <= rounding(stored)


def test_slerp_of_a_zero_delta_is_the_sum() -> None:
    first = product(12, 10, 3)
    stored = composed([Product(first.left[:, :0], first.right[:0]), first], [0.5, 0.5], Parameters("slerp"))
    assert float((made(stored) - 0.5 * dense(first)).norm()) <= rounding(stored)


def test_slerp_is_refused_where_it_means_nothing() -> None:
    first, second = product(12, 10, 3, 1), product(12, 10, 3, 2)
    with pytest.raises(IncompatibleError, match="opposite"):
        composed([first, first.scaled(-1)], [0.5, 0.5], Parameters("slerp"))
    with pytest.raises(UsageError, match="two adapters, not 3"):
        composed([first, second, first], [1.0, 1.0, 1.0], Parameters("slerp"))
    with pytest.raises(UsageError, match="negative"):
        composed([first, second], [1.0, -1.0], Parameters("slerp"))


def test_knots_merges_the_right_singular_vectors_of_the_deltas_side_by_side() -> None:
    from peft.utils import merge_utils

    deltas, weights = [product(12, 10, 3, seed) for seed in (1, 2)], [0.5, 0.75]
    left, values, right = torch.linalg.svd(torch.cat([dense(each) for each in deltas], 1), full_matrices=False)
    left, values, right = left[:, :6], values[:6], right[:6]
    merged = merge_utils.ties(list(right.split(10, 1)), torch.tensor(weights).double(), 0.5)
    stored = composed(deltas, weights, Parameters("knots", density=0.5))
    assert float((made(stored) - left * values @ merged).norm()) <= rounding(stored)


def test_tsv_orthogonalises_the_singular_vectors_of_all_tasks() -> None:
    deltas, weights = [product(12, 10, 3, seed) for seed in (1, 2)], [0.5, 2.0]
    parts = [torch.linalg.svd(dense(each), full_matrices=False) for each in deltas]
    factors = []
    for columns in (torch.cat([p.U[:, :3] for p in parts], 1), torch.cat([p.Vh[:3].T for p in parts], 1)):
        outer = torch.linalg.svd(columns, full_matrices=False)
        factors.append(outer.U @ outer.Vh)
    values = torch.cat([part.S[:3] * weight for part, weight in zip(parts, weights, strict=True)])
    stored = composed(deltas, weights, Parameters("tsv"))
    assert float((made(stored) - factors[0] * values @ factors[1].T).norm()) <= rounding(stored)
    assert torch.allclose(torch.linalg.svdvals(made(stored))[:6], values.sort(descending=True).values, rtol=1e-6)


def test_iso_makes_all_singular_values_their_mean() -> None:
    deltas, weights = [product(12, 10, 3, seed) for seed in (1, 2)], [0.5, 2.0]
    whole = torch.linalg.svd(0.5 * dense(deltas[0]) + 2.0 * dense(deltas[1]), full_matrices=False)
    stored = composed(deltas, weights, Parameters("iso"))
    wanted = whole.U[:, :6] @ whole.Vh[:6] * whole.S[:6].mean()
    assert float((made(stored) - wanted).norm()) <= rounding(stored)


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_that_is_zero_and_the_same_delta_twice(method: str) -> None:
    first = product(9, 8, 3)
    zero = Product(first.left[:, :0], first.right[:0])
    for deltas in ([first, zero], [zero, first], [first, first], [zero, zero]):
        stored = composed(deltas, [0.5, 0.5], Parameters(method, density=0.5))
        assert bool(stored.lora_A.isfinite().all())
        assert bool(stored.lora_B.isfinite().all())
        assert (stored.norm2 == 0) is (deltas[0] is deltas[1] is zero)


def test_a_rank_is_an_upper_bound() -> None:
    assert rank_of([3, 4], (20, 30), Parameters("linear")) == 7
    assert rank_of([3, 4], (5, 30), Parameters("linear")) == 7  # the factors as they are
    assert rank_of([3, 4], (5, 30), Parameters("ties")) == 5
    assert rank_of([3, 4], (20, 30), Parameters("svd")) == 4
    assert rank_of([3, 4], (20, 30), Parameters("svd", rank=100)) == 7
    assert rank_of([3, 4], (2, 30), Parameters("ties", rank=100)) == 2
    with pytest.raises(UsageError, match="rank 0"):
        rank_of([3, 4], (20, 30), Parameters("linear", rank=0))


def test_an_unknown_method_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UsageError, match="'average'") as caught:
        method_named("average")
    assert "ties_mergekit" in str(caught.value.hint)
