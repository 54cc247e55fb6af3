"""Weights of eight bits: one rounding, checked with rationals over all codes; merged and given back in memory."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import isnan
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_toys import Toy, bits, toy_adapters

import loramgr
from loramgr import IncompatibleError, Workspace
from loramgr.algebra import engine, fast
from loramgr.algebra.casting import rounded
from loramgr.algebra.engine import ExactTerms
from loramgr.algebra.factors import Factors
from loramgr.algebra.finite import all_finite
from loramgr.algebra.float8 import FLOAT8, largest, merge_exact_float8, round_float32
from loramgr.algebra.terms import DecomposedTerm, LowRankTerm, ReplacedTerm, Term

# dtype → bits of the fraction, bias, code of the largest finite number, what overflow and NaN are without their sign
KINDS = {
    torch.float8_e4m3fn: (3, 7, 0x7E, 0x7F, [0x7F]),
    torch.float8_e5m2: (2, 15, 0x7B, 0x7C, [0x7D, 0x7E, 0x7F]),
    torch.float8_e4m3fnuz: (3, 8, 0x7F, None, []),
    torch.float8_e5m2fnuz: (2, 16, 0x7F, None, []),
}
DTYPES = list(KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache
def values(dtype: torch.dtype) -> list[Fraction]:
    """Return the numbers of the codes from 0 to the largest one, and the next one, were the exponent to go on."""
    fraction, bias, top, _, _ = KINDS[dtype]

    def number(code: int) -> Fraction:
        exponent, rest = divmod(code, 1 << fraction)
        significand = rest + (1 << fraction if exponent else 0)
        return significand * Fraction(2) ** (max(exponent, 1) - bias - fraction)

    return [number(code) for code in range(top + 2)]


def nearest(value: Fraction, dtype: torch.dtype, *, negative_zero: bool = False) -> int:
    """Return the code nearest to a rational, ties to even."""
    _, _, top, overflow, _ = KINDS[dtype]
    known, size = values(dtype), abs(value)
    code = top + 1
    if size < known[-1]:
        code = bisect_left(known, size)
        if known[code] != size:
            below, above = size - known[code - 1], known[code] - size
            code -= below < above or (below == above and code % 2 == 1)
    if code > top:
        if overflow is None:
            return 0x80
        code = overflow
    negative = value < 0 or (value == 0 and negative_zero)
    return code | 0x80 if negative and (code or overflow is not None) else code


def codes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


def every(dtype: torch.dtype) -> torch.Tensor:
    """Return all 256 codes."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)


def is_number(code: int, dtype: torch.dtype) -> bool:
    _, _, top, overflow, _ = KINDS[dtype]
    return (code & 0x7F) <= top and not (overflow is None and code == 0x80)


@every_dtype
def test_every_code_means_what_the_format_says(dtype: torch.dtype) -> None:
    for code, value in enumerate(every(dtype).double().flatten().tolist()):
        if is_number(code, dtype):
            assert Fraction(value) == values(dtype)[code & 0x7F] * (-1 if code & 0x80 else 1)
        else:
            infinite = dtype == torch.float8_e5m2 and code & 0x7F == 0x7C
            assert abs(value) == float("inf") if infinite else isnan(value)
    numbers = torch.tensor([code for code in range(256) if is_number(code, dtype)], dtype=torch.uint8)
    assert codes(round_float32(every(dtype).float(), dtype).flatten()[numbers.long()]) == numbers.tolist()


@every_dtype
def test_numbers_around_every_boundary_are_rounded_once(dtype: torch.dtype) -> None:
    known = values(dtype)
    marks = [*known, *((low + high) / 2 for low, high in pairwise(known)), Fraction(3) ** 50]
    near = torch.tensor([float(mark) for mark in marks])
    assert [Fraction(each) for each in near.tolist()[:-1]] == marks[:-1]
    around = torch.cat([near, near.nextafter(near * 2 + 1), near.nextafter(near * 0), near * 1.1, near * 0.93])
    around = torch.cat([around, -around])
    signs = torch.signbit(around).tolist()
    expected = [
        nearest(Fraction(value), dtype, negative_zero=s) for value, s in zip(around.tolist(), signs, strict=True)
    ]
    assert codes(round_float32(around, dtype)) == expected
    wide = torch.cat(
        [near.double(), near.double().nextafter(torch.zeros(())), near.double().nextafter(torch.tensor(1e9))]
    )
    assert codes(rounded(wide, dtype)) == [nearest(Fraction(value), dtype) for value in wide.tolist()]


@every_dtype
def test_what_is_no_number(dtype: torch.dtype) -> None:
    odd = round_float32(torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38]), dtype)
    overflow = KINDS[dtype][3]
    assert codes(odd)[:2] == ([0x80, 0x80] if overflow is None else [overflow, overflow | 0x80])
    assert odd[2].isnan()
    assert codes(odd)[3] == codes(odd)[0]
    for code in range(256):
        one = torch.tensor([[code]], dtype=torch.uint8).view(dtype)
        assert all_finite(one) == (bool(one.float().isfinite().all()))
        assert torch.equal(torch.tensor(largest(one)), one.float().abs()[0, 0]) or largest(one) != largest(one)


def term_of(draw: st.DrawFn, shape: tuple[int, int]) -> Term:
    """Draw small factors that make ties, and pairs that nearly cancel, likely."""
    rank = draw(st.integers(0, 3))
    parts = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1.5, 2.0**-9, 3 * 2.0**-8, 1 + 2.0**-20, -1 + 2.0**-23, 2.0**-60])
    left, right = (
        torch.tensor(draw(st.lists(parts, min_size=count, max_size=count)))
        for count in (shape[0] * rank, rank * shape[1])
    )
    scaling = draw(st.sampled_from([1.0, -0.5, 1.25, 2.0**-30, 2.0**-55, 1 + 2.0**-40]))
    return LowRankTerm(
        left.view(shape[0], rank), right.view(rank, shape[1]), scaling, draw(st.sampled_from([1.0, 0.5]))
    )


@st.composite
def merges(draw: st.DrawFn) -> tuple[torch.Tensor, list[Term]]:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(1, 1), (2, 3), (3, 5)]))
    usable = st.sampled_from([code for code in range(256) if is_number(code, dtype)])
    found = draw(st.lists(usable, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    weight = torch.tensor(found, dtype=torch.uint8).view(dtype).view(shape)
    return weight, [term_of(draw, shape) for _ in range(draw(st.integers(1, 3)))]


def exactly(weight: torch.Tensor, terms: list[Term]) -> list[int]:
    """Return the codes of the exact merge, by rationals."""
    found = []
    wide, signs = weight.double().tolist(), torch.signbit(weight.float()).tolist()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            total = Fraction(wide[row][column])
            for term in terms:
                if isinstance(term, LowRankTerm):
                    pairs = zip(term.left[row].tolist(), term.right[:, column].tolist(), strict=True)
                    product = sum((Fraction(one) * Fraction(other) for one, other in pairs), Fraction(0))
                    total += Fraction(term.weight) * Fraction(term.scaling) * product
                elif isinstance(term, ReplacedTerm):
                    total += Fraction(term.weight) * (
                        Fraction(term.tensor[row, column].item()) - Fraction(wide[row][column])
                    )
            kept = wide[row][column] == 0 and signs[row][column]
            found.append(nearest(total, weight.dtype, negative_zero=kept))
    return found


@given(merges())
def test_exact_merges_are_correctly_rounded(drawn: tuple[torch.Tensor, list[Term]]) -> None:
    weight, terms = drawn
    assert codes(merge_exact_float8(weight, terms)) == exactly(weight, terms)


@every_dtype
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_a_tie_is_broken_by_what_float32_cannot_hold(dtype: torch.dtype, side: int) -> None:
    known = values(dtype)[:-1]
    weight = torch.arange(len(known) - 1, dtype=torch.uint8).view(dtype)[:, None]
    halves = torch.tensor([float((high - low) / 2) for low, high in pairwise(known)])[:, None]
    tiny = LowRankTerm(halves, torch.ones(1, 1), side * 2.0**-60)
    terms: list[Term] = [LowRankTerm(halves, torch.ones(1, 1), 1.0), tiny]
    assert codes(merge_exact_float8(weight, terms)) == exactly(weight, terms)
    replaced: list[Term] = [ReplacedTerm(weight.double() + 2 * halves.double(), 0.5), tiny]
    assert codes(merge_exact_float8(weight, replaced)) == exactly(weight, replaced)


@pytest.mark.parametrize("by_column", [False, True])
def test_a_norm_beside_a_tie_is_that_of_the_whole_row(by_column: bool) -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 8.0, 1.0]]).to(torch.float8_e4m3fn)
    turned = weight.T.contiguous() if by_column else weight
    zero = torch.zeros(2, 1), torch.zeros(1, 4)
    norms = weight.double().norm(dim=1)
    decomposed = DecomposedTerm(*zero, 1.0, (norms * 1.3).float())
    tie = torch.zeros(2, 4)
    tie[0, 1] = 1.0
    shift = LowRankTerm(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 0.125, 0.0, 0.0]]), 1.0)
    if by_column:
        shift = LowRankTerm(shift.right.T, shift.left.T, 1.0)
    one = merge_exact_float8(turned, [decomposed, shift], by_column=by_column)
    magnitude = (norms * 1.3).float().double()[:, None]
    exact = weight.double() / norms[:, None] * magnitude + torch.tensor([[0, 0.125, 0, 0], [0] * 4]).double()
    assert torch.equal((one.T if by_column else one).float(), rounded(exact, weight.dtype).float())


@every_dtype
def test_every_code_is_merged_fast_within_the_bound(dtype: torch.dtype) -> None:
    weight = every(dtype)
    known = values(dtype)
    generator = torch.Generator().manual_seed(1)
    for scaling in (1e-3, 0.07, 1.0, 30.0):
        factors = Factors(torch.randn(16, 3, generator=generator), torch.randn(3, 16, generator=generator), scaling)
        merged = fast.merge(weight, factors)
        left, right = factors.left.double(), factors.right.double()
        exact = weight.double() + scaling * (left @ right)
        size = scaling * (left.abs() @ right.abs())
        for at in range(256):
            row, column = divmod(at, 16)
            code, target = codes(merged)[at], float(exact[row, column])
            if not is_number(code, dtype):
                assert not is_number(at, dtype) or abs(target) >= float(known[-1] + known[-2]) / 2 * (1 - 1e-6)
                continue
            half = float(known[(code & 0x7F) + 1] - known[code & 0x7F]) / 2
            value = float(merged[row, column].double())
            assert abs(value - target) <= half + 2.0**-24 * (abs(value) + 5 * float(size[row, column])) * (1 + 1e-9)


@every_dtype
@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("size", [1e-3, 0.05, 1.0, 1e4])
def test_every_code_comes_back(dtype: torch.dtype, numerics: str, size: float) -> None:
    weight = every(dtype)
    generator = torch.Generator().manual_seed(2)
    changes: list[engine.Change] = []
    for rank in (1, 5):
        left, right = torch.randn(16, rank, generator=generator), torch.randn(rank, 16, generator=generator)
        exact = ExactTerms((LowRankTerm(left, right, size),))
        changes.append(Factors(left, right, size) if numerics == "fast" else exact)
    for tensor in (weight.clone(), weight.T.contiguous().T):
        kept = engine.merge_(tensor, changes[0], residual=True)
        kept = engine.switch_(tensor, changes[0], kept.residual, changes[1])
        assert kept.residual is not None
        engine.unmerge_(tensor, changes[1], engine.portable(kept.residual))
        assert codes(tensor) == codes(weight)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return toy_adapters(tmp_path_factory.mktemp("toys"))


def toy8(dtype: torch.dtype) -> Toy:
    """Return a toy whose matrices and convolution have eight bits."""
    model = Toy()
    for module in (model.q, model.k, model.conv):
        module.weight.data = round_float32(module.weight.data, dtype)
    return model


@every_dtype
@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_a_model_with_float8_weights_is_merged_switched_and_given_back(
    dtype: torch.dtype, numerics: str, adapters: dict[str, Path]
) -> None:
    for model in (toy8(dtype), {name: tensor.clone() for name, tensor in toy8(dtype).state_dict().items()}):
        before = bits(model)
        live = loramgr.attach(model, numerics=numerics)
        places = {
            name: each.data_ptr() for name, each in (model if isinstance(model, dict) else model.state_dict()).items()
        }
        live.merge(adapters["plain"])
        merged = bits(model)
        live.switch(adapters["other"])
        live.switch(adapters["head"])
        live.switch(adapters["plain"])
        assert bits(model) == merged != before
        assert live.verify().ok
        live.unmerge()
        assert bits(model) == before
        now = model if isinstance(model, dict) else model.state_dict()
        assert {name: each.data_ptr() for name, each in now.items()} == places


def test_updates_of_float8_weights_that_are_no_sums_are_refused_by_name(adapters: dict[str, Path]) -> None:
    model = toy8(torch.float8_e4m3fn)
    before = bits(model)
    live = loramgr.attach(model)
    with pytest.raises(
        IncompatibleError, match=r"k\.weight is F8_E4M3, and float8 weights take low-rank sums"
    ) as refusal:
        live.merge(adapters["dora"])
    assert refusal.value.hint == "load the model in bfloat16"
    assert bits(model) == before


@every_dtype
def test_a_whole_tensor_takes_the_place_of_a_float8_one(dtype: torch.dtype, adapters: dict[str, Path]) -> None:
    model, wide = toy8(dtype), Toy()
    model.head.weight.data = round_float32(model.head.weight.data, dtype)
    before = bits(model)
    live = loramgr.attach(model)
    live.merge(adapters["head"])
    loramgr.attach(wide).merge(adapters["head"])
    assert codes(model.head.weight.data) == [nearest(Fraction(v), dtype) for v in wide.head.weight.flatten().tolist()]
    live.unmerge()
    assert bits(model) == before


@every_dtype
def test_an_overflow_is_refused_and_undone(dtype: torch.dtype, adapters: dict[str, Path]) -> None:
    model = toy8(dtype)
    model.q.weight.data = torch.full((20, 12), torch.finfo(dtype).max).to(dtype)
    before = bits(model)
    live = loramgr.attach(model)
    with pytest.raises(IncompatibleError, match=r"[qk]\.weight: merged weights are NaN or infinite in torch\.float8"):
        live.merge((adapters["plain"], 1e6))
    assert bits(model) == before
    live.merge((adapters["plain"], 1e6), force=True)
    assert not all_finite(model.q.weight.data)
    live.unmerge()
    assert bits(model) == before


def test_weights_with_scales_beside_them_are_refused(adapters: dict[str, Path]) -> None:
    model = toy8(torch.float8_e4m3fn)
    model.q.register_buffer("weight_scale", torch.ones(1))
    with pytest.raises(IncompatibleError, match=r"the base is quantized: it has q\.weight_scale"):
        loramgr.attach(model).merge(adapters["plain"])


def test_folders_with_float8_weights_are_refused_by_name(adapters: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: each.detach().clone() for name, each in toy8(torch.float8_e4m3fn).state_dict().items()}
    save_file(tensors, tmp_path / "toy.safetensors")
    with pytest.raises(IncompatibleError, match=r"weight: the base stores it as F8_E4M3, a quantized or integer type"):
        Workspace(tmp_path / "home").merge(
            str(tmp_path / "toy.safetensors"), [str(adapters["plain"])], tmp_path / "out"
        )


def test_the_formats_are_those_that_are_merged_into() -> None:
    assert set(FLOAT8) == set(KINDS)
