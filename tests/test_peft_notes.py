from __future__ import annotations

from pathlib import Path

import pytest
from peft_files import PLAIN, write_adapter

from loramgr.formats import read_adapter

LAYER = {"m.layers.1.q.lora_A.weight": (2, 4), "m.layers.1.q.lora_B.weight": (6, 2)}


@pytest.mark.parametrize(
    ("shapes", "config", "named"),
    [
        (PLAIN, {"target_modules": ["q", "v", "v", "m.q"]}, ["the target module 'v'"]),
        (PLAIN, {"target_modules": ["uq", "proj"]}, ["the target module 'uq'", "the target module 'proj'"]),
        (PLAIN, {"target_modules": ["q", "m.head", "n.head"], "exclude_modules": ["head"]}, []),
        (PLAIN, {"target_modules": ["q", "head", "v"], "exclude_modules": "h.*"}, ["the target module 'v'"]),
        (PLAIN, {"target_modules": "all-linear"}, []),
        (PLAIN, {"target_modules": r".*\.q"}, []),
        (PLAIN, {"target_modules": "q"}, ["the target modules 'q'"]),
        (PLAIN, {"target_modules": None}, []),
        (PLAIN, {"modules_to_save": ["classifier", "score", "pooler", "pooler"]}, ["the saved module 'pooler'"]),
        ({**PLAIN, "b.pooler.dense.weight": (4, 4)}, {"modules_to_save": ["pooler"]}, []),
        (LAYER, {"layers_to_transform": [0, 1, 2]}, ["layer 0", "layer 2"]),
        (LAYER, {"layers_to_transform": 1}, []),
        (PLAIN, {"trainable_token_indices": [3]}, ["trained tokens"]),
    ],
)
def test_what_the_file_lacks_is_said(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, object], named: list[str]
) -> None:
    adapter = read_adapter(write_adapter(tmp_path, shapes, **config))
    assert list(adapter.warnings) == [
        f"The configuration names {name}, and the file holds no tensors for it." for name in named
    ]
