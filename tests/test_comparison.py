"""Distances of deltas from their factors, against those of the dense matrices."""

from __future__ import annotations

from math import isclose, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramgr.algebra.comparison import Comparison, Distances, Spaces, Tally, compared, numerical_rank, relative
from loramgr.algebra.lowrank import Product
from loramgr.errors import IncompatibleError

EPS = 2.0**-52


def factors(rows: int, columns: int, rank: int, seed: int) -> Product:
    generator = torch.Generator().manual_seed(seed)
    return Product(
        torch.randn(rows, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, columns, generator=generator, dtype=torch.float64),
    )


def dense(product: Product) -> torch.Tensor:
    return product.left @ product.right


def figures(found: Comparison) -> tuple[object, ...]:
    tensors = (found.values_difference, found.inputs.similarities, found.inputs.angles, found.outputs.angles)
    own = (found.distances, found.rank_a, found.rank_b, found.values_a.tolist(), found.values_b.tolist())
    return (*own, *(tensor.tolist() for tensor in tensors))


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"), [(30, 20, (4, 4)), (30, 20, (2, 5)), (5, 40, (8, 3)), (40, 5, (8, 8)), (1, 7, (1, 2))]
)
def test_every_figure_is_that_of_the_dense_matrices(rows: int, columns: int, ranks: tuple[int, int]) -> None:
    a, b = (factors(rows, columns, rank, seed) for seed, rank in enumerate(ranks))
    found, own, other = compared(a, b), dense(a), dense(b)
    assert isclose(found.distances.norm_a, float(own.norm()), rel_tol=1e-13)
    assert isclose(found.distances.norm_b, float(other.norm()), rel_tol=1e-13)
    assert isclose(found.distances.distance, float((own - other).norm()), rel_tol=1e-13)
    assert isclose(found.distances.cosine or 0, float((own * other).sum() / own.norm() / other.norm()), abs_tol=1e-14)
    for values, matrix in ((found.values_a, own), (found.values_b, other), (found.values_difference, own - other)):
        expected = torch.linalg.svdvals(matrix)[: len(values)]
        assert torch.allclose(values[: len(expected)], expected, rtol=1e-12, atol=1e-13)
    assert (found.rank_a, found.rank_b) == tuple(int(torch.linalg.matrix_rank(each)) for each in (own, other))


def test_subspace_similarity_is_the_papers() -> None:
    a, b = factors(40, 30, 6, 1), factors(40, 30, 4, 2)
    (left, _, right), (other_left, _, other_right) = (torch.linalg.svd(dense(each)) for each in (a, b))
    found = compared(a, b)
    assert found.inputs.similarities.shape == (6, 4)
    for i in range(1, 7):
        for j in range(1, 5):
            inputs = float((right[:i] @ other_right[:j].T).norm() ** 2) / min(i, j)
            outputs = float((left[:, :i].T @ other_left[:, :j]).norm() ** 2) / min(i, j)
            assert isclose(found.inputs.similarities[i - 1, j - 1].item(), inputs, abs_tol=1e-12)
            assert isclose(found.outputs.similarities[i - 1, j - 1].item(), outputs, abs_tol=1e-12)
    cosines = torch.linalg.svdvals(right[:6] @ other_right[:4].T)
    assert torch.allclose(found.inputs.angles, cosines.arccos(), atol=1e-12)
    assert found.inputs.similarity == found.inputs.similarities[5, 3].item()


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-3, 0.7, 0.8, 1.5])
def test_small_angles_keep_their_digits(angle: float) -> None:
    axes = torch.eye(4, dtype=torch.float64)
    turned = torch.stack([axes[0] * torch.tensor(angle).double().cos() + axes[1] * torch.tensor(angle).double().sin()])
    angles = Spaces.of(torch.stack([axes[0], axes[2]]).T, turned.T).angles
    assert len(angles) == 1
    assert isclose(angles[0].item(), angle, rel_tol=1e-6)


@pytest.mark.parametrize("separation", [1e-3, 1e-7, 1e-11])
def test_deltas_that_nearly_cancel_keep_their_digits(separation: float) -> None:
    a, step = factors(200, 150, 8, 1), factors(200, 150, 8, 2)
    b = Product(a.left + separation * step.left, a.right + separation * step.right)
    # subtracting neighbours is exact, so that this has the rounding of its own size only
    expected = float(((a.left - b.left) @ a.right + b.left @ (a.right - b.right)).norm())
    assert isclose(compared(a, b).distances.distance, expected, rel_tol=1e-13)


def test_nine_digits_are_left_where_the_factors_are_split_otherwise() -> None:
    a, step = factors(200, 150, 8, 1), factors(200, 150, 8, 2)
    b = Product(a.left + 1e-7 * step.left, a.right + 1e-7 * step.right)
    expected = float(((a.left - b.left) @ a.right + b.left @ (a.right - b.right)).norm())
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    powers = torch.tensor([2.0, 0.5, 4, 1, 8, 0.25, 16, 1], dtype=torch.float64)
    other = Product(b.left[:, order] * powers, b.right[order] / powers[:, None])  # the same delta, bit for bit
    assert isclose(compared(a, other).distances.distance, expected, rel_tol=1e-9)


def test_a_delta_and_itself() -> None:
    a = factors(40, 30, 4, 1)
    found = compared(a, Product(a.left.clone(), a.right.clone()))
    assert (found.distances.distance, found.distances.relative_distance, found.distances.cosine) == (0.0, 0.0, 1.0)
    assert found.inputs.similarities.eq(1).all()
    assert found.outputs.angles.eq(0).all()


def test_a_zero_delta_has_no_direction() -> None:
    a, zero = factors(40, 30, 4, 1), Product(torch.zeros(40, 2).double(), torch.ones(2, 30).double())
    found = compared(zero, a).distances
    assert (found.norm_a, found.relative_distance, found.cosine) == (0.0, None, None)
    assert found.distance == found.norm_b
    empty = Product(a.left[:, :0], a.right[:0])
    both = compared(zero, empty)
    assert both.distances == Distances(0.0, 0.0, 0.0, None)
    assert both.distances.relative_distance == 0.0
    assert (both.rank_a, both.inputs.similarity, both.inputs.angles.numel()) == (0, None, 0)


def test_tiny_and_huge_deltas() -> None:
    a, b = factors(40, 30, 4, 1), factors(40, 30, 4, 2)
    expected = compared(a, b).distances
    for scale in (1e-170, 1e150):
        found = compared(a.scaled(scale), b.scaled(scale)).distances
        assert isclose(found.distance / scale, expected.distance, rel_tol=1e-12)
        assert isclose(found.cosine or 0, expected.cosine or 0, abs_tol=1e-14)


def test_what_has_no_figures_is_refused() -> None:
    a = factors(40, 30, 4, 1)
    with pytest.raises(IncompatibleError, match=r"\(40, 30\) and \(30, 40\)"):
        compared(a, a.transposed())
    huge = Product(a.left * 1e200, a.right * 1e200)
    with pytest.raises(IncompatibleError, match="range of float64"):
        compared(huge, a)


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5), st.integers(0, 999))


@given(shapes)
def test_the_comparison_mirrors_itself(shape: tuple[int, int, int, int, int]) -> None:
    rows, columns, first, second, seed = shape
    a, b = factors(rows, columns, first, seed), factors(rows, columns, second, seed + 1)
    assert figures(compared(a, b)) == figures(compared(b, a).mirrored())


@given(shapes, st.floats(1e-9, 1e-2))
def test_near_neighbours_mirror_too(shape: tuple[int, int, int, int, int], separation: float) -> None:
    rows, columns, rank, _, seed = shape
    a, step = factors(rows, columns, rank, seed), factors(rows, columns, rank, seed + 1)
    b = Product(a.left + separation * step.left, a.right)
    assert figures(compared(a, b)) == figures(compared(b, a).mirrored())


@given(shapes, st.floats(-1e6, 1e6).filter(lambda factor: abs(factor) > 1e-6))
def test_scaling_by_a_number_scales_the_norms_by_its_size(shape: tuple[int, ...], factor: float) -> None:
    rows, columns, first, second, seed = shape
    a, b = factors(rows, columns, first, seed), factors(rows, columns, second, seed + 1)
    plain, scaled = (compared(*pair).distances for pair in ((a, b), (a.scaled(factor), b.scaled(factor))))
    for name in ("norm_a", "norm_b", "distance"):
        assert isclose(getattr(scaled, name), abs(factor) * getattr(plain, name), rel_tol=1e-11, abs_tol=1e-300)
    own = compared(a, a.scaled(factor)).distances
    assert isclose(own.distance, abs(1 - factor) * plain.norm_a, rel_tol=1e-9, abs_tol=1e-12 * plain.norm_a)
    assert own.cosine is None or isclose(own.cosine, 1 if factor > 0 else -1, abs_tol=1e-14)


def test_pieces_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(50, 20, generator=generator).double() for _ in range(2))
    pieces, parts = Tally(), Tally()
    for rows in (slice(0, 7), slice(7, 50)):
        pieces.add(a[rows], b[rows], a[rows] - b[rows])
        part = Tally()
        part.add(a[rows], b[rows], a[rows] - b[rows])
        parts.include(part.distances())
    for found in (pieces.distances(), parts.distances()):
        assert isclose(found.distance, float((a - b).norm()), rel_tol=1e-13)
        assert isclose(found.norm_b, float(b.norm()), rel_tol=1e-13)
        assert isclose(found.cosine or 0, float((a * b).sum() / a.norm() / b.norm()), abs_tol=1e-14)


@pytest.mark.parametrize(
    ("values", "rank"), [([], 0), ([0.0, 0.0], 0), ([1.0, 1e-3], 2), ([1.0, 99 * EPS], 1), ([1.0, 101 * EPS], 2)]
)
def test_the_numerical_rank_leaves_rounding_out(values: list[float], rank: int) -> None:
    assert numerical_rank(torch.tensor(values, dtype=torch.float64), (100, 3)) == rank


@pytest.mark.parametrize(
    ("distance", "norm", "expected"),
    [(3.0, 2.0, 1.5), (0.0, 0.0, 0.0), (1.0, 0.0, None), (0.0, sqrt(2), 0.0), (1e200, 1e-200, None)],
)
def test_relative_distances(distance: float, norm: float, expected: float | None) -> None:
    assert relative(distance, norm) == expected
