"""LoRA's variants as PEFT writes them: experts, attention, block-diagonal factors, slices, convolutions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_files import write_adapter
from safetensors.torch import save_file
from test_methods_peft import live_weights, merge, save_base

from loramgr import AddOptions, IncompatibleError, Workspace
from loramgr.adapter import Experts, LowRank
from loramgr.formats import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


class Mixture(torch.nn.Module):
    """Experts as parameters of three dimensions, (experts, out, in), and a router."""

    def __init__(self, hidden: int = 6, inner: int = 5) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(4, 2 * inner, hidden))
        self.down_proj = torch.nn.Parameter(torch.randn(4, hidden, inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("bi,eoi->ebo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebi,eoi->bo", gate * up, self.down_proj)


class Model(torch.nn.Module):
    """One of everything that PEFT wraps in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Mixture()
        self.attn = torch.nn.MultiheadAttention(6, 2)
        self.q_proj = torch.nn.Linear(6, 8)
        self.o_proj = torch.nn.Linear(8, 6)
        self.conv = torch.nn.Conv2d(4, 6, 3)
        self.grouped = torch.nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(self.experts(x)))


def trained(config: Any) -> tuple[Model, Any]:
    from peft import get_peft_model

    torch.manual_seed(5)
    base = Model()
    live = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return base, live.eval()


def check(tmp_path: Path, base: Model, live: Any, twice: str | None = None) -> None:
    """Compare with PEFT's merge; of the parameter that PEFT moves twice with half of its change."""
    merged = merge(tmp_path, base, live)
    expected = live_weights(live)
    for key, tensor in base.state_dict().items():
        right = expected[key].double()
        if key == twice:
            right = (right + tensor.double()) / 2
        assert (merged[key].double() - right).abs().max() <= 1e-6, key


def test_experts(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], rank_pattern={"experts.gate_up_proj": 3},
        target_parameters=["experts.down_proj", "experts.gate_up_proj"], init_lora_weights=False,
    )  # fmt: skip
    base, live = trained(config)
    check(tmp_path, base, live)
    report = Workspace(tmp_path / "home").inspect("adapter")
    kinds = {module.name: (module.kind, module.rank, module.scaling) for module in report.modules}
    assert kinds["experts.gate_up_proj"] == ("experts", 3, 2.0)
    assert kinds["experts.down_proj"] == ("experts", 2, 3.0)


def test_a_single_target_parameter(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    check(tmp_path, *trained(config))


def test_square_experts_need_a_version(tmp_path: Path) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(6, 4), torch.randn(4, 6)
    weight = torch.randn(3, 4, 4)
    straight = torch.einsum("ore,eri->eoi", b.reshape(4, 2, 3), a.reshape(3, 2, 4))
    base = save_base(tmp_path / "base", torch.nn.ParameterDict({"x": weight}))
    save_file({"m.experts.down_proj": weight}, base / "model.safetensors")
    for version, expected in (("0.19.0", straight), ("0.18.1", straight.mT), (None, None)):
        folder = write_adapter(
            tmp_path / str(version), target_parameters=["experts.down_proj"], target_modules=[], peft_version=version,
            lora_alpha=2,
        )  # fmt: skip
        names = {"base_model.model.m.experts.lora_A.weight": a, "base_model.model.m.experts.lora_B.weight": b}
        save_file(names, folder / "adapter_model.safetensors")
        workspace = Workspace(tmp_path / f"home-{version}")
        workspace.base_add(base, "base")
        if expected is None:
            with pytest.raises(IncompatibleError, match="ambiguous layout"):
                workspace.add(folder, AddOptions(name="adapter", base="base"))
            continue
        workspace.add(folder, AddOptions(name="adapter", base="base"))
        workspace.merge("base", ["adapter"], tmp_path / f"merged-{version}")
        from safetensors.torch import load_file

        merged = load_file(tmp_path / f"merged-{version}" / "model.safetensors")["m.experts.down_proj"]
        assert (merged - weight - expected).abs().max() <= 1e-5


def test_experts_that_the_file_has_one_by_one(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(6)
    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double()
    model.save_pretrained(tmp_path / "base")
    wanted = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]  # gate_up_proj is square
    live = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=wanted))
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    live.save_pretrained(tmp_path / "adapter")
    expected = live.merge_and_unload().state_dict()
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(tmp_path / "base", "base")
    workspace.add(tmp_path / "adapter", AddOptions(name="adapter", base="base"))
    workspace.merge("base", ["adapter"], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (merged[name] - tensor).abs().max() <= 1e-6, name
    kinds = {module.name: module.kind for module in workspace.inspect("adapter").modules}
    assert kinds["model.layers.0.mlp.experts.gate_up_proj"] == "experts"


def split_experts(folder: Path, **changed: torch.Tensor) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    shapes = {"gate_proj": (2, 4), "up_proj": (2, 4), "down_proj": (4, 2)}
    names = {f"layers.0.mlp.experts.{e}.{leaf}.weight": shapes[leaf] for leaf in shapes for e in range(3)}
    weights = {name: torch.randn(shape) for name, shape in names.items()} | changed
    base = save_base(folder, torch.nn.ParameterDict({"x": torch.zeros(1)}))
    save_file(weights, base / "model.safetensors")
    return base, weights


def square_experts(folder: Path, version: str) -> tuple[Path, torch.Tensor]:
    """Write an adapter of gate_up_proj (3, 4, 4) for the model, and return what it adds as (experts, out, in)."""
    a, b = torch.randn(6, 4), torch.randn(4, 6)
    said = {"target_parameters": ["experts.gate_up_proj"], "target_modules": [], "peft_version": version}
    write_adapter(folder, lora_alpha=2, **said)
    path = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    save_file({path.format("A"): a, path.format("B"): b}, folder / "adapter_model.safetensors")
    return folder, torch.einsum("ore,eri->eoi", b.reshape(4, 2, 3), a.reshape(3, 2, 4))


@pytest.mark.parametrize(("version", "turned"), [("0.19.0", False), ("0.18.1", True)])
def test_square_experts_one_by_one_below_another_prefix(tmp_path: Path, version: str, turned: bool) -> None:
    from safetensors.torch import load_file

    base, weights = split_experts(tmp_path / "base")
    adapter, added = square_experts(tmp_path / "adapter", version)
    Workspace(tmp_path / "home").merge(str(base), [str(adapter)], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for index, delta in enumerate(added.mT if turned else added):
        for leaf, part in zip(("gate_proj", "up_proj"), delta.split(2), strict=True):
            name = f"layers.0.mlp.experts.{index}.{leaf}.weight"
            assert (merged[name] - weights[name] - part).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(3, 4), (2, 5)])
def test_experts_that_make_up_no_tensor_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    base, _ = split_experts(tmp_path / "base", **{"layers.0.mlp.experts.1.up_proj.weight": torch.zeros(shape)})
    adapter, _ = square_experts(tmp_path / "adapter", "0.19.0")
    with pytest.raises(IncompatibleError, match=r"no module model\.layers\.0\.mlp\.experts ") as caught:
        Workspace(tmp_path / "home").merge(str(base), [str(adapter)], tmp_path / "merged")
    assert "save_original_format=False" in str(caught.value.hint)


def test_multihead_attention_is_merged_once(tmp_path: Path) -> None:
    from peft import LoraConfig

    base, live = trained(LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False))
    check(tmp_path, base, live, twice="attn.out_proj.weight")
    updates = read_adapter(tmp_path / "adapter").updates
    assert set(updates) == {"attn.in_proj_weight", "attn.out_proj.weight"}


def test_block_diagonal_factors(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_bdlora=blocks, init_lora_weights=False)
    check(tmp_path, *trained(config))


def test_dora_on_a_convolution(tmp_path: Path) -> None:
    from peft import LoraConfig

    base, live = trained(LoraConfig(r=2, target_modules=["conv"], use_dora=True, init_lora_weights=False))
    check(tmp_path, base, live)
    assert Workspace(tmp_path / "home").inspect("adapter").method == "dora"


def test_a_grouped_convolution_is_kept(tmp_path: Path) -> None:
    from peft import LoraConfig

    base, live = trained(LoraConfig(r=2, target_modules=["grouped", "conv"]))
    with pytest.raises(IncompatibleError, match="grouped convolution"):
        merge(tmp_path, base, live)
    report = Workspace(tmp_path / "home").inspect("adapter")
    assert (report.mergeable, report.method) == (False, "lora")


def test_legacy_slices(tmp_path: Path) -> None:
    """PEFT before 0.3: c_attn's q and v have factors, k none; lora_B is the kernel of a grouped convolution."""
    torch.manual_seed(2)
    r, width = 2, 4
    a, b = torch.randn(2 * r, width), torch.randn(2 * width, r, 1)
    folder = write_adapter(
        tmp_path / "adapter", enable_lora=[True, False, True], fan_in_fan_out=True, target_modules=["c_attn"], r=r
    )
    names = {"base_model.model.h.c_attn.lora_A.weight": a, "base_model.model.h.c_attn.lora_B.weight": b}
    save_file(names, folder / "adapter_model.safetensors")
    update = read_adapter(folder).updates["h.c_attn.weight"]
    assert isinstance(update, LowRank)
    assert update.scaling == 2.0
    rows = torch.nn.functional.conv1d(a[None], b, groups=2)[0].reshape(2, width, width)
    expected = torch.cat([rows[0], torch.zeros(width, width), rows[1]])
    assert torch.allclose(update.lora_B.load() @ update.lora_A.load(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("use_qalora", True, "QALoRA"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("kasa_config", {"beta": 1}, "KaSA"),
    ],
)
def test_variants_that_no_weight_can_hold_are_kept(tmp_path: Path, key: str, value: object, reason: str) -> None:
    folder = write_adapter(tmp_path / "adapter", **{key: value})
    workspace = Workspace(tmp_path / "home")
    base = save_base(tmp_path / "base", torch.nn.Linear(4, 6, bias=False))
    save_file({"m.q.weight": torch.zeros(6, 4)}, base / "model.safetensors")
    workspace.base_add(base, "base")
    added = workspace.add(folder, AddOptions(base="base"))
    assert added.rank == 2
    assert reason in " ".join(added.warnings)
    with pytest.raises(IncompatibleError, match=reason):
        workspace.merge("base", ["adapter"], tmp_path / "merged")
    with pytest.raises(IncompatibleError, match=reason):
        workspace.compose([("adapter", 0.5)], "combined")
    assert workspace.diff("adapter", "adapter").summary is not None
    workspace.export("adapter", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "adapter_config.json").read_text())[key] == value


def test_experts_have_the_experts_fastest_in_lora_B(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", target_parameters=["experts.down_proj"], target_modules=[])
    a, b = torch.arange(30.0).reshape(6, 5), torch.arange(24.0).reshape(4, 6)
    names = {"base_model.model.m.experts.lora_A.weight": a, "base_model.model.m.experts.lora_B.weight": b}
    save_file(names, folder / "adapter_model.safetensors")
    update = read_adapter(folder).updates["m.experts.down_proj"]
    assert isinstance(update, Experts)
    assert torch.equal(update.lora_A.load()[1], a[2:4])
    assert torch.equal(update.lora_B.load()[1], b[:, [1, 4]])
