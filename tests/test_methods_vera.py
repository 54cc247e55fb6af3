"""VeRA and AdaLoRA as the low-rank updates that they are: drawn again, cut to their layers, written as plain LoRA."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_files import write_adapter
from safetensors.torch import load_file, save_file
from test_methods_peft import Toy, live_weights, merge, save_base, trained

from loramgr import AddOptions, IncompatibleError, ResizeOptions, Workspace
from loramgr.adapter import LowRank
from loramgr.formats import read_adapter
from loramgr.tensorfile import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["lin", "square", "c_fc"]


def _vera(**options: Any) -> Any:
    from peft import VeraConfig

    config = {"r": 5, "target_modules": TARGETS, "init_weights": False, "save_projection": False}
    return VeraConfig(**config | {"projection_prng_key": 2**40 + 17} | options)


def _specs(base: torch.nn.Module, dtype: str) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, dtype, tuple(tensor.shape)) for name, tensor in base.state_dict().items()}


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_projections_are_drawn_as_pefts_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    from loramgr.tensors import torch_dtype

    base = Toy()
    live = get_peft_model(copy.deepcopy(base).to(torch_dtype(dtype)), _vera()).eval()
    live.save_pretrained(tmp_path / "adapter")
    assert not any("vera_A" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    adapter = read_adapter(tmp_path / "adapter").resolved(_specs(base, dtype), None)
    for name in TARGETS:
        update, layer = adapter.updates[f"{name}.weight"], live.base_model.model.get_submodule(name)
        assert isinstance(update, LowRank)
        a, b = (each["default"].double() for each in (layer.vera_A, layer.vera_B))
        d, of_outputs = (each["default"].double() for each in (layer.vera_lambda_d, layer.vera_lambda_b))
        assert torch.equal(update.lora_A.load(), d[:, None] * a[:, : layer.in_features])
        assert torch.equal(update.lora_B.load(), of_outputs[:, None] * b[: layer.out_features])


def test_merged_without_saved_projections(tmp_path: Path) -> None:
    base, live = trained(_vera(projection_prng_key=3))
    merged = merge(tmp_path, base, live)
    expected = live_weights(live)
    for name in expected:
        assert (merged[name].double() - expected[name]).abs().max() <= 2.0**-24 * expected[name].abs().max() + 1e-7
    report = Workspace(tmp_path / "home").inspect("adapter")
    assert report.mergeable
    assert {(each.name, each.in_features, each.out_features) for each in report.modules} == {
        ("lin", 8, 12), ("square", 12, 12), ("c_fc", 12, 16),
    }  # fmt: skip


def test_projections_need_the_base(tmp_path: Path) -> None:
    _, live = trained(_vera())
    live.save_pretrained(tmp_path / "vera")
    workspace = Workspace(tmp_path / "home")
    assert workspace.add(tmp_path / "vera").rank == 5
    with pytest.raises(IncompatibleError, match="projections of a size that the file does not say"):
        workspace.export("vera", tmp_path / "out", format="peft")
    with pytest.raises(IncompatibleError, match="cannot be combined: its modules have projections of a size that"):
        workspace.compose([("vera", 0.5)], "half")
    with pytest.raises(IncompatibleError):
        workspace.resize("vera", ResizeOptions(rank=1))
    other = torch.nn.ModuleDict({"lin": torch.nn.Linear(8, 9)})
    workspace.base_add(save_base(tmp_path / "base", other), "base")
    with pytest.raises(IncompatibleError, match=r"module .*: the base has"):
        workspace.add(tmp_path / "vera", AddOptions(base="base"))


@pytest.mark.parametrize("key", [1.5, "1", True, None])
def test_a_key_that_is_none_is_refused(key: object, tmp_path: Path) -> None:
    config = {"peft_type": "VERA", "r": 2, "save_projection": False, "projection_prng_key": key}
    folder = write_adapter(tmp_path / "vera", **config)
    tensors = {"vera_lambda_b": torch.ones(6), "vera_lambda_d": torch.ones(2)}
    save_file({f"base_model.model.m.q.{n}": t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({k: content[k] for k in (*config, "target_modules")}))
    with pytest.raises(IncompatibleError, match="projection_prng_key"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA", "r": 2, "target_modules": ["q"]}))
    with pytest.raises(IncompatibleError, match="holds no vera_A"):
        read_adapter(folder)


def _adalora() -> Any:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=3, target_modules=TARGETS, total_step=10, init_lora_weights=False
    )


@pytest.mark.parametrize("method", ["vera", "vera-saved", "adalora"])
def test_written_as_plain_lora_and_resized(method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    config = _adalora() if method == "adalora" else _vera(save_projection=method == "vera-saved")
    base, live = trained(config)
    merged = merge(tmp_path, base, live)
    workspace = Workspace(tmp_path / "home")
    with pytest.raises(IncompatibleError, match="not stored as those of PEFT's LoRA") as caught:
        workspace.resize("adapter", ResizeOptions(rank=2))
    assert "export adapter DIR --format peft" in str(caught.value.hint)
    report = workspace.export("adapter", tmp_path / "plain", format="peft")
    assert any("written as plain LoRA" in note for note in report.notes)
    added = workspace.add(tmp_path / "plain", AddOptions(name="plain", base="base"))
    assert added.method == "lora"
    workspace.merge("base", ["plain"], tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], merged[name]) for name in merged)  # nothing was rounded on the way
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "plain")).merge_and_unload().state_dict()
    assert all((theirs[name] - merged[name]).abs().max() <= 1e-6 for name in merged)
    assert workspace.resize("plain", ResizeOptions(rank=2)).rank == 2
    assert workspace.diff("plain", "adapter").summary is not None
    workspace.compose([("adapter", 0.5), ("plain@v1", 0.5)], "both")
    workspace.merge("base", ["both"], tmp_path / "both")
    both = load_file(tmp_path / "both" / "model.safetensors")
    assert {n: d for n in merged if (d := (both[n] - merged[n]).abs().max().item()) > 1e-6} == {}


def test_saved_projections_of_an_unknown_base_are_not_taken_for_factors(tmp_path: Path) -> None:
    _, live = trained(_vera(save_projection=True))
    live.save_pretrained(tmp_path / "vera")
    workspace = Workspace(tmp_path / "home")
    workspace.add(tmp_path / "vera")
    assert len(workspace.inspect("vera").modules) == len(TARGETS)
    with pytest.raises(IncompatibleError, match="shared projections"):
        workspace.export("vera", tmp_path / "out", format="peft")
    with pytest.raises(IncompatibleError, match="shared projections"):
        workspace.compose([("vera", 0.5)], "half")


@pytest.mark.parametrize(
    ("method", "reason"), [("loha", r"LoHa"), ("lokr", "LoKr"), ("ia3", "IA3"), ("oft", "rotates")]
)
def test_what_plain_lora_cannot_hold_is_refused(method: str, reason: str, tmp_path: Path) -> None:
    from test_methods_peft import _configs

    base, live = trained(_configs()[method]())
    live.save_pretrained(tmp_path / "adapter")
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(save_base(tmp_path / "base", base), "base")
    workspace.add(tmp_path / "adapter", AddOptions(base="base"))
    with pytest.raises(IncompatibleError, match=reason) as caught:
        workspace.export("adapter", tmp_path / "out", format="peft", base="base")
    assert "without --format" in str(caught.value.hint)
    workspace.export("adapter", tmp_path / "out", format="peft")  # they are PEFT's own files already
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
