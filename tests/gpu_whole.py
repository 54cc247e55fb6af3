"""Whole merges on real GPUs, on disk and in memory, one and several at once: to be run by hand where there are some.

    python -m pytest tests/gpu_whole.py

It needs no more than the package, Triton and pytest.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, MergeOptions, Workspace
from loramgr.errors import LoramgrError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
WIDTH = 520
NAMES = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(4) for part in "qkvo"]
DEVICES = [f"cuda:{at}" for at in range(torch.cuda.device_count())]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base in bfloat16, two adapters, and a home that knows them."""
    root = tmp_path_factory.mktemp("gpu")
    torch.manual_seed(5)
    (root / "base").mkdir()
    weights = {name: (torch.randn(WIDTH, WIDTH) * 0.02).bfloat16() for name in NAMES}
    save_file(weights, root / "base" / "model.safetensors", {"format": "pt"})
    (root / "base" / "config.json").write_text('{"model_type": "llama"}')
    workspace = Workspace(root / "home")
    workspace.base_add(root / "base", "base")
    for adapter, parts, rank in (("few", "qv", 4), ("all", "qkvo", 16)):
        (root / adapter).mkdir()
        factors = {}
        for name in NAMES:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if module[-6] in parts:
                factors[f"{module}.lora_A.weight"] = torch.randn(rank, WIDTH) * 0.02
                factors[f"{module}.lora_B.weight"] = torch.randn(WIDTH, rank) * 0.03 / rank**0.5
        save_file(factors, root / adapter / "adapter_model.safetensors", {"format": "pt"})
        targets = ", ".join(f'"{part}_proj"' for part in parts)
        (root / adapter / "adapter_config.json").write_text(
            f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {2 * rank}, "target_modules": [{targets}]}}'
        )
        workspace.add(root / adapter, AddOptions(base="base"))
    return root


@pytest.fixture
def workspace(world: Path, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(world / "home", tmp_path / "home"))


def state(world: Path, devices: list[str]) -> dict[str, torch.Tensor]:
    found = load_file(world / "base" / "model.safetensors")
    return {name: found[name].to(devices[at % len(devices)]) for at, name in enumerate(sorted(found))}


def test_exact_merges_have_the_bits_of_the_cpu(workspace: Workspace, tmp_path: Path) -> None:
    digests = {
        workspace.merge("base", ["all", "few=0.5"], tmp_path / device, MergeOptions(device=device)).output_digest
        for device in ("cpu", "auto", *DEVICES)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_in_place_switched_and_back(workspace: Workspace, world: Path, tmp_path: Path, numerics: str) -> None:
    model, options = tmp_path / "model", MergeOptions(numerics=numerics)
    shutil.copytree(world / "base", model)
    assert workspace.merge_in_place(str(model), ["all"], options).kernel == "triton"
    assert workspace.verify_merge(model).ok
    assert workspace.switch(model, ["few"], options).kernel == "triton"
    assert workspace.unmerge(model).source == "residual"
    workspace.merge_in_place(str(model), ["all"], options)
    assert workspace.unmerge(model, tmp_path / "back", device="cpu").exact


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("devices", [DEVICES[:1], DEVICES], ids=["one", "all"])
def test_a_live_model_comes_back(workspace: Workspace, world: Path, devices: list[str], numerics: str) -> None:
    weights, before = state(world, devices), state(world, devices)
    places = {name: weight.data_ptr() for name, weight in weights.items()}
    live = workspace.attach(weights, base="base", numerics=numerics)
    live.merge("all")
    for turn in range(4 if not os.environ.get("LORAMGR_SOAK") else 1000):
        live.switch(["few", "all"][turn % 2])
    assert live.verify().ok
    live.unmerge()
    for name, weight in weights.items():
        assert torch.equal(weight.view(torch.int16), before[name].view(torch.int16)), name
        assert weight.data_ptr() == places[name]


def test_a_captured_graph_sees_the_merged_weights(workspace: Workspace, world: Path) -> None:
    weights, inputs = state(world, DEVICES[:1]), torch.randn(4, WIDTH, device="cuda", dtype=torch.bfloat16)
    live, weight = workspace.attach(weights, base="base"), weights[NAMES[0]]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        inputs @ weight.T
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = inputs @ weight.T
    graph.replay()
    before = outputs.clone()
    live.merge("all")
    graph.replay()
    assert torch.equal(outputs, inputs @ weight.T)
    assert not torch.equal(outputs, before)
    live.unmerge()
    graph.replay()
    assert torch.equal(outputs, before)


def test_too_little_memory_is_told_before_a_weight_changes(workspace: Workspace, tmp_path: Path) -> None:
    width, name = 8192, NAMES[0]
    module = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": torch.randn(1, width), f"{module}.lora_B.weight": torch.randn(width, 1)}
    (tmp_path / "large").mkdir()
    save_file(factors, tmp_path / "large" / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "large" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}'
    )
    weight = torch.randn(width, width).bfloat16().to(DEVICES[0])
    before = weight.cpu()
    live = workspace.attach({name: weight})
    ready = live.prepare(str(tmp_path / "large"))
    held, size = [], 1 << 33
    while size >= 1 << 20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device=DEVICES[0]))
        except torch.OutOfMemoryError:
            size //= 2
    with pytest.raises(LoramgrError, match="the way back to the base takes"):
        live.merge(ready)
    assert not live.merged
    del held
    torch.cuda.empty_cache()
    assert torch.equal(weight.cpu(), before)
    live.merge(ready)
    assert live.verify().ok
