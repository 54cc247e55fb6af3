"""What the kernels have to do, on a GPU or (TRITON_INTERPRET=1) in Triton's interpreter on the CPU.

`test_kernels.py` runs this file in the interpreter, and `pytest tests/kernel_laws.py` on a GPU where there is one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from rationals import bits
from rationals import merged as rational

from loramgr.algebra import engine
from loramgr.algebra.engine import Merged
from loramgr.algebra.exact import merge_exact, merges_by_kernel
from loramgr.algebra.factors import Factors, stacked
from loramgr.algebra.kernels import launch
from loramgr.algebra.kernels.tiled import TiledResidual
from loramgr.algebra.residual import BITS, Origin
from loramgr.algebra.terms import LowRankTerm, ReplacedTerm
from loramgr.errors import IncompatibleError

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FACTORS = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
           (torch.float32, torch.bfloat16), (torch.float16, torch.float32))  # fmt: skip
U = 2.0**-24
# The interpreter takes a tenth of a second for a tile; it sees every kind of case, the GPU all combinations.
EVERY = DEVICE == "cuda"
EDGE = (70, 70)  # four tiles, three of them partial

# The interpreter computes with numpy, which warns about infinity minus infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def some(cases: list[tuple], count: int) -> list[tuple]:
    """Return the cases, or in the interpreter about `count` of them, in which every factor takes all of its values."""
    return cases if EVERY else cases[:: len(cases) // count]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(BITS[one.dtype]), other.view(BITS[other.dtype]))


def weight_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) / 50).to(dtype)


def factors_of(
    shape: tuple[int, int],
    rank: int,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    seed: int = 0,
    size: float = 0.05,
) -> Factors:
    generator = torch.Generator(DEVICE).manual_seed(100 + seed)
    left = torch.randn(shape[0], rank, generator=generator, device=DEVICE)
    right = torch.randn(rank, shape[1], generator=generator, device=DEVICE) * (size / 50 / max(1, rank) ** 0.5)
    return Factors(left.to(dtypes[0]), right.to(dtypes[1]), 1.25)


def merged(weight: torch.Tensor, factors: Factors) -> tuple[torch.Tensor, Merged]:
    tensor = weight.clone(memory_format=torch.preserve_format)
    result = engine.merge_(tensor, factors, residual=True)
    assert result.kernel == "triton"
    return tensor, result


def excess(weight: torch.Tensor, factors: Factors, result: torch.Tensor) -> float:
    """Return by how much the stated bound is exceeded at most; see `fast`."""
    left, right = factors.left.double(), factors.right.double()
    exact = weight.double() + factors.scaling * (left @ right)
    size = abs(factors.scaling) * (left.abs() @ right.abs())
    half = ((result.view(BITS[result.dtype]) + 1).view(result.dtype).double() - result.double()).abs() / 2
    bound = half + U * (result.double().abs() + (factors.rank + 2) * size)
    return float(((result.double() - exact).abs() - bound * (1 + 2.0**-40)).max())


@pytest.mark.parametrize(("dtypes", "rank", "dtype"), some(list(product(FACTORS, (1, 16, 37), FLOATS)), 6), ids=str)
def test_a_merge_is_within_the_stated_bound(
    dtypes: tuple[torch.dtype, torch.dtype], rank: int, dtype: torch.dtype
) -> None:
    shape = (70, 130) if EVERY else (40, 70)
    weight = weight_of(shape, dtype)
    for size in (0.05, 1.0) if EVERY else (0.3,):
        factors = factors_of(shape, rank, dtypes, size=size)
        assert excess(weight, factors, merged(weight, factors)[0]) <= 0


def specials(weight: torch.Tensor) -> torch.Tensor:
    """Put numbers that are no ordinary ones, and whole zero rows, into a weight."""
    flat = weight.view(-1)
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-40, 6e-8, 3e38, -65504.0])
    flat[: min(10, flat.numel())] = odd[: flat.numel()].to(weight.dtype).to(weight.device)
    weight[weight.shape[0] // 2 :, : weight.shape[1] // 3] = 0
    return weight


def placed(weight: torch.Tensor, how: str) -> torch.Tensor:
    if how == "transposed":
        return weight.T.clone(memory_format=torch.contiguous_format).T
    if how == "sliced":
        larger = torch.zeros((weight.shape[0] * 2 + 1, weight.shape[1] * 2 + 3), dtype=weight.dtype, device=DEVICE)
        view = larger[1::2, 2:-1:2]
        view.copy_(weight)
        return view
    return weight.clone()


PLACES = ("contiguous", "transposed", "sliced")
SHAPES = ((64, 64), (1, 1), (70, 130), (65, 7), (3, 200))


@pytest.mark.parametrize(("dtype", "shape", "how", "size"), some(list(product(FLOATS, SHAPES, PLACES, (0.05, 4.0))), 8))
def test_merge_switch_and_unmerge_give_the_weight_back(
    dtype: torch.dtype, shape: tuple[int, int], how: str, size: float
) -> None:
    weight = specials(weight_of(shape, dtype))
    first = factors_of(shape, 4, size=size)
    second = factors_of(shape, 37, (torch.bfloat16, torch.bfloat16), seed=1, size=size)
    tensor = placed(weight, how)
    one = engine.merge_(tensor, first, residual=True)
    two = engine.switch_(tensor, first, one.residual, second)
    assert {one.kernel, two.kernel} == {"triton"}
    assert two.residual is not None
    again = tensor.clone(memory_format=torch.preserve_format)
    assert engine.unmerge_(tensor, second, two.residual) == "triton"
    assert same_bits(tensor.contiguous(), weight)
    assert engine.unmerge_(again, second, engine.portable(two.residual)) == "triton"
    assert same_bits(again.contiguous(), weight)


def test_tiles_that_overflow_are_kept_whole() -> None:
    shape = EDGE
    weight = weight_of(shape, torch.bfloat16)
    weight[:64, 64:] = 0
    _, result = merged(weight, factors_of(shape, 4))
    assert isinstance(result.residual, TiledResidual)
    assert result.residual.whole_tiles.tolist() == [1]
    assert not result.residual.whole.any()


def test_without_a_residual_the_same_bits_are_merged() -> None:
    shape = EDGE
    for dtype in FLOATS:
        weight = weight_of(shape, dtype)
        factors = factors_of(shape, 4)
        tensor = weight.clone()
        assert engine.merge_(tensor, factors, residual=False) == Merged(None, "triton")
        assert same_bits(tensor, merged(weight, factors)[0])


def test_factors_that_are_not_finite_are_undone_too() -> None:
    shape = EDGE
    factors = factors_of(shape, 4)
    factors.right[0, 3], factors.left[5, 1] = float("inf"), float("nan")
    for dtype in FLOATS:
        weight = weight_of(shape, dtype)
        tensor, result = merged(weight, factors)
        engine.unmerge_(tensor, factors, result.residual)
        assert same_bits(tensor, weight)


def test_a_sum_of_adapters_is_merged_at_once() -> None:
    shape = EDGE
    weight = weight_of(shape, torch.float32)
    parts = [factors_of(shape, rank, (torch.bfloat16, torch.bfloat16), seed=rank) for rank in (4, 16)]
    factors = stacked([LowRankTerm(part.left, part.right, part.scaling, 0.3 * part.rank) for part in parts])
    exact = weight.double()
    for part in parts:
        exact += part.scaling * 0.3 * part.rank * (part.left.double() @ part.right.double())
    assert float((merged(weight, factors)[0].double() - exact).abs().max()) < 1e-7


def test_a_merge_that_has_not_settled_can_be_undone() -> None:
    shape = EDGE
    factors = factors_of(shape, 4, size=4.0)
    weight = specials(weight_of(shape, torch.bfloat16))
    tensor = weight.clone()
    result = engine.merge_(tensor, factors, residual=True, wait=False)
    engine.unmerge_(tensor, factors, result.residual)
    assert same_bits(tensor, weight)
    engine.settle([engine.merge_(tensor, factors, residual=True, wait=False)])
    assert same_bits(tensor, merged(weight, factors)[0])


def test_a_portable_residual_is_a_settled_one() -> None:
    shape = EDGE
    factors = factors_of(shape, 4, size=4.0)
    weight = specials(weight_of(shape, torch.bfloat16))
    tensor = weight.clone()
    result = engine.merge_(tensor, factors, residual=True, wait=False)
    assert result.residual is not None
    kept = engine.portable(result.residual)
    assert same_bits(tensor, merged(weight, factors)[0])
    engine.unmerge_(tensor, factors, kept)
    assert same_bits(tensor, weight)


def test_what_fails_in_the_middle_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = EDGE
    factors, other = factors_of(shape, 4, size=4.0), factors_of(shape, 5, size=4.0, seed=1)
    weight = specials(weight_of(shape, torch.bfloat16))
    before, result = merged(weight, factors)
    tensors = weight.clone(), before.clone()

    def full(residual: TiledResidual) -> None:
        raise torch.OutOfMemoryError("no memory for whole tiles")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "_keep_whole", full)
        with pytest.raises(torch.OutOfMemoryError):
            engine.merge_(tensors[0], factors, residual=True)
        with pytest.raises(torch.OutOfMemoryError):
            engine.switch_(tensors[1], factors, result.residual, other)
    assert same_bits(tensors[0], weight)
    assert same_bits(tensors[1], before)
    engine.unmerge_(tensors[1], factors, result.residual)
    assert same_bits(tensors[1], weight)


def test_a_residual_of_other_kernels_is_refused() -> None:
    shape = (20, 30)
    weight, factors = weight_of(shape, torch.bfloat16), factors_of(shape, 4)
    tensor, result = merged(weight, factors)
    before = tensor.clone()
    foreign = replace(engine.portable(result.residual), origin=Origin("fast", 1, "cuda:sm70/triton0"))
    with pytest.raises(IncompatibleError, match="cuda:sm70/triton0"):
        engine.unmerge_(tensor, factors, foreign)
    assert same_bits(tensor, before)
    engine.unmerge_(tensor, factors, foreign, unproven=True)
    assert same_bits(tensor, weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64], ids=str)
def test_other_dtypes_take_the_torch_path(dtype: torch.dtype) -> None:
    shape = (20, 30)
    weight, factors = weight_of(shape, dtype), factors_of(shape, 4)
    change = factors if dtype.itemsize == 1 else engine.ExactTerms((LowRankTerm(factors.left, factors.right, 1.25),))
    tensor = weight.clone()
    result = engine.merge_(tensor, change, residual=True)
    assert result.kernel == engine.unmerge_(tensor, change, result.residual) == "torch"
    assert same_bits(tensor, weight)


def test_empty_weights_and_rank_zero() -> None:
    for shape, rank in (((0, 5), 3), ((5, 0), 3), ((70, 5), 0)):
        weight, factors = weight_of(shape, torch.bfloat16), factors_of(shape, rank)
        tensor = weight.clone()
        result = engine.merge_(tensor, factors, residual=True)
        assert same_bits(tensor, weight)
        engine.unmerge_(tensor, factors, result.residual)
        assert same_bits(tensor, weight)


SCREENED = (torch.bfloat16, torch.float16)


def exactly_merged(weight: torch.Tensor, terms: list[LowRankTerm]) -> list[int | str]:
    assert merges_by_kernel(weight, terms, weight.dtype)
    return bits(merge_exact(weight, terms).cpu())


@pytest.mark.parametrize("dtype", SCREENED)
@pytest.mark.parametrize(("shape", "rank"), [((1, 1), 1), ((33, 5), 3), ((7, 130), 17)])
def test_exact_merges_round_correctly(dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    weight = weight_of(shape, dtype)
    parts = [factors_of(shape, rank, seed=seed) for seed in (0, 1)]
    terms = [LowRankTerm(part.left, part.right, 1.25, weight=0.7) for part in parts]
    assert exactly_merged(weight, terms) == rational(weight.cpu(), [on_cpu(term) for term in terms], dtype)


@pytest.mark.parametrize("dtype", SCREENED)
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0])
def test_exact_merges_round_correctly_where_nearly_all_cancels(dtype: torch.dtype, size: float) -> None:
    weight = weight_of((9, 40), dtype) * size
    left = torch.cat([weight.float(), weight.float()], dim=1)[:, :40].clone()
    right = -torch.eye(40, device=DEVICE) * (1 + 2.0**-12)
    right[::3] *= 1 - 2.0**-20
    terms = [LowRankTerm(left, right, 1.0)]
    assert exactly_merged(weight, terms) == rational(weight.cpu(), [on_cpu(term) for term in terms], dtype)


@pytest.mark.parametrize("dtype", SCREENED)
def test_exact_merges_decide_ties_and_keep_what_is_not_finite(dtype: torch.dtype) -> None:
    half = torch.finfo(dtype).eps / 2
    odd = [0.0, -0.0, 1.0, -1.0, 1 + 2 * half, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal]
    weight = torch.tensor([odd] * 6, device=DEVICE).to(dtype)
    added = torch.tensor([0.0, half, -half / 2, half * (1 + 2.0**-20), 2.0**-133, 2.0**-25], device=DEVICE)
    terms = [LowRankTerm(added[:, None], torch.ones((1, len(odd)), device=DEVICE), 1.0)]
    assert exactly_merged(weight, terms) == rational(weight.cpu(), [on_cpu(term) for term in terms], dtype)
    weight[0, 0], weight[1, 1] = float("nan"), float("-inf")
    terms[0].left[2, 0] = float("inf")
    found = merge_exact(weight, terms)
    assert found[0, 0].isnan()
    assert float(found[1, 1]) == float("-inf")
    assert bool(found[2].isnan().all())
    assert not bool(found[3:].isnan().any())


@pytest.mark.parametrize("dtype", SCREENED)
@pytest.mark.parametrize("layout", ["transposed", "strided", "doubles"])
def test_exact_merges_take_any_layout(dtype: torch.dtype, layout: str) -> None:
    weight, part = weight_of((35, 34), dtype), factors_of((35, 34), 2)
    factor = torch.float64 if layout == "doubles" else torch.float32
    term = LowRankTerm(part.left.to(factor) / 3, part.right.to(factor) / 7, 0.3)
    seen = {"transposed": weight.T.contiguous().T, "strided": weight.repeat(2, 2)[::2, :34], "doubles": weight}[layout]
    assert exactly_merged(seen, [term]) == rational(seen.cpu(), [on_cpu(term)], dtype)


def test_nothing_is_screened_that_the_kernel_does_not_take() -> None:
    weight, part = weight_of((4, 4), torch.float32), factors_of((4, 4), 1)
    term = LowRankTerm(part.left, part.right, 1.0)
    assert not merges_by_kernel(weight, [term], torch.float32)
    assert not merges_by_kernel(weight, [term], torch.bfloat16)
    assert not merges_by_kernel(weight.half(), [], torch.float16)
    assert not merges_by_kernel(weight.half(), [term, ReplacedTerm(weight, 0.5)], torch.float16)
    assert not merges_by_kernel(weight[:0].half(), [LowRankTerm(part.left[:0], part.right, 1.0)], torch.float16)


def on_cpu(term: LowRankTerm) -> LowRankTerm:
    return replace(term, left=term.left.cpu(), right=term.right.cpu())
