"""Infinities and NaNs are found by their bits, wherever they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramgr.algebra.finite import all_finite

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 2**64 - 1), max_size=6))
def test_every_pattern_of_bits_is_understood(dtype: torch.dtype, patterns: list[int]) -> None:
    width = 8 * dtype.itemsize
    signed = [(each % 2**width) - 2**width * ((each >> (width - 1)) & 1) for each in patterns]
    values = torch.tensor(signed, dtype=INTEGERS[dtype.itemsize]).view(dtype)
    assert all_finite(values) == bool(values.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_of_many_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.ones(3, 700, 130)
    assert all_finite(values.to(dtype))
    values[2, 699, 129] = bad
    assert not all_finite(values.to(dtype).transpose(0, 1))


def test_nothing_is_finite() -> None:
    assert all_finite(torch.empty(0, 4))
    assert all_finite(torch.tensor(65504.0).half())
    assert all_finite(torch.arange(4))
