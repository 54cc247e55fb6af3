"""What only a GPU shows: a billion weights, offsets beyond 2^31, and one kind of kernel against the other.

Run by hand on a machine with a GPU (about 40 GB of its memory): pytest tests/kernel_scale.py
"""

from __future__ import annotations

import pytest
import torch
from kernel_laws import FLOATS, excess, factors_of, merged, same_bits, weight_of

from loramgr.algebra import engine
from loramgr.algebra.engine import ExactTerms
from loramgr.algebra.exact import merge_exact
from loramgr.algebra.factors import Factors
from loramgr.algebra.kernels import launch
from loramgr.algebra.terms import LowRankTerm

BF16 = (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "dtype", "rank"),
    [((32768, 32768), torch.bfloat16, 16), ((70000, 33000), torch.float16, 4), ((16384, 16400), torch.float32, 64)],
    ids=str,
)
def test_no_weight_of_a_billion_changes(shape: tuple[int, int], dtype: torch.dtype, rank: int) -> None:
    weight = weight_of(shape, dtype)
    base = weight.clone()
    first, second = factors_of(shape, rank, BF16), factors_of(shape, rank, seed=1)
    one = engine.merge_(weight, first, residual=True)
    assert not same_bits(weight, base)
    assert one.residual is not None
    assert one.residual.nbytes <= 0.20 * weight.nbytes
    two = engine.switch_(weight, first, one.residual, second)
    engine.unmerge_(weight, second, two.residual)
    assert same_bits(weight, base)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.9999), (torch.float16, 0.9995)], ids=str)
@pytest.mark.parametrize("dtypes", [BF16, (torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("rank", [4, 16, 64, 512])
def test_nearly_all_weights_are_correctly_rounded_and_all_within_the_bound(
    dtype: torch.dtype, share: float, dtypes: tuple[torch.dtype, torch.dtype], rank: int
) -> None:
    weight, factors = weight_of((2048, 4096), dtype), factors_of((2048, 4096), rank, dtypes)
    result, _ = merged(weight, factors)
    exact = merge_exact(weight, [LowRankTerm(factors.left, factors.right, factors.scaling)])
    found = float((result == exact).double().mean())
    print(f"{dtype} {dtypes[0]} r={rank}: {1 - found:.2e} of the weights not correctly rounded")
    assert found >= share
    assert excess(weight, factors, result) <= 0


@pytest.mark.parametrize("dtypes", [BF16, (torch.float32, torch.float32), (torch.float16, torch.float16)], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 100])
def test_float32_weights_are_within_the_bound(dtypes: tuple[torch.dtype, torch.dtype], rank: int) -> None:
    for size in (0.05, 1.0, 30.0):
        weight, factors = weight_of((4096, 4096), torch.float32), factors_of((4096, 4096), rank, dtypes, size=size)
        assert excess(weight, factors, merged(weight, factors)[0]) <= 0


@pytest.mark.parametrize("size", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pairs_in_registers_compute_what_single_weights_do(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: float
) -> None:
    weight, factors = weight_of((4096, 4096), dtype), factors_of((4096, 4096), 16, BF16, size=size)
    every = torch.arange(1 << 16, dtype=torch.int32, device="cuda").to(torch.int16).view(dtype)
    weight[:16] = every.reshape(16, 4096)
    paired, one = merged(weight, factors)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_is_packed", lambda weight: False)
        single, two = merged(weight, factors)
        assert same_bits(paired, single)
        engine.unmerge_(paired, factors, one.residual)
    engine.unmerge_(single, factors, two.residual)
    assert same_bits(paired, weight)
    assert same_bits(single, weight)
    assert torch.equal(engine.portable(one.residual).codes, engine.portable(two.residual).codes)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exact_numerics_have_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    weight, factors = weight_of((512, 1024), dtype), factors_of((512, 1024), 16)
    change = ExactTerms((LowRankTerm(factors.left, factors.right, 1.25),))
    here, there = weight.clone(), weight.cpu()
    at_home = ExactTerms((LowRankTerm(factors.left.cpu(), factors.right.cpu(), 1.25),))
    on_gpu, on_cpu = (engine.merge_(each, c, residual=True) for each, c in ((here, change), (there, at_home)))
    assert same_bits(here.cpu(), there)
    kept = engine.portable(on_gpu.residual)
    assert torch.equal(kept.codes.cpu(), engine.portable(on_cpu.residual).codes)
    engine.unmerge_(there, at_home, kept.to(torch.device("cpu")))
    assert same_bits(there, weight.cpu())


def test_plain_torch_has_the_bits_of_the_cpu() -> None:
    from loramgr.algebra import fast

    for dtype in fast.WEIGHT_DTYPES:
        weight, factors = weight_of((300, 1000), dtype), factors_of((300, 1000), 16)
        at_home = Factors(factors.left.cpu(), factors.right.cpu(), factors.scaling)
        assert same_bits(fast.merge(weight, factors).cpu(), fast.merge(weight.cpu(), at_home))
