"""An oracle for the exact merge: rational numbers, rounded by a search among the bit patterns of a dtype."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isqrt

import torch
from hypothesis import settings
from hypothesis import strategies as st

from loramgr.algebra.terms import DecomposedTerm, LowRankTerm, ReplacedTerm, Term

# dtype → (integer dtype of its bits, bits of the exponent, bits of the fraction)
LAYOUTS = {
    torch.float64: (torch.int64, 11, 52),
    torch.float32: (torch.int32, 8, 23),
    torch.float16: (torch.int16, 5, 10),
    torch.bfloat16: (torch.int16, 8, 7),
}
DTYPES = list(LAYOUTS)
NAN = "nan"
FEWER = settings(max_examples=settings().max_examples // 2)  # for a law that is tried for every dtype


def decoded(pattern: int, dtype: torch.dtype) -> Fraction:
    """Return the value of a pattern without its sign; infinity counts as the power of two that it stands in for."""
    _, exponent_bits, fraction_bits = LAYOUTS[dtype]
    exponent, fraction = divmod(pattern, 1 << fraction_bits)
    lowest = 2 - (1 << (exponent_bits - 1)) - fraction_bits
    significand = fraction + (1 << fraction_bits if exponent else 0)
    return significand * Fraction(2) ** (lowest + max(exponent - 1, 0))


def infinity(dtype: torch.dtype) -> int:
    """Return the pattern of +infinity."""
    _, exponent_bits, fraction_bits = LAYOUTS[dtype]
    return ((1 << exponent_bits) - 1) << fraction_bits


def nearest(value: Fraction, dtype: torch.dtype, *, negative_zero: bool = False) -> int:
    """Return the pattern, as the signed integer of its bits, of the number nearest to a rational, ties to even."""
    low, high = 0, infinity(dtype)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if decoded(middle, dtype) <= abs(value) else (low, middle)
    below, above = abs(value) - decoded(low, dtype), decoded(high, dtype) - abs(value)
    pattern = low if below < above or (below == above and low % 2 == 0) else high
    negative = value < 0 or (value == 0 and negative_zero)
    return pattern - (1 << torch.iinfo(LAYOUTS[dtype][0]).bits - 1) if negative else pattern


def bits(tensor: torch.Tensor) -> list[int | str]:
    """Return the patterns of a tensor's entries in row-major order; every NaN is `NAN`."""
    patterns = tensor.contiguous().view(LAYOUTS[tensor.dtype][0]).flatten().tolist()
    return [NAN if nan else pattern for pattern, nan in zip(patterns, tensor.flatten().isnan().tolist(), strict=True)]


def merged(weight: torch.Tensor, terms: Sequence[Term], dtype: torch.dtype) -> list[int | str]:
    """Return what the exact merge has to give, for finite inputs, as `bits` would."""
    return [
        entry(weight, terms, dtype, row, column) for row in range(weight.shape[0]) for column in range(weight.shape[1])
    ]


def entry(weight: torch.Tensor, terms: Sequence[Term], dtype: torch.dtype, row: int, column: int) -> int | str:
    """Return one merged entry; where there is a norm, from enclosures that are 2^-4000 wide relative to it."""
    base = Fraction(weight[row, column].item())
    ends = [base, base]
    for term in terms:
        added = _added(weight, term, row, column)
        if added is None:
            return NAN
        ends = [ends[0] + min(added), ends[1] + max(added)]
    keeps_sign = base == 0 and str(weight[row, column].item()).startswith("-")
    low, high = (nearest(end, dtype, negative_zero=keeps_sign) for end in ends)
    assert low == high, "the oracle's enclosure is too wide for this case"
    return low


def _added(weight: torch.Tensor, term: Term, row: int, column: int) -> tuple[Fraction, Fraction] | None:
    base, factor = Fraction(weight[row, column].item()), Fraction(term.weight)
    if isinstance(term, LowRankTerm):
        value = factor * _product(term, row, column)
        return value, value
    if isinstance(term, ReplacedTerm):
        value = factor * (Fraction(term.tensor[row, column].item()) - base)
        return value, value
    direction = _directions(weight, term, row)
    square = sum((each * each for each in direction), Fraction(0))
    if square == 0:
        return None
    scaled = factor * Fraction(term.magnitude[row].item()) * direction[column]
    return tuple(scaled / root - factor * base for root in _roots(square))  # type: ignore[return-value]


def _directions(weight: torch.Tensor, term: DecomposedTerm, row: int) -> list[Fraction]:
    start = weight if term.start is None else term.start
    return [Fraction(start[row, column].item()) + _product(term, row, column) for column in range(weight.shape[1])]


def _product(term: LowRankTerm | DecomposedTerm, row: int, column: int) -> Fraction:
    pairs = zip(term.left[row].tolist(), term.right[:, column].tolist(), strict=True)
    return Fraction(term.scaling) * sum((Fraction(left) * Fraction(right) for left, right in pairs), Fraction(0))


def _roots(square: Fraction) -> tuple[Fraction, Fraction]:
    # p/q = p·q/q²: the root of p·q, shifted far enough for 4000 bits.
    product, shift = square.numerator * square.denominator, 4000
    root = isqrt(product << 2 * shift)
    exact = root * root == product << 2 * shift
    unit = Fraction(1, square.denominator << shift)
    return root * unit, (root if exact else root + 1) * unit


def tensors(shape: tuple[int, ...], dtype: torch.dtype, kinds: Sequence[str] = ()) -> st.SearchStrategy[torch.Tensor]:
    """Return finite tensors of one kind each: any pattern, small integers, near 1, subnormal, huge, or zeros."""
    integer, _, fraction_bits = LAYOUTS[dtype]
    top = infinity(dtype)
    one = nearest(Fraction(1), dtype)
    magnitudes = {
        "any": st.integers(0, top - 1),
        "integers": st.integers(0, 9).map(lambda value: nearest(Fraction(value), dtype)),
        "ones": st.integers(one - 3, one + 3),
        "moderate": st.integers(one - (6 << fraction_bits), one + (2 << fraction_bits)),
        "subnormal": st.integers(0, 3 << fraction_bits),
        "huge": st.integers(top - (3 << fraction_bits), top - 1),
        "zero": st.just(0),
    }
    count = torch.Size(shape).numel()
    smallest = torch.iinfo(integer).min
    signed = {kind: st.tuples(each, st.sampled_from([0, smallest])).map(sum) for kind, each in magnitudes.items()}

    def made(patterns: list[int]) -> torch.Tensor:
        return torch.tensor(patterns, dtype=integer).view(dtype).reshape(shape)

    choices = [signed[kind] for kind in kinds or signed]
    mixed = st.one_of(choices)
    return st.one_of(*(st.lists(each, min_size=count, max_size=count) for each in [*choices, mixed])).map(made)
