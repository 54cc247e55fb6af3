"""Changes that are no products of two factors: against plain matrix algebra, in any threads, and rounded once."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from loramgr.algebra.dense import butterfly, decomposed, expert_deltas, hadamard, kronecker, rotated, rotation, scaled
from loramgr.algebra.exact import merge_exact
from loramgr.algebra.rounding import round_fraction
from loramgr.algebra.terms import AddedTerm, LowRankTerm, ReplacedTerm
from loramgr.products import product, tucker


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def test_products() -> None:
    a, b, core = _random(70, 5), _random(5, 90), _random(4, 3, 2, 2)
    assert torch.allclose(product(a, b), a.double() @ b.double(), rtol=1e-14)
    outputs, inputs = _random(4, 6), _random(3, 5)
    expected = torch.einsum("ijkl,io,jn->onkl", core.double(), outputs.double(), inputs.double())
    assert torch.allclose(tucker(core, outputs, inputs), expected, rtol=1e-12, atol=1e-14)
    w1, w2 = _random(2, 3), _random(4, 5)
    assert torch.equal(kronecker((w1,), (w2,), None), torch.kron(w1.double(), w2.double()))
    assert torch.equal(hadamard((a, b), (a, b), None), product(a, b) ** 2)


def test_experts_are_one_product_each() -> None:
    a, b = _random(3, 2, 5), _random(3, 4, 2)
    straight = expert_deltas(a, b, 0.5, transposed=False)
    assert torch.allclose(straight, 0.5 * b.double() @ a.double())
    assert torch.equal(expert_deltas(a, b, 0.5, transposed=True), straight.mT)


@pytest.mark.parametrize("size", [2, 5, 16])
def test_rotations_are_orthogonal(size: int) -> None:
    blocks = rotation(_random(3, size * (size - 1) // 2), size, None)
    identity = torch.eye(size, dtype=torch.float64).expand_as(blocks)
    assert torch.allclose(blocks @ blocks.mT, identity, atol=1e-12)
    weight = _random(7, 3 * size)
    assert torch.allclose(rotated(weight, blocks), weight.double() @ torch.block_diag(*blocks).T, atol=1e-12)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7])
def test_neumann_series_as_peft_cuts_it(terms: int) -> None:
    oft = pytest.importorskip("peft.tuners.oft.layer")
    module = oft.OFTRotationModule(2, 6, 4, 8, use_cayley_neumann=True, num_cayley_neumann_terms=terms).double()
    vectors = _random(2, 6).double() * 0.1
    expected = module._cayley_batch(vectors, 4, True, terms)
    assert torch.allclose(rotation(vectors, 4, terms), expected, atol=1e-14)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_butterflies_as_peft_permutes_them(factors: int) -> None:
    boft = pytest.importorskip("peft.tuners.boft.layer")
    count, size = 8, 4
    weight, blocks, scale = _random(6, count * size), _random(factors, count, size, size) * 0.2, _random(6, 1)
    raw = blocks.double()
    skew = 0.5 * (raw - raw.mT)
    identity = torch.eye(size, dtype=torch.float64)
    matrix = torch.eye(count * size, dtype=torch.float64)
    for index in range(factors):
        orthogonal = torch.linalg.solve(identity + skew[index], identity - skew[index], left=False)
        order = boft.BOFTLayer.block_butterfly_perm(None, count * size, count >> index, size // 2, factors - 1)
        permutation = torch.zeros_like(matrix)
        permutation[torch.arange(count * size), order] = 1
        matrix = permutation @ torch.block_diag(*orthogonal) @ permutation.T @ matrix
    expected = scale.double() * (weight.double() @ matrix.T)
    assert torch.allclose(butterfly(weight, blocks, scale), expected, atol=1e-12)


def test_norms_and_factors() -> None:
    weight, magnitude = _random(5, 7, 3, 3).double(), _random(5).abs()
    found = decomposed(weight, magnitude, 0, 0.0)
    assert torch.allclose(found.flatten(1).norm(dim=1), magnitude.double())
    grouped = scaled(_random(6, 2, 3), torch.arange(1.0, 5), 1)
    factors = torch.tensor([[1.0, 2.0]] * 3 + [[3.0, 4.0]] * 3)
    assert torch.equal(grouped, _random(6, 2, 3).double() * factors[..., None].double())


def test_the_same_bits_with_any_number_of_threads() -> None:
    weight, vectors = _random(300, 64), _random(4, 120) * 0.1
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((rotated(weight, rotation(vectors, 16, None)), product(weight, weight.T)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for each in found[1:] for one, other in zip(found[0], each, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_added_is_rounded_once(dtype: torch.dtype) -> None:
    weight = _random(9, 11, dtype=dtype)
    added, other = _random(9, 11, seed=5).double() * 2.0**-12, _random(9, 11, seed=6)
    left, right = _random(9, 2, seed=7), _random(2, 11, seed=8)
    added[0], weight[0, 0] = 0.0, -0.0
    terms = [AddedTerm(added, 0.7), ReplacedTerm(other, 0.25), LowRankTerm(left, right, 0.5)]
    for chosen in (terms[:1], terms):
        merged = merge_exact(weight, chosen)
        for row in range(9):
            for column in range(11):
                base = Fraction(weight[row, column].item())
                exact = base + Fraction(0.7) * Fraction(added[row, column].item())
                if len(chosen) > 1:
                    exact += Fraction(0.25) * (Fraction(other[row, column].item()) - base)
                    pairs = zip(left[row].tolist(), right[:, column].tolist(), strict=True)
                    exact += Fraction(0.5) * sum((Fraction(x) * Fraction(y) for x, y in pairs), Fraction(0))
                assert merged[row, column].item() == round_fraction(exact, dtype)
    assert torch.equal(merge_exact(weight, terms[:1], by_column=True), merge_exact(weight, terms[:1]))
    assert str(merge_exact(weight, terms[:1])[0, 0].item()) == "-0.0"
