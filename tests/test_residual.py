"""Residuals: whatever the bits, candidate and residual give the weight back; what is packed is checked when read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramgr.algebra.packing import pack, unpack
from loramgr.algebra.residual import BITS, Origin, Residual, concatenate, decode, encode, may_undo
from loramgr.errors import IncompatibleError, IntegrityError

DTYPES = st.sampled_from(sorted(BITS, key=str))
ORIGIN = Origin("fast", 1, "any")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert one.dtype == other.dtype
    return torch.equal(one.view(BITS[one.dtype]), other.view(BITS[one.dtype]))


def same(one: Residual, other: Residual) -> bool:
    parts = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("codes", "positions", "values"))
    return parts and (one.shape, one.dtype, one.origin) == (other.shape, other.dtype, other.origin)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a weight and a candidate of any bits, mostly near each other."""
    dtype = draw(DTYPES)
    width = BITS[dtype].itemsize * 8
    shape = draw(st.sampled_from([(0, 3), (3, 0), (1, 1), (5, 7), (2, 16), (3, 33)]))
    size = shape[0] * shape[1]
    extremes = [0, 1, -1, 1 << (width - 1), (1 << (width - 1)) - 1]
    bits = st.one_of(st.integers(0, (1 << width) - 1), st.sampled_from(extremes))
    weight = draw(st.lists(bits, min_size=size, max_size=size))
    moves = st.one_of(st.integers(-2, 2), st.integers(0, (1 << width) - 1))
    moved = draw(st.lists(moves, min_size=size, max_size=size))

    def tensor(values: list[int]) -> torch.Tensor:
        signed = [(value + (1 << (width - 1))) % (1 << width) - (1 << (width - 1)) for value in values]
        return torch.tensor(signed, dtype=BITS[dtype]).view(dtype).reshape(shape)

    return tensor(weight), tensor([value + move for value, move in zip(weight, moved, strict=True)])


@given(pairs(), st.booleans())
def test_a_residual_gives_back_every_bit(pair: tuple[torch.Tensor, torch.Tensor], transposed: bool) -> None:
    weight, candidate = (each.T if transposed else each for each in pair)
    residual = encode(weight, candidate, ORIGIN)
    assert same_bits(decode(candidate, residual), weight)
    assert same_bits(decode(candidate.contiguous(), unpack(pack(residual))), weight)


@pytest.mark.parametrize("dtype", [dtype for dtype in BITS if dtype.itemsize <= 2], ids=str)
def test_every_bit_pattern_comes_back_from_itself_and_its_neighbours(dtype: torch.dtype) -> None:
    width = dtype.itemsize * 8
    every = torch.arange(1 << width).to(BITS[dtype]).reshape(-1, 64)
    weight = every.view(dtype)
    for step in (-2, -1, 0, 1, 2):
        candidate = (every + step).view(dtype)
        residual = encode(weight, candidate)
        assert same_bits(decode(candidate, residual), weight)
        if abs(step) < 2:
            assert residual.positions.numel() == int(candidate.isnan().sum()), "only NaN candidates are escaped"


def test_tensors_of_other_ranks_count_as_rows_of_their_last_dimension() -> None:
    for shape in ((), (5,), (2, 3, 17)):
        weight = torch.randn(shape)
        residual = encode(weight, weight + 1e-3)
        assert same_bits(decode(weight + 1e-3, residual), weight)
        assert residual.codes.shape[1] == -(-(shape[-1] if shape else 1) // 16)


def test_rows_cut_out_and_concatenated_are_the_residual() -> None:
    weight = torch.randn(11, 21).half()
    residual = encode(weight, weight + weight * torch.randn(11, 21).half() / 512, ORIGIN)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 11)]
    assert residual.positions.numel()
    assert same(concatenate([residual.rows(rows) for rows in cuts]), residual)


def test_a_candidate_that_does_not_fit_is_refused() -> None:
    residual = encode(torch.zeros(2, 3), torch.zeros(2, 3))
    for other in (torch.zeros(3, 2), torch.zeros(2, 3).half()):
        with pytest.raises(IncompatibleError, match="does not fit"):
            decode(other, residual)
    with pytest.raises(IncompatibleError, match="there are no residuals"):
        encode(torch.zeros(2, 3).int(), torch.zeros(2, 3).int())


def test_only_the_same_computation_may_undo() -> None:
    assert may_undo(ORIGIN, Origin("fast", 1, "any"))
    for other in (None, Origin("exact", 1, "any"), Origin("fast", 2, "any"), Origin("fast", 1, "cuda:sm90")):
        assert not may_undo(other, ORIGIN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_residual_is_small(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(512, 1024, generator=generator) / 50).to(dtype)
    delta = torch.randn(512, 1024, generator=generator) / 1000
    merged = (weight.float() + delta).to(dtype)
    residual = encode(weight, (merged.float() - delta).to(dtype), ORIGIN)
    size = weight.numel() * weight.element_size()
    assert residual.nbytes <= 0.20 * size
    assert sum(part.numel() for part in pack(residual).values()) <= 0.06 * size


def packed() -> dict[str, torch.Tensor]:
    weight = torch.arange(60, dtype=torch.float32).reshape(3, 20).bfloat16()
    return pack(encode(weight, weight * 1.01, ORIGIN))


def test_a_packed_residual_is_a_few_tensors_of_bytes() -> None:
    tensors = packed()
    assert set(tensors) == {"about", "codes", "gaps", "values"}
    assert all(tensor.dtype == torch.uint8 and tensor.dim() == 1 for tensor in tensors.values())
    assert unpack(tensors).origin == ORIGIN


@pytest.mark.parametrize("name", ["about", "codes", "gaps", "values"])
def test_every_flipped_bit_of_a_packed_residual_is_noticed(name: str) -> None:
    tensors = packed()
    for byte in range(tensors[name].numel()):
        damaged = {**tensors, name: tensors[name].clone()}
        damaged[name][byte] ^= 1 << (byte % 8)
        try:
            found = unpack(damaged)
        except IntegrityError:
            continue
        # A flag in a zlib header that changes nothing of what the stream says.
        assert same(found, unpack(tensors))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("values"),
        lambda tensors: tensors.update(codes=tensors["codes"][:-3]),
        lambda tensors: tensors.update(values=torch.cat([tensors["values"], tensors["values"]])),
        lambda tensors: tensors.update(gaps=tensors["values"]),
        lambda tensors: tensors.update(about=torch.frombuffer(bytearray(b"[]"), dtype=torch.uint8)),
        lambda tensors: tensors.update(about=torch.frombuffer(bytearray(b'{"sha256":1}'), dtype=torch.uint8)),
    ],
)
def test_a_damaged_residual_is_refused(damage: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = packed()
    damage(tensors)
    with pytest.raises(IntegrityError, match="the residual is damaged"):
        unpack(tensors)


@pytest.mark.parametrize("claim", [{"shape": [1 << 40, 1 << 40]}, {"escaped": 1 << 50}, {"shape": [3, 21]}])
def test_sizes_that_lie_are_refused_before_memory_is_taken(claim: dict[str, object]) -> None:
    import json

    tensors = packed()
    about = json.loads(bytes(tensors["about"].tolist())) | claim
    tensors["about"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    with pytest.raises(IntegrityError, match="the residual is damaged"):
        unpack(tensors)


def test_codes_and_lists_that_contradict_each_other_are_refused() -> None:
    residual = unpack(packed())
    residual.positions[0] += 1  # the digest of the new bytes is right, what they say is not
    with pytest.raises(IntegrityError, match="contradict"):
        unpack(pack(residual))
