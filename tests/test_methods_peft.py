"""What PEFT writes for its methods beside LoRA, merged and compared with the live layers in float64."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, IncompatibleError, MergeOptions, ResizeOptions, Workspace

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these tests do on purpose


class Toy(torch.nn.Module):
    """A linear layer with and one without bias, a Conv1D of transformers, an embedding, a convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb = torch.nn.Embedding(12, 8)
        self.lin = torch.nn.Linear(8, 12)
        self.square = torch.nn.Linear(12, 12, bias=False)
        self.c_fc = Conv1D(16, 12)
        self.conv = torch.nn.Conv2d(16, 8, 3, padding=1)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(self.square(torch.tanh(self.lin(self.emb(tokens)))))
        x = self.conv(torch.tanh(x).transpose(1, 2)[..., None].expand(-1, -1, -1, 4))
        out: torch.Tensor = self.norm(x.flatten(2).transpose(1, 2))
        return out


def trained(config: Any, scale: float = 0.2) -> tuple[Toy, Any]:
    """Return the base and PEFT's model of it, with random values in every trainable parameter."""
    from peft import get_peft_model

    torch.manual_seed(3)
    base = Toy()
    live = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return base, live.eval()


def save_base(folder: Path, base: torch.nn.Module) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in base.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def live_weights(live: Any) -> dict[str, torch.Tensor]:
    """Return the weights that PEFT merges in float64, by their names in the base."""
    merged = live.double().merge_and_unload()
    return dict(merged.state_dict())


def merge(tmp_path: Path, base: torch.nn.Module, live: Any) -> dict[str, torch.Tensor]:
    """Merge through the use case, take the merge out again, and return the merged tensors."""
    live.save_pretrained(tmp_path / "adapter")
    workspace = Workspace(tmp_path / "home")
    record = workspace.base_add(save_base(tmp_path / "base", base), "base")
    workspace.add(tmp_path / "adapter", AddOptions(name="adapter", base="base"))
    workspace.merge("base", ["adapter"], tmp_path / "merged")
    assert workspace.verify_merge(tmp_path / "merged").ok
    assert workspace.unmerge(tmp_path / "merged", tmp_path / "restored").base_digest == record.digest
    restored, original = (tmp_path / each / "model.safetensors" for each in ("restored", "base"))
    assert restored.read_bytes() == original.read_bytes()
    return load_file(tmp_path / "merged" / "model.safetensors")


def _configs() -> dict[str, Callable[[], Any]]:
    import peft

    layers = ["lin", "square", "conv"]
    every = [*layers, "c_fc"]
    return {
        "ia3": lambda: peft.IA3Config(target_modules=every, feedforward_modules=[]),
        "ia3-feedforward": lambda: peft.IA3Config(target_modules=every, feedforward_modules=every),
        "ia3-mixed-saved": lambda: peft.IA3Config(
            target_modules=["lin", "c_fc"], feedforward_modules=["c_fc"], modules_to_save=["norm"]
        ),
        "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=layers, init_weights=False),
        "loha-tucker": lambda: peft.LoHaConfig(
            r=3, alpha=2, target_modules=layers, use_effective_conv2d=True, init_weights=False,
            rank_pattern={"lin": 2}, alpha_pattern={"lin": 7},
        ),
        "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=layers, init_weights=False),
        "lokr-both": lambda: peft.LoKrConfig(
            r=1, alpha=3, target_modules=layers, decompose_both=True, decompose_factor=4, init_weights=False
        ),
        "lokr-whole": lambda: peft.LoKrConfig(r=64, alpha=32, target_modules=layers, init_weights=False),
        "lokr-tucker": lambda: peft.LoKrConfig(
            r=1, alpha=3, target_modules=layers, use_effective_conv2d=True, decompose_factor=2, init_weights=False
        ),
        "vera": lambda: peft.VeraConfig(r=5, target_modules=["lin", "square", "c_fc"], init_weights=False),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=3, target_modules=every, total_step=10, init_lora_weights=False
        ),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=layers, init_weights=False),
        "oft-exact": lambda: peft.OFTConfig(
            r=2, oft_block_size=0, target_modules=layers, init_weights=False, use_cayley_neumann=False
        ),
        "oft-shared": lambda: peft.OFTConfig(
            oft_block_size=4, target_modules=layers, block_share=True, init_weights=False, num_cayley_neumann_terms=3
        ),
        "oft-embedding": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["emb"], init_weights=False),
        "oft-constrained": lambda: peft.OFTConfig(
            oft_block_size=4, target_modules=layers, coft=True, eps=0.3, init_weights=False
        ),
        "miss": lambda: peft.MissConfig(r=5, target_modules=["lin", "square"]),
        "miss-mini": lambda: peft.MissConfig(r=4, mini_r=3, target_modules=["lin", "square"], init_weights="mini"),
        "hra": lambda: peft.HRAConfig(r=3, target_modules=layers, init_weights=False),
        "hra-orthonormal": lambda: peft.HRAConfig(r=4, target_modules=layers, apply_GS=True),
        "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=["lin", "square"]),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=layers, init_weights=False),
        "boft-bias": lambda: peft.BOFTConfig(boft_block_num=2, boft_block_size=0, target_modules=["lin"], bias="all"),
        "ln-tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    }  # fmt: skip


METHODS = {"ln-tuning": "ln_tuning"}


@pytest.mark.parametrize("name", list(_configs()))
def test_merged_as_the_live_layer(name: str, tmp_path: Path) -> None:
    base, live = trained(_configs()[name]())
    merged = merge(tmp_path, base, live)
    method = METHODS.get(name, name.partition("-")[0])
    version = Workspace(tmp_path / "home").inspect("adapter")
    assert (version.method, version.format, version.mergeable) == (method, "peft", True)
    expected = live_weights(live)
    changed = 0
    for key, tensor in base.state_dict().items():
        apart = (merged[key].double() - expected[key]).abs().max()
        assert apart <= 2.0**-24 * expected[key].abs().max() + 1e-7, key
        changed += not torch.equal(merged[key], tensor)
    assert changed >= len(set(version.target_modules))


def test_prompt_methods_are_kept_and_refused(tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
    from peft_files import tiny_llama

    workspace = Workspace(tmp_path / "home")
    tiny_llama().save_pretrained(tmp_path / "base")
    workspace.base_add(tmp_path / "base", "base")
    configs = {
        "prompt_tuning": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "prefix_tuning": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "p_tuning": PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", encoder_hidden_size=8),
    }
    for method, config in configs.items():
        get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / method)
        added = workspace.add(tmp_path / method, AddOptions(base="base"))
        assert added.method == method
        assert any("not to be merged" in warning for warning in added.warnings)
        report = workspace.inspect(method)
        assert not report.mergeable
        assert "changes no weight" in str(report.reason)
        acts: list[Callable[[], object]] = [
            lambda name=method: workspace.merge("base", [name], tmp_path / "merged"),  # type: ignore[misc]
            lambda name=method: workspace.compose([(name, 0.5)], "combined"),  # type: ignore[misc]
            lambda name=method: workspace.resize(name, ResizeOptions(rank=1)),  # type: ignore[misc]
        ]
        for act in acts:
            with pytest.raises(IncompatibleError, match="changes no weight"):
                act()
        assert workspace.diff(method, method).summary is not None


FOUND = Path(__file__).parents[2] / "shared" / "data" / "found"
REGRESSIONS = {
    "lora_mlp": "mlp", "lora_mlp_modules_to_save": "mlp", "ia3_mlp": "mlp", "ia3_no_ff_mlp": "mlp",
    "adalora_mlp": "mlp", "lora_conv2d": "conv2d", "ia3_conv2d": "conv2d", "lora_emb_conv1d": "emb_conv1d",
}  # fmt: skip


def _toy_output(kind: str, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run the toy models of PEFT's regression tests on their input."""
    x = torch.arange(90).reshape(9, 10)
    if kind == "mlp":
        hidden = torch.relu(x.float() @ w["lin0.weight"].T + w["lin0.bias"])
        return torch.log_softmax(hidden @ w["lin1.weight"].T + w["lin1.bias"], -1)
    if kind == "conv2d":
        maps = torch.nn.functional.conv2d(x.float().reshape(2, 5, 3, 3), w["conv2d.weight"], w["conv2d.bias"])
        hidden = torch.relu(maps).flatten(1)
    else:
        hidden = torch.relu(w["emb.weight"][x] @ w["conv1d.weight"] + w["conv1d.bias"]).flatten(1)
    return torch.log_softmax(hidden @ w["lin0.weight"].T + w["lin0.bias"], -1)


@pytest.mark.skipif(not FOUND.is_dir(), reason="the real inputs are not beside this checkout")
@pytest.mark.parametrize("name", list(REGRESSIONS))
def test_regression_outputs_of_peft(name: str, tmp_path: Path) -> None:
    kind = REGRESSIONS[name]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes((FOUND / f"toy-base-{kind}.safetensors").read_bytes())
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(tmp_path / "base", "base")
    folder = FOUND / f"peft-regression-{name}"
    workspace.add(folder, AddOptions(name="adapter", base="base"))
    workspace.merge("base", ["adapter"], tmp_path / "merged")
    output = _toy_output(kind, load_file(tmp_path / "merged" / "model.safetensors"))
    expected = torch.load(folder / "output.pt", map_location="cpu", weights_only=True)
    # the output of adalora_mlp goes up to 200, where float32 has steps of 1.5e-5
    assert (output - expected).abs().max() <= (1e-6 * expected.abs().max() if name == "adalora_mlp" else 2e-5)


def test_bottleneck_adapters_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "sst"
    folder.mkdir()
    config = {
        "config": {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16},
        "hidden_size": 8, "model_name": "bert-base-uncased", "model_type": "bert", "name": "sst", "version": "1.0.0",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    down = {"bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight": torch.ones(2, 8)}
    torch.save(down, folder / "pytorch_adapter.bin")
    workspace = Workspace(tmp_path / "home")
    added = workspace.add(folder)
    assert (added.method, added.format) == ("bottleneck", "adapterhub")
    report = workspace.inspect("sst")
    assert not report.mergeable
    assert "bottleneck" in str(report.reason)
    workspace.export("sst", tmp_path / "out")
    assert (tmp_path / "out" / "pytorch_adapter.bin").read_bytes() == (folder / "pytorch_adapter.bin").read_bytes()


def test_methods_are_switched_in_place(tmp_path: Path) -> None:
    configs = _configs()
    workspace = Workspace(tmp_path / "home")
    base, _ = trained(configs["loha"]())
    record = workspace.base_add(save_base(tmp_path / "base", base), "base")
    names = ["loha", "ia3", "oft", "vera"]
    for name in names:
        trained(configs[name]())[1].save_pretrained(tmp_path / name)
        workspace.add(tmp_path / name, AddOptions(base="base"))
        workspace.merge("base", [name], tmp_path / f"merged-{name}")
    workspace.merge("base", ["loha"], tmp_path / "served", MergeOptions(reversible=True))
    for name in [*names[1:], "loha"]:
        workspace.switch(tmp_path / "served", [name])
        served, fresh = (load_file(tmp_path / each / "model.safetensors") for each in ("served", f"merged-{name}"))
        assert all(torch.equal(served[key], fresh[key]) for key in fresh), name
    workspace.merge("base", ["loha=0.5", "ia3", "vera=-1"], tmp_path / "sum")
    assert workspace.verify_merge(tmp_path / "sum").ok
    assert workspace.unmerge(tmp_path / "served", tmp_path / "restored").base_digest == record.digest


def test_a_live_model_takes_every_method(tmp_path: Path) -> None:
    from transformers import GPT2Config

    configs = _configs()
    workspace = Workspace(tmp_path / "home")
    base, _ = trained(configs["loha"]())
    workspace.base_add(save_base(tmp_path / "base", base), "base")
    base.config = GPT2Config()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in ("loha", "lokr", "ia3", "boft", "vera"):
        trained(configs[name]())[1].save_pretrained(tmp_path / name)
        workspace.add(tmp_path / name, AddOptions(base="base"))
        workspace.merge("base", [name], tmp_path / f"merged-{name}")
        fresh = load_file(tmp_path / f"merged-{name}" / "model.safetensors")
        live = workspace.attach(base, base="base", numerics="exact")
        live.merge(name)
        assert all(torch.equal(base.state_dict()[key], fresh[key]) for key in fresh), name
        live.unmerge()
        assert all(torch.equal(base.state_dict()[key], before[key]) for key in before), name


def test_a_type_that_nobody_knows_is_kept_whole(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.q.places": torch.arange(6), "base_model.model.q.mask": torch.ones(3, dtype=torch.bool),
        "base_model.model.q.scale": torch.ones(4).to(torch.float8_e4m3fn), "step": torch.tensor(3),
    }  # fmt: skip
    for suffix, save in (("safetensors", save_file), ("bin", torch.save)):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LATER", "r": 2, "task_type": 7}')
        save(tensors, folder / f"adapter_model.{suffix}")
        workspace = Workspace(tmp_path / "home")
        added = workspace.add(folder)
        assert (added.method, added.rank, added.parameters) == ("later", 2, 14)
        report = workspace.inspect(added.name)
        assert {each.name: each.dtype for each in report.modules} == {
            "base_model.model.q.places": "I64", "base_model.model.q.mask": "BOOL",
            "base_model.model.q.scale": "F8_E4M3", "step": "I64",
        }  # fmt: skip
        assert workspace.diff(added.name, str(folder)).summary.same == 4
        workspace.export(added.name, tmp_path / f"out-{suffix}")
        name = f"adapter_model.{suffix}"
        assert (tmp_path / f"out-{suffix}" / name).read_bytes() == (folder / name).read_bytes()
        with pytest.raises(IncompatibleError, match="LATER is a method whose effect"):
            workspace.resize(added.name, ResizeOptions(rank=1))
        with pytest.raises(IncompatibleError, match="LATER is a method whose effect"):
            workspace.export(added.name, tmp_path / "kohya", format="kohya")


@pytest.mark.parametrize("name", ["ia3", "loha-tucker", "lokr", "boft", "oft-embedding", "dora"])
def test_kinds_without_a_base(name: str, tmp_path: Path) -> None:
    import peft

    layers = ["lin", "conv"]
    configs: dict[str, Any] = {
        "ia3": peft.IA3Config(target_modules=layers, feedforward_modules=["conv"]),
        "loha-tucker": peft.LoHaConfig(r=2, target_modules=layers, use_effective_conv2d=True),
        "lokr": peft.LoKrConfig(r=2, target_modules=layers),
        "boft": peft.BOFTConfig(target_modules=layers, boft_block_size=2),
        "oft-embedding": peft.OFTConfig(target_modules=["lin", "emb"], oft_block_size=2),
        "dora": peft.LoraConfig(r=2, lora_alpha=5, target_modules=layers, use_dora=True),
    }
    trained(configs[name])[1].save_pretrained(tmp_path / "adapter")
    modules = {each.name: each for each in Workspace(tmp_path / "home").inspect(str(tmp_path / "adapter")).modules}
    other, kind = ("emb", "embedding") if name == "oft-embedding" else ("conv", "conv2d")
    assert (modules["lin"].kind, modules[other].kind) == ("linear", kind)
    if name == "dora":
        assert (modules["conv"].rank, modules["conv"].alpha, modules["conv"].scaling) == (2, 5.0, 2.5)
        assert modules["conv"].delta_norm is not None
