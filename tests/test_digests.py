"""The texts that digests are taken of are those that RFC 8785 prescribes."""

from __future__ import annotations

import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from loramgr.digests import TensorDigest, parse_tensor_lines, tensor_lines

NAMES = st.text(st.characters(exclude_categories=["Cs"]))
TENSORS = st.builds(TensorDigest, NAMES, st.sampled_from(["F32", "BF16"]), st.tuples(st.integers(0, 2**53 - 1)), NAMES)


@given(st.lists(TENSORS, unique_by=lambda tensor: tensor.name))
def test_tensor_lines_are_canonical_json(tensors: list[TensorDigest]) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.name.encode())
    expected = b"".join(rfc8785.dumps([t.name, t.dtype, list(t.shape), t.sha256]) + b"\n" for t in ordered)
    assert tensor_lines(tensors) == expected


@given(st.lists(TENSORS, unique_by=lambda tensor: tensor.name))
def test_tensor_lines_are_read_back(tensors: list[TensorDigest]) -> None:
    assert parse_tensor_lines(tensor_lines(tensors)) == {tensor.name: tensor for tensor in tensors}
