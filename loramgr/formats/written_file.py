"""A safetensors file written tensor by tensor, out of views."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loramgr.tensorfile import TensorSpec, TensorView, encode_header

__all__ = ["write_safetensors"]


def write_safetensors(path: Path, views: Mapping[str, TensorView], metadata: dict[str, str] | None) -> None:
    """Write the tensors by their names, sorted; one is in memory at a time."""
    names = sorted(views)
    specs = [TensorSpec(name, views[name].spec.dtype, views[name].spec.shape) for name in names]
    with path.open("wb") as file:
        file.write(encode_header(specs, metadata))
        for name in names:
            file.write(views[name].read_bytes())
