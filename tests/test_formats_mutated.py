"""Damaged files of kohya, LyCORIS, diffusers and cloneofsimo: only loramgr's errors, never a wrong success."""

from __future__ import annotations

import json
import os
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from file_mutations import Content, mutated

from loramgr.adapter import Adapter, Hadamard, Kronecker, LowRank
from loramgr.errors import LoramgrError
from loramgr.formats import examine, read_adapter
from loramgr.tensorfile import TensorSpec

COUNT = 2000 if os.environ.get("LORAMGR_SOAK") else 200
BASE = {
    "blocks.0.q.weight": (6, 4),
    "blocks.0.k.weight": (6, 4),
    "conv.weight": (6, 4, 3, 3),
    "norm.weight": (5,),
}
SPECS = {name: TensorSpec(name, "F32", shape) for name, shape in BASE.items()}


def _pair(module: str, down: str, up: str, *, convolution: bool = False) -> dict[str, tuple[int, ...]]:
    kernel, ones = ((3, 3), (1, 1)) if convolution else ((), ())
    return {f"{module}{down}": (2, 4, *kernel), f"{module}{up}": (6, 2, *ones)}


SEEDS = {
    "kohya": Content(
        {
            **_pair("lora_unet_blocks_0_q", ".lora_down.weight", ".lora_up.weight"),
            **_pair("lora_unet_conv", ".lora_down.weight", ".lora_up.weight", convolution=True),
            "lora_unet_blocks_0_q.alpha": (),
            "lora_unet_blocks_0_q.dora_scale": (6, 1),
            "lora_unet_conv.alpha": (),
        },
        {"ss_network_dim": "2", "ss_tag_frequency": "{}"},
    ),
    "lycoris": Content(
        {
            "lycoris_blocks_0_q.hada_w1_a": (6, 3),
            "lycoris_blocks_0_q.hada_w1_b": (3, 4),
            "lycoris_blocks_0_q.hada_w2_a": (6, 3),
            "lycoris_blocks_0_q.hada_w2_b": (3, 4),
            "lycoris_blocks_0_q.alpha": (),
            "lycoris_blocks_0_k.lokr_w1": (2, 2),
            "lycoris_blocks_0_k.lokr_w2_a": (3, 5),
            "lycoris_blocks_0_k.lokr_w2_b": (5, 2),
            "lycoris_conv.diff": (6, 4, 3, 3),
            "lycoris_norm.w_norm": (5,),
        }
    ),
    "diffusers": Content(
        {
            **_pair("unet.blocks.0.q", ".lora_A.weight", ".lora_B.weight"),
            **_pair("unet.conv", ".lora_A.weight", ".lora_B.weight", convolution=True),
        },
        {"lora_adapter_metadata": json.dumps({"unet.peft_type": "LORA", "unet.r": 2, "unet.lora_alpha": 4})},
    ),
    "diffusers-old": Content(
        {
            **_pair("blocks.0.processor.q", "_lora.down.weight", "_lora.up.weight"),
            **_pair("blocks.0.k", ".lora.down.weight", ".lora.up.weight"),
        }
    ),
    "cloneofsimo": Content(
        {**_pair("unet:0:", "down", "up"), **_pair("unet:1:", "down", "up"), "<s>": (4,)},
        {"unet": '["A"]', "unet:0:rank": "2", "unet:1:rank": "2", "<s>": "<embed>"},
    ),
}
SURE = {"doubled", "huge", "huge_header", "cut"}  # what no reader may take for an adapter


def _check(adapter: Adapter, file: bytes, name: str) -> None:
    """A success must explain every tensor, with factors that fit each other."""
    assert name not in SURE
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    assert set(adapter.tensors) == set(header) - {"__metadata__"}
    used = {view.spec.name for update in adapter.updates.values() for view in update.views()}
    assert {name for name in adapter.tensors if not name.endswith((".alpha", ".on_input"))} == used
    for update in adapter.updates.values():
        if isinstance(update, LowRank):
            assert update.lora_A.spec.shape[0] == update.lora_B.spec.shape[1] == update.rank
        if isinstance(update, Hadamard):
            assert update.w1_a.spec.shape == update.w2_a.spec.shape
        if isinstance(update, Kronecker) and len(update.w2) == 2:
            assert update.w2[0].spec.shape[1] == update.w2[1].spec.shape[0]


@pytest.mark.parametrize("kind", SEEDS)
def test_the_seed_itself_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "seed.safetensors"
    path.write_bytes(SEEDS[kind].encoded())
    adapter = read_adapter(path)
    assert adapter.format == kind.partition("-")[0]
    _check(adapter, path.read_bytes(), "seed")


@pytest.mark.parametrize("kind", SEEDS)
def test_damage_is_an_error_of_loramgr_or_explained(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "damaged.safetensors"
    outcomes = {"read": 0, "refused": 0}
    read_adapter(_written(path, SEEDS[kind].encoded()))  # what is imported and cached is not counted as memory
    tracemalloc.start()
    for number, (name, file) in enumerate(mutated(SEEDS[kind], COUNT, seed=17)):
        _written(path, file)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            adapter = read_adapter(path)
        except LoramgrError:
            outcomes["refused"] += 1
        else:
            _check(adapter, file, name)
            examine(adapter)
            _resolve(adapter)
            outcomes["read"] += 1
        assert tracemalloc.get_traced_memory()[1] - before <= 40 * len(file) + (1 << 20), (number, name)
    tracemalloc.stop()
    assert outcomes["refused"] > COUNT / 2


def _written(path: Path, file: bytes) -> Path:
    path.write_bytes(file)
    return path


def _resolve(adapter: Adapter) -> None:
    with suppress(LoramgrError):
        adapter.resolved(SPECS, None)
