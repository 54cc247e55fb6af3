"""Factors out of dense matrices against the full decomposition, and packed differences against the tensors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramgr.algebra.extraction import decomposed_near, extracted, residual_norm
from loramgr.algebra.goals import Goal
from loramgr.algebra.remainder import packed_difference, with_difference
from loramgr.errors import IncompatibleError, IntegrityError, UsageError

FINE_TUNES = ("bert_ft", "bert_ft_10k_25s")


def of_spectrum(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return a matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64)).Q
    return left * values @ right.T


def share_kept(matrix: torch.Tensor, lora_B: torch.Tensor, lora_A: torch.Tensor) -> float:
    """Return the share of the squared norm that the factors keep, by the dense difference."""
    return 1 - float((matrix - lora_B.double() @ lora_A.double()).square().sum() / matrix.square().sum())


@pytest.mark.parametrize("folder", FINE_TUNES)
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_a_rank_keeps_the_energy_of_the_full_decomposition_on_real_fine_tunes(
    rxnfp_bases: Path, folder: str, rank: int
) -> None:
    base, tuned = (
        torch.load(rxnfp_bases / name / "pytorch_model.bin", map_location="cpu", weights_only=True)
        for name in ("bert_pretrained", folder)
    )
    for name in ("encoder.layer.0.attention.self.query", "encoder.layer.6.intermediate.dense", "pooler.dense"):
        own = f"bert.{name}.weight"
        matrix = tuned.get(own, tuned.get(f"{name}.weight")).double() - base[own].double()
        made = extracted(matrix, Goal(rank=rank), own)
        squares = torch.linalg.svdvals(matrix).square()
        best = float(squares[:rank].sum() / squares.sum())
        kept = share_kept(matrix, made.lora_B, made.lora_A)
        assert made.rank == rank
        assert best - kept < 0.005 * best
        assert math.isclose(made.error, math.sqrt(1 - kept) * made.norm, rel_tol=1e-9)
        assert math.isclose(made.norm, float(matrix.norm()), rel_tol=1e-12)


def test_a_sketch_is_taken_where_it_is_cheaper_and_is_near_the_optimum_on_a_slow_decay() -> None:
    values = torch.arange(1, 257, dtype=torch.float64) ** -0.5
    matrix = of_spectrum(300, 256, values)
    near = decomposed_near(matrix, Goal(rank=24), "m")
    assert near.rest > 0
    assert len(near.values) < 256 // 4
    best = float(values[:24].square().sum())
    assert best * 0.995 < float(near.values[:24].square().sum()) <= best * (1 + 1e-12)
    assert decomposed_near(matrix, Goal(rank=64), "m").rest == 0


@pytest.mark.parametrize("energy", [0.2, 0.5, 0.9, 0.999])
def test_an_energy_is_reached_by_the_smallest_rank_of_the_full_decomposition(energy: float) -> None:
    values = torch.arange(1, 201, dtype=torch.float64) ** -1.2
    shares = values.square().cumsum(0) / values.square().sum()
    smallest = 1 + int((shares < energy).sum())
    matrix = of_spectrum(200, 220, values)
    made = extracted(matrix, Goal(energy=energy), "m")
    assert smallest <= made.rank <= smallest + 1
    assert share_kept(matrix, made.lora_B, made.lora_A) >= energy - 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [0.5, 0.1, 0.02])
def test_an_error_bound_holds_for_the_factors_as_they_are_kept(dtype: torch.dtype, bound: float) -> None:
    matrix = of_spectrum(160, 150, 0.9 ** torch.arange(150, dtype=torch.float64))
    made = extracted(matrix, Goal(max_error=bound), "m", dtype)
    dense = float((matrix - made.lora_B.double() @ made.lora_A.double()).norm())
    assert made.lora_A.dtype == made.lora_B.dtype == dtype
    assert dense <= bound * float(matrix.norm())
    assert math.isclose(made.error, dense, rel_tol=1e-9)


def test_a_bound_that_the_dtype_cannot_hold_is_refused() -> None:
    matrix = of_spectrum(40, 40, torch.ones(40, dtype=torch.float64))
    with pytest.raises(IncompatibleError, match=r"m: with factors in torch.bfloat16 the error is 0\.0"):
        extracted(matrix, Goal(max_error=1e-4), "m", torch.bfloat16)


def test_small_errors_keep_their_digits() -> None:
    values = torch.cat([torch.ones(3, dtype=torch.float64), torch.full((200,), 1e-7, dtype=torch.float64)])
    matrix = of_spectrum(400, 300, values)
    made = extracted(matrix, Goal(rank=3), "m", torch.float64)
    expected = math.sqrt(200) * 1e-7
    assert math.isclose(made.error, expected, rel_tol=1e-6)
    squares = made.norm**2 - float((made.lora_B @ made.lora_A).square().sum())
    assert not math.isclose(math.sqrt(abs(squares)), expected, rel_tol=1e-4)  # what the error must not be taken from


def test_a_matrix_of_lower_rank_than_asked_for_comes_back_as_it_is() -> None:
    matrix = of_spectrum(80, 70, torch.tensor([3.0, 1e-3, 1e-9], dtype=torch.float64))
    made = extracted(matrix, Goal(rank=16), "m", torch.float64)
    assert made.rank == 3
    assert made.error < 1e-14 * made.norm
    assert extracted(matrix, Goal(energy=1.0), "m", torch.float64).rank == 3


def test_a_matrix_of_zeros_has_rank_zero() -> None:
    made = extracted(torch.zeros(6, 4, dtype=torch.float64), Goal(rank=2), "m")
    assert (made.rank, made.norm, made.error) == (0, 0.0, 0.0)
    assert made.lora_B.shape == (6, 0)
    assert made.lora_A.shape == (0, 4)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30])
def test_tiny_and_huge_differences_lose_nothing(scale: float) -> None:
    matrix = of_spectrum(200, 200, 0.9 ** torch.arange(200, dtype=torch.float64))
    one, other = (extracted(each, Goal(rank=8), "m", torch.float64) for each in (matrix, matrix * scale))
    assert math.isclose(other.error / scale, one.error, rel_tol=1e-9)


def test_what_a_dtype_cannot_hold_is_refused() -> None:
    matrix = of_spectrum(20, 20, torch.ones(20, dtype=torch.float64))
    with pytest.raises(IncompatibleError, match="m: its difference is too large"):
        extracted(matrix * 1e12, Goal(rank=2), "m", torch.float16)
    with pytest.raises(IncompatibleError, match="m: its difference rounds to nothing"):
        extracted(matrix * 1e-30, Goal(rank=2), "m", torch.float16)


def test_equal_names_give_equal_factors() -> None:
    matrix = of_spectrum(200, 180, torch.arange(1, 181, dtype=torch.float64) ** -0.5)
    one, again, other = (extracted(matrix, Goal(rank=8), name) for name in ("m", "m", "n"))
    assert torch.equal(one.lora_A, again.lora_A)
    assert not torch.equal(one.lora_A, other.lora_A)


def test_the_residual_is_summed_over_all_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(37, 11, dtype=torch.float64)
    left, right = torch.randn(37, 3, dtype=torch.float64), torch.randn(3, 11, dtype=torch.float64)
    expected = float((matrix - left @ right).norm())
    monkeypatch.setattr("loramgr.algebra.extraction._TILE", {"cpu": 40})
    assert math.isclose(residual_norm(matrix, left, right), expected, rel_tol=1e-14)
    assert residual_norm(torch.zeros(0, 4, dtype=torch.float64), left[:0], torch.zeros(3, 4).double()) == 0


@pytest.mark.parametrize(
    "goal",
    [
        Goal(),
        Goal(rank=0),
        Goal(rank=-1),
        Goal(energy=0),
        Goal(energy=1.5),
        Goal(energy=math.nan),
        Goal(max_error=0),
        Goal(max_error=1),
        Goal(rank=1, energy=0.5),
    ],
)
def test_a_goal_that_makes_no_sense_is_a_usage_error(goal: Goal) -> None:
    with pytest.raises(UsageError):
        goal.check()


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@given(st.sampled_from(DTYPES), st.integers(0, 1 << 32), st.lists(st.integers(0, 5), max_size=3))
def test_a_difference_gives_any_tensor_back(dtype: torch.dtype, seed: int, shape: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    wanted, candidate = (
        torch.randint(0, 256, (count,), generator=generator).to(torch.uint8).view(dtype).reshape(shape)
        for _ in range(2)
    )
    made = with_difference(candidate, packed_difference(wanted, candidate))
    assert (made.dtype, made.shape) == (dtype, wanted.shape)
    assert torch.equal(made.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))


def test_close_tensors_differ_in_few_bytes() -> None:
    wanted = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    near = wanted * (1 + 1e-6 * torch.randn(200, 100, generator=torch.Generator().manual_seed(1)))
    assert len(packed_difference(wanted, near)) < 0.3 * wanted.numel() * 4


def test_a_damaged_difference_is_refused() -> None:
    wanted, candidate = torch.randn(20), torch.randn(20)
    packed = packed_difference(wanted, candidate)
    for damaged in (b"", packed[:40], packed[:-3], packed[:34] + b"\xff" + packed[35:]):
        with pytest.raises(IntegrityError, match="the remainder is damaged"):
            with_difference(candidate, damaged)
    with pytest.raises(IntegrityError, match="of another tensor"):
        with_difference(torch.randn(19), packed)
