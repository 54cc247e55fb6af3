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


@pytest.mark.parametrize("device", DEVICES[:2])
def test_too_little_memory_is_told_before_a_weight_changes(workspace: Workspace, tmp_path: Path, device: str) -> None:
    width, name = 8192, NAMES[0]
    module = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": torch.randn(1, width), f"{module}.lora_B.weight": torch.randn(width, 1)}
    (tmp_path / "large").mkdir()
    save_file(factors, tmp_path / "large" / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "large" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}'
    )
    weight = torch.randn(width, width).bfloat16().to(device)
    before = weight.cpu()
    live = workspace.attach({name: weight})
    ready = live.prepare(str(tmp_path / "large"))
    held, size = [], 1 << 33
    while size >= 1 << 20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            size //= 2
    with pytest.raises(LoramgrError, match=f"{device}: the way back to the base takes"):
        live.merge(ready)
    assert not live.merged
    del held
    torch.cuda.empty_cache()
    assert torch.equal(weight.cpu(), before)
    live.merge(ready)
    assert live.verify().ok


two_gpus = pytest.mark.skipif(len(DEVICES) < 2, reason="there are fewer than two GPUs")


class Layers(torch.nn.Module):
    """Some of the base's weights as the parameters of a module."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            setattr(module, leaf, torch.nn.Parameter(weight, requires_grad=False))


def same(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    found = dict(model.named_parameters())
    return all(torch.equal(found[n].cpu().view(torch.int16), w.cpu().view(torch.int16)) for n, w in expected.items())


@two_gpus
@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("current", [0, 1])
def test_two_gpus_make_the_bits_of_one(workspace: Workspace, world: Path, current: int, numerics: str) -> None:
    alone, apart = Layers(state(world, DEVICES[:1])), Layers(state(world, DEVICES[:2]))
    lives = [workspace.attach(model, base="base", numerics=numerics) for model in (alone, apart)]
    with torch.cuda.device(current):
        for refs in (["all"], ["few"], ["all", "few=0.5"], ["few"]):
            reports = [live.switch(*refs) for live in lives]
            assert reports[0].kernels == reports[1].kernels
            assert same(apart, dict(alone.named_parameters()))
        assert torch.cuda.current_device() == current
    assert {str(each.device) for each in apart.parameters()} == set(DEVICES[:2])
    assert lives[1].verify().ok
    lives[1].unmerge()
    assert same(apart, state(world, ["cpu"]))


@two_gpus
def test_tiles_that_overflow_on_either_gpu_are_kept_whole(workspace: Workspace, world: Path, tmp_path: Path) -> None:
    weights = state(world, DEVICES[:2])
    for weight in weights.values():
        weight[:64, :64] = 0
    before = {name: weight.cpu() for name, weight in weights.items()}
    live = workspace.attach(weights)
    live.merge("all", force=True)
    merged = {name: weight.cpu() for name, weight in weights.items()}
    live.switch("few", force=True)
    live.switch("all", force=True)
    for name, weight in weights.items():
        assert torch.equal(weight.cpu().view(torch.int16), merged[name].view(torch.int16)), name
    assert live.verify().ok
    live.unmerge()
    for name, weight in weights.items():
        assert torch.equal(weight.cpu().view(torch.int16), before[name].view(torch.int16)), name


@two_gpus
def test_streams_of_both_gpus_see_the_weights_in_order(workspace: Workspace, world: Path) -> None:
    weights, inputs = state(world, DEVICES[:2]), [torch.randn(4, WIDTH, device=d).bfloat16() for d in DEVICES[:2]]
    live = workspace.attach(weights, base="base")
    tasks = [live.prepare("all"), live.prepare("few")]
    names = [next(name for name, weight in weights.items() if str(weight.device) == device) for device in DEVICES[:2]]
    wanted = []
    for task in tasks:
        live.switch(task)
        torch.cuda.synchronize(DEVICES[0])
        torch.cuda.synchronize(DEVICES[1])
        wanted.append([given @ weights[name].T for given, name in zip(inputs, names, strict=True)])
    streams = [torch.cuda.Stream(device) for device in DEVICES[:2]]
    for stream in streams:
        stream.wait_stream(torch.cuda.default_stream(stream.device))
    for turn in range(20):
        with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):
            live.switch(tasks[turn % 2])
            found = [given @ weights[name].T for given, name in zip(inputs, names, strict=True)]
        for stream in streams:
            stream.synchronize()
        assert all(map(torch.equal, found, wanted[turn % 2]))


@two_gpus
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_a_model_that_moved_to_another_gpu_comes_back(workspace: Workspace, world: Path, numerics: str) -> None:
    model = Layers(state(world, DEVICES[:1]))
    live = workspace.attach(model, base="base", numerics=numerics)
    live.merge("all")
    model.to(DEVICES[1])
    live.switch("few")
    model.to(DEVICES[0])
    assert live.verify().ok
    model.to(DEVICES[1])
    live.unmerge()
    assert same(model, state(world, ["cpu"]))


def test_a_model_that_moved_to_the_cpu_says_where_to_go(workspace: Workspace, world: Path) -> None:
    model = Layers(state(world, DEVICES[:1]))
    live = workspace.attach(model, base="base", prove=False)
    live.merge("all")
    model.to("cpu")
    with pytest.raises(LoramgrError, match="was moved to cpu since it was merged into on cuda:0"):
        live.unmerge()
    model.to(DEVICES[0])
    live.unmerge()
    assert same(model, state(world, ["cpu"]))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str
)
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_float8_weights_have_the_bits_of_the_cpu(
    workspace: Workspace, world: Path, dtype: torch.dtype, numerics: str
) -> None:
    places = {"cpu": state(world, ["cpu"]), "cuda": state(world, DEVICES[:1])}
    found = {}
    for place, weights in places.items():
        small = {name: weight.to("cpu").to(dtype).to(weight.device) for name, weight in weights.items()}
        before = {name: weight.cpu().view(torch.uint8) for name, weight in small.items()}
        live = workspace.attach(small, numerics=numerics)
        live.merge("all", force=True)
        live.switch("few", force=True)
        live.switch("all", force=True)
        found[place] = {name: weight.cpu().view(torch.uint8).clone() for name, weight in small.items()}
        live.unmerge()
        assert all(torch.equal(small[name].cpu().view(torch.uint8), before[name]) for name in small)
    assert all(torch.equal(found["cpu"][name], found["cuda"][name]) for name in found["cpu"])
