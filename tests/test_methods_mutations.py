"""Damaged files of every method: readers raise loramgr's own errors, and nothing that is read holds too much."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramgr.errors import LoramgrError
from loramgr.formats import read_adapter

SHAPES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "ia3": ({"peft_type": "IA3", "target_modules": ["q"], "feedforward_modules": []}, {"m.q.ia3_l": (6, 1)}),
    "loha": (
        {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["q"]},
        {"m.q.hada_w1_a": (6, 2), "m.q.hada_w1_b": (2, 4), "m.q.hada_w2_a": (6, 2), "m.q.hada_w2_b": (2, 4)},
    ),
    "lokr": (
        {"peft_type": "LOKR", "r": 2, "alpha": 4, "target_modules": ["q"]},
        {"m.q.lokr_w1": (2, 2), "m.q.lokr_w2_a": (3, 2), "m.q.lokr_w2_b": (2, 2)},
    ),
    "vera": (
        {"peft_type": "VERA", "r": 2, "target_modules": ["q"]},
        {
            "m.q.vera_lambda_b": (6,), "m.q.vera_lambda_d": (2,),
            "!base_model.vera_A": (2, 4), "!base_model.vera_B": (6, 2),
        },
    ),
    "adalora": (
        {"peft_type": "ADALORA", "init_r": 2, "r": 2, "lora_alpha": 4, "target_modules": ["q"]},
        {"m.q.lora_A": (2, 4), "m.q.lora_B": (6, 2), "m.q.lora_E": (2, 1)},
    ),
    "oft": ({"peft_type": "OFT", "oft_block_size": 2, "target_modules": ["q"]}, {"m.q.oft_R.weight": (2, 1)}),
    "boft": (
        {"peft_type": "BOFT", "boft_block_size": 2, "target_modules": ["q"]},
        {"m.q.boft_R": (1, 2, 2, 2), "m.q.boft_s": (6, 1)},
    ),
    "ln_tuning": ({"peft_type": "LN_TUNING", "target_modules": ["q"]}, {"m.q.ln_tuning_layers.weight": (6,)}),
    "experts": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": ["e.down_proj"]},
        {"m.e.lora_A.weight": (6, 4), "m.e.lora_B.weight": (5, 6)},
    ),
    "attention": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a"]},
        {
            "a.lora_A.weight": (2, 4), "a.lora_B.weight": (12, 2),
            "a.base_layer.out_proj.lora_A.weight": (2, 4), "a.base_layer.out_proj.lora_B.weight": (4, 2),
        },
    ),
    "blocks": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"],
         "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q"]}},
        {"m.q.lora_A.weight": (2, 2), "m.q.lora_B.weight": (6, 2)},
    ),
    "slices": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "enable_lora": [True, False, True]},
        {"m.q.lora_A.weight": (4, 4), "m.q.lora_B.weight": (8, 2, 1)},
    ),
    "prompt": ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, {"!prompt_embeddings": (2, 4)}),
    "difference": (
        {"loramgr_difference": 1, "method": "full", "base_digest": "sha256:" + "0" * 64},
        {"!whole:m.q.weight": (6, 4)},
    ),
}  # fmt: skip
VALUES = [None, True, 0, -1, 2**70, 1.5, "", "x", "(", [], [1], ["q"], [[]], {}, {"q": 1}, {"q": []}, {"(": 3}]


def _folder(path: Path, name: str) -> Path:
    config, shapes = SHAPES[name]
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = {key[1:] if key[0] == "!" else f"base_model.model.{key}": torch.randn(s) for key, s in shapes.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def _read(folder: Path) -> bool:
    """Read the adapter and all that it is made of; say whether it could be read."""
    try:
        adapter = read_adapter(folder)
        for update in adapter.updates.values():
            for view in update.views():
                assert tuple(view.load().shape) == view.spec.shape
                assert view.spec.elements <= 1 << 16
    except LoramgrError:
        return False
    return True


@pytest.mark.parametrize("name", list(SHAPES))
def test_damage_is_told(name: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "adapter", name)
    assert _read(folder)
    rng = random.Random(name)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(length)] ^= 1 << rng.randrange(8)
        weights.write_bytes(data)
        _read(folder)


@pytest.mark.parametrize("name", list(SHAPES))
def test_values_and_tensors_in_the_wrong_place_are_told(name: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "adapter", name)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    said = json.loads(config.read_text())
    keys = [*said, "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "modules_to_save", "peft_version"]
    for key in keys:
        for value in VALUES:
            config.write_text(json.dumps({**said, key: value}))
            _read(folder)
    config.write_text(json.dumps(said))
    tensors = load_file(weights)
    for first, other in itertools.product(tensors, tensors):
        save_file({**tensors, first: tensors[other].clone(), other: tensors[first].clone()}, weights)
        _read(folder)
    for first in tensors:
        save_file({key: value for key, value in tensors.items() if key != first} or {"x": torch.zeros(1)}, weights)
        assert not _read(folder) or name in ("attention", "prompt", "difference")
        for shape in [(), (0,), (1,), (3, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1)]:
            save_file({**tensors, first: torch.zeros(shape)}, weights)
            _read(folder)
        for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn, torch.bfloat16):
            save_file({**tensors, first: tensors[first].to(dtype)}, weights)
            _read(folder)
