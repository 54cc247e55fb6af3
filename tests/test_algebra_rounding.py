"""Rounding to a stored dtype: once, to nearest, ties to even, and what a ball proves about it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rationals import DTYPES, FEWER, bits, decoded, infinity, nearest, tensors

from loramgr.algebra.balls import Ball
from loramgr.algebra.rounding import HALVES, _near_midpoints, certify, round_float64, round_fraction, screen
from loramgr.algebra.scratch import Scratch

NARROW = [dtype for dtype in DTYPES if dtype != torch.float64]


def midpoints(dtype: torch.dtype, patterns: torch.Tensor) -> torch.Tensor:
    """Return the float64 numbers halfway above the numbers of the patterns."""
    values = [(decoded(each, dtype) + decoded(each + 1, dtype)) / 2 for each in patterns.tolist()]
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_and_every_midpoint_of_a_16_bit_dtype_rounds_right(dtype: torch.dtype) -> None:
    patterns = torch.arange(infinity(dtype))
    numbers = torch.tensor([float(decoded(each, dtype)) for each in patterns.tolist()], dtype=torch.float64)
    halves = midpoints(dtype, patterns)
    up, down = torch.tensor(torch.inf, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for sign in (1, -1):
        signs = torch.where(torch.tensor(sign) < 0, torch.iinfo(torch.int16).min, 0)
        expected = (patterns + signs).tolist()
        assert bits(round_float64(sign * numbers, dtype)) == expected
        assert bits(round_float64(sign * halves, dtype)) == (patterns + patterns % 2 + signs).tolist()
        assert bits(round_float64(sign * torch.nextafter(halves, down), dtype)) == expected
        assert bits(round_float64(sign * torch.nextafter(halves, up), dtype)) == (patterns + 1 + signs).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@FEWER
@given(data=st.data())
def test_any_float64_rounds_right(dtype: torch.dtype, data: st.DataObject) -> None:
    value = data.draw(tensors((4,), data.draw(st.sampled_from(DTYPES)))).double()
    expected = [nearest(Fraction(each), dtype, negative_zero=str(each)[0] == "-") for each in value.tolist()]
    assert bits(round_float64(value, dtype)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    rounded = round_float64(torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64), dtype)
    assert rounded[:2].tolist() == [torch.inf, -torch.inf]
    assert bool(rounded[2].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@FEWER
@given(data=st.data())
def test_any_fraction_rounds_right(dtype: torch.dtype, data: st.DataObject) -> None:
    pattern = data.draw(st.integers(0, infinity(dtype) - 1))
    step = decoded(pattern + 1, dtype) - decoded(pattern, dtype)
    share = data.draw(st.sampled_from([0, Fraction(1, 2), Fraction(1, 2) + Fraction(1, 10**60)]) | st.fractions(0, 1))
    value = data.draw(st.sampled_from([1, -1])) * (decoded(pattern, dtype) + step * share)
    rounded = torch.tensor([round_fraction(value, dtype)], dtype=torch.float64).to(dtype)
    assert bits(rounded) == [nearest(value, dtype)]


def near_midpoints(ball: Ball, result: torch.Tensor) -> torch.Tensor | None:
    return _near_midpoints(ball.value.float(), ball.radius, ball.relative, result, Scratch())


def proved(ball: Ball, dtype: torch.dtype, *, first: bool) -> tuple[list[int | str], set[int]]:
    """Return the rounded patterns and the places that are left open."""
    result = torch.empty(ball.value.shape, dtype=dtype)
    if first:
        places = screen(ball.value.float(), ball.radius, ball.relative, result, Scratch())
    else:
        places = certify(ball, result, Scratch())
    assert places.tolist() == sorted(set(places.tolist()))
    return bits(result), set(places.tolist())


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@FEWER
@given(data=st.data())
def test_what_is_not_left_open_is_right_for_all_of_the_ball(
    dtype: torch.dtype, first: bool, data: st.DataObject
) -> None:
    first &= dtype in HALVES
    value = data.draw(tensors((2, 3), data.draw(st.sampled_from(DTYPES)))).double()
    radius = data.draw(tensors((2, 1), torch.float64, ["moderate", "zero", "any", "subnormal"])).abs()
    radius = radius * 2.0 ** data.draw(st.integers(-60, 0))
    relative = data.draw(st.sampled_from([0.0, 2.0**-50, 2.0**-45]))
    ball = Ball(value, radius, relative)
    rounded, places = proved(ball, dtype, first=first)
    for place, (middle, width) in enumerate(
        zip(value.flatten().tolist(), radius.expand(2, 3).flatten().tolist(), strict=True)
    ):
        reach = Fraction(width) + Fraction(relative) * abs(Fraction(middle))
        share = data.draw(st.sampled_from([-1, 1, 0]) | st.fractions(-1, 1))
        inside = Fraction(middle) + share * reach
        if place not in places:
            assert rounded[place] == nearest(inside, dtype, negative_zero=str(middle)[0] == "-")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [-100, -7, 0, 1, 60])
def test_the_first_pass_is_right_at_every_distance_from_a_midpoint(exponent: int, sign: int) -> None:
    # float64 numbers up to 12 float32 numbers away from midpoints, on both sides of a binade's begin too
    patterns = torch.tensor([0, 1, 2, 63, 126, 127]) + 128 * (127 + exponent)
    middles = midpoints(torch.bfloat16, patterns)
    steps = torch.arange(-48, 49, dtype=torch.float64) / 4
    value = sign * (middles[:, None] + steps * 2.0 ** (exponent - 23)).float().double()
    value = torch.cat([value, value * (1 + 2.0**-40)], 1)
    radius = torch.full((value.shape[0], 1), 2.0 ** (exponent - 27), dtype=torch.float64)
    ball = Ball(value, radius, 2.0**-33)
    result = torch.empty(value.shape, dtype=torch.bfloat16)
    assert near_midpoints(ball, result) is not None  # it is the cheap way that is tested
    rounded, places = proved(ball, torch.bfloat16, first=True)
    reach = radius + 2.0**-33 * value.abs()
    low, high = (bits(round_float64(value + side * reach, torch.bfloat16)) for side in (-1, 1))
    for place, pattern in enumerate(rounded):
        assert place in places or low[place] == pattern == high[place]
    assert 0 < len(places) < len(rounded)


@pytest.mark.parametrize("odd", [0.0, 2.0**-127, -(2.0**-126), torch.inf, torch.nan, 3.4e38, 1e-9])
def test_the_cheap_way_is_not_taken_where_it_proves_nothing(odd: float) -> None:
    value = torch.tensor([[1.0, 2.0], [3.0, odd]], dtype=torch.float64)
    ball = Ball(value, torch.full((2, 1), 1e-12, dtype=torch.float64), 2.0**-50)
    assert near_midpoints(ball, torch.empty(2, 2, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("value", "radius"), [(torch.inf, 0.0), (torch.nan, 0.0), (1.0, torch.inf), (1.0, torch.nan)])
def test_what_is_not_finite_is_left_open(dtype: torch.dtype, value: float, radius: float) -> None:
    ball = Ball(torch.full((1, 3), value).double(), torch.full((1, 3), radius).double())
    ball.value[0, 1], ball.radius[0, 1] = 1.0, 0.0
    for first in {False, dtype in HALVES}:
        assert proved(ball, dtype, first=first)[1] >= {0, 2}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [1, 3, 63, 64, 65, 1027])
def test_open_places_are_found_in_any_size(dtype: torch.dtype, size: int) -> None:
    value = torch.ones(size, dtype=torch.float64)
    half = torch.finfo(dtype).eps / 2
    expected = set(torch.randperm(size, generator=torch.Generator().manual_seed(size))[: size // 2 + 1].tolist())
    value[list(expected)] += half
    ball = Ball(value, torch.tensor(half / 1024, dtype=torch.float64))
    for first in {False, dtype in HALVES}:
        assert proved(ball, dtype, first=first)[1] == expected


@pytest.mark.parametrize("dtype", HALVES)
def test_a_clear_overflow_is_decided(dtype: torch.dtype) -> None:
    ball = Ball(torch.tensor([-1e300, 1e300]).double() * 1e250, torch.zeros(()).double())
    assert proved(ball, dtype, first=False)[1] == {0, 1}  # 1e550 is beyond float64 itself
    ball = Ball(torch.tensor([-1e38, 1e38]).double() * 10, torch.zeros(()).double())
    rounded, places = proved(ball, dtype, first=False)
    assert places == set()
    assert rounded == [infinity(dtype) - 2**15, infinity(dtype)]
