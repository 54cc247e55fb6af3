"""Residuals that an earlier version made are still undone, bit for bit; a change of the numerics breaks this file.

`python tests/test_residual_golden.py` writes the files anew, which a change of a version in an `Origin` calls for.
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
from loramgr.algebra.float8 import FLOAT8
from loramgr.algebra.packing import pack, unpack
from loramgr.algebra.terms import LowRankTerm
from loramgr.tensors import as_bytes, dtype_name

GOLDEN = Path(__file__).parent / "golden"
WIDE = (torch.float32, torch.bfloat16, torch.float16)
OCP = (torch.float8_e4m3fn, torch.float8_e5m2)
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
FILES: dict[str, list[tuple[str, torch.dtype]]] = {
    "residuals-0001": [("fast", dtype) for dtype in (*WIDE, *OCP)]
    + [("exact", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)],
    "residuals-0002": [("fast", dtype) for dtype in FNUZ] + [("exact", dtype) for dtype in (*OCP, *FNUZ)],
}
CASES = [(file, numerics, dtype) for file, cases in FILES.items() for numerics, dtype in cases]
SCALING = 1.3


def change_of(numerics: str, left: torch.Tensor, right: torch.Tensor) -> Change:
    if numerics == "fast":
        return Factors(left, right, SCALING)
    return ExactTerms((LowRankTerm(left, right, SCALING),))


def digest(tensor: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(as_bytes(tensor)).digest()), dtype=torch.uint8)


@pytest.mark.parametrize(("file", "numerics", "dtype"), CASES, ids=str)
def test_an_old_residual_gives_the_weight_back(file: str, numerics: str, dtype: torch.dtype) -> None:
    prefix = f"{numerics}.{dtype_name(dtype)}."
    found = load_file(GOLDEN / f"{file}.safetensors")
    parts = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    weight = parts.pop("merged")
    engine.unmerge_(weight, change_of(numerics, found["left"], found["right"]), unpack(parts))
    assert torch.equal(digest(weight), parts["sha256"])


def test_every_float8_dtype_has_its_residuals() -> None:
    for numerics in ("fast", "exact"):
        assert set(FLOAT8) <= {dtype for _, other, dtype in CASES if other == numerics}


def write(file: str) -> None:
    """Write a golden file."""
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(20, 3, generator=generator), torch.randn(3, 50, generator=generator) / 2000
    tensors = {"left": left, "right": right}
    for numerics, dtype in FILES[file]:
        weight = (torch.randn(20, 50, generator=generator) / 50).to(dtype)
        weight[0, :4] = torch.tensor([0.0, -0.0, float("nan"), 1e-7]).to(dtype)
        merged = weight.clone()
        kept = engine.merge_(merged, change_of(numerics, left, right), residual=True).residual
        assert kept is not None
        packed = {"merged": merged, "sha256": digest(weight), **pack(engine.portable(kept))}
        tensors |= {f"{numerics}.{dtype_name(dtype)}.{part}": tensor for part, tensor in packed.items()}
    save_file(tensors, GOLDEN / f"{file}.safetensors")


if __name__ == "__main__":
    for name in FILES:
        write(name)
