"""Residuals that an earlier version made are still undone, bit for bit; a change of the numerics breaks this file.

`python tests/test_residual_golden.py` writes the file anew, which a change of a version in an `Origin` calls for.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramgr.algebra import engine
from loramgr.algebra.engine import Change, ExactTerms
from loramgr.algebra.factors import Factors
from loramgr.algebra.fast import WEIGHT_DTYPES
from loramgr.algebra.packing import pack, unpack
from loramgr.algebra.terms import LowRankTerm
from loramgr.tensors import as_bytes, dtype_name

GOLDEN = Path(__file__).parent / "golden" / "residuals-0001.safetensors"
EXACT = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CASES = [("fast", dtype_name(dtype)) for dtype in WEIGHT_DTYPES] + [("exact", dtype_name(dtype)) for dtype in EXACT]
SCALING = 1.3


def change_of(numerics: str, left: torch.Tensor, right: torch.Tensor) -> Change:
    if numerics == "fast":
        return Factors(left, right, SCALING)
    return ExactTerms((LowRankTerm(left, right, SCALING),))


def digest(tensor: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(as_bytes(tensor)).digest()), dtype=torch.uint8)


@pytest.mark.parametrize(("numerics", "dtype"), CASES)
def test_an_old_residual_gives_the_weight_back(numerics: str, dtype: str) -> None:
    prefix = f"{numerics}.{dtype}."
    found = load_file(GOLDEN)
    parts = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    weight = parts.pop("merged")
    engine.unmerge_(weight, change_of(numerics, found["left"], found["right"]), unpack(parts))
    assert torch.equal(digest(weight), parts["sha256"])


def write() -> None:
    """Write the golden file."""
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(20, 3, generator=generator), torch.randn(3, 50, generator=generator) / 2000
    tensors = {"left": left, "right": right}
    for numerics, name in CASES:
        dtype = next(each for each in (*WEIGHT_DTYPES, *EXACT) if dtype_name(each) == name)
        weight = (torch.randn(20, 50, generator=generator) / 50).to(dtype)
        weight[0, :4] = torch.tensor([0.0, -0.0, float("nan"), 1e-7]).to(dtype)
        merged = weight.clone()
        kept = engine.merge_(merged, change_of(numerics, left, right), residual=True).residual
        assert kept is not None
        packed = {"merged": merged, "sha256": digest(weight), **pack(engine.portable(kept))}
        tensors |= {f"{numerics}.{name}.{part}": tensor for part, tensor in packed.items()}
    save_file(tensors, GOLDEN)


if __name__ == "__main__":
    write()
