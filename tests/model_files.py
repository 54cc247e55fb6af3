"""Small model folders on disk, for tests: safetensors and pickles with few bytes, sharded or not."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramgr.tensorfile import TensorSpec, encode_header


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> Path:
    """Write float32 tensors that count up, so that every tensor and every value differs."""
    specs = [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]
    count = sum(spec.nbytes for spec in specs) // 4
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_header(specs, None) + struct.pack(f"<{count}f", *range(count)))
    return path


def write_shards(
    folder: Path, shards: Mapping[str, Mapping[str, tuple[int, ...]]], weight_map: dict[str, Any] | None = None
) -> Path:
    """Write shards and their index and return the folder; `weight_map` stands in for the true one."""
    for file, shapes in shards.items():
        write_safetensors(folder / file, shapes)
    true_map = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {"total_size": 1}, "weight_map": true_map if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
