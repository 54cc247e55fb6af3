"""mlx-lm, torchtune and llama.cpp: what is read is the adapter that was written, and merges to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign_files import (
    CONFIG,
    base,
    factors,
    write_gguf_file,
    write_loralib_file,
    write_mlx_folder,
    write_torchtune_file,
)
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, ConflictError, IncompatibleError, ReadHints, UsageError, Workspace
from loramgr.adapter import Experts, LowRank
from loramgr.formats import read_adapter

WRITERS = {
    "mlx": write_mlx_folder,
    "loralib": write_loralib_file,
    "gguf": write_gguf_file,
    "torchtune": write_torchtune_file,
}


def expected(model: Path, scaling: float) -> dict[str, torch.Tensor]:
    """Return the merged weights, in float64."""
    weights = {name: tensor.double() for name, tensor in load_file(model / "model.safetensors").items()}
    for name, (lora_A, lora_B) in factors().items():
        weights[f"{name}.weight"] += scaling * lora_B.double() @ lora_A.double()
    return weights


@pytest.mark.parametrize("format", WRITERS)
def test_merged_from_a_path_and_from_the_store(tmp_path: Path, format: str) -> None:
    path, model = WRITERS[format](tmp_path / "adapter"), base(tmp_path / "model")
    workspace = Workspace(tmp_path / "home", hints=ReadHints(alpha=6.0))
    workspace.base_add(model, "tiny")
    added = workspace.add(path, AddOptions(name="a", base="tiny", alpha=6.0))
    assert (added.format, added.method, added.rank, added.scaling) == (format, "lora", 2, 3.0)
    assert sorted(added.ranks) == sorted(factors())
    assert workspace.inspect("a").mergeable
    for ref in (str(path), "a"):
        report = workspace.merge("tiny", [ref], tmp_path / f"merged-{Path(ref).stem}")
        merged = load_file(Path(report.output) / "model.safetensors")
        for name, tensor in expected(model, 3.0).items():
            assert (merged[name].double() - tensor).abs().max() <= 2e-7 * tensor.abs().max()
    assert workspace.add(path, AddOptions(name="a", base="tiny", alpha=6.0)).created is False


@pytest.mark.parametrize("format", ["mlx", "loralib", "gguf"])
@pytest.mark.parametrize("source", WRITERS)
def test_from_every_format_to_every_other_and_back(tmp_path: Path, source: str, format: str) -> None:
    path, model = WRITERS[source](tmp_path / "adapter"), base(tmp_path / "model")
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(model, "tiny")
    workspace.add(path, AddOptions(name="a", base="tiny", alpha=6.0))
    workspace.export("a", tmp_path / "peft", format="peft")
    workspace.export("a", tmp_path / "other", format=format)
    workspace.add(tmp_path / "other", AddOptions(name="b", base="tiny", alpha=6.0))
    workspace.export("b", tmp_path / "back", format="peft")
    first, second = (workspace.add(tmp_path / name, AddOptions(name=name)) for name in ("peft", "back"))
    assert first.weights_digest == second.weights_digest
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors").keys() == {
        f"base_model.model.{name}.lora_{end}.weight" for name in factors() for end in "AB"
    }


def test_torchtune_with_dora_and_without_a_configuration(tmp_path: Path) -> None:
    magnitudes = {name: pair[1].norm(dim=1) for name, pair in factors().items()}
    path, model = write_torchtune_file(tmp_path / "adapter", magnitudes), base(tmp_path / "model")
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(model, "tiny")
    assert workspace.add(path.parent, AddOptions(name="d", base="tiny")).method == "dora"
    workspace.export("d", tmp_path / "peft", format="peft")
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name, magnitude in magnitudes.items():
        assert torch.equal(stored[f"base_model.model.{name}.lora_magnitude_vector"], magnitude)
    (path.parent / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match="no configuration beside it says alpha"):
        read_adapter(path)
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": "phi3"}))
    with pytest.raises(IncompatibleError, match="'phi3' is not known"):
        workspace.add(path.parent, AddOptions(name="e", base=str(model), alpha=6.0))


def test_mlx_experts(tmp_path: Path) -> None:
    torch.manual_seed(5)
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    first, second = torch.randn(3, 2, 8), torch.randn(3, 4, 2)
    folder = write_mlx_folder(tmp_path / "adapter").parent
    save_file({f"{name}.lora_a": first, f"{name}.lora_b": second}, folder / "adapters.safetensors")
    adapter = read_adapter(folder)
    assert isinstance(adapter.updates[f"{name}.weight"], Experts)
    weights = {f"model.layers.0.mlp.experts.{index}.up_proj.weight": torch.randn(4, 8) for index in range(3)}
    model = tmp_path / "model"
    model.mkdir()
    save_file(weights, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(CONFIG))
    workspace = Workspace(tmp_path / "home")
    merged = load_file(Path(workspace.merge(str(model), [str(folder)], tmp_path / "out").output) / "model.safetensors")
    for index in range(3):
        key = f"model.layers.0.mlp.experts.{index}.up_proj.weight"
        assert torch.allclose(merged[key], weights[key] + 3.0 * second[index] @ first[index], atol=1e-5)


def test_mlx_scale_is_raw_and_its_default_is_told(tmp_path: Path) -> None:
    folder = write_mlx_folder(tmp_path / "adapter").parent
    said = json.loads((folder / "adapter_config.json").read_text())
    del said["lora_parameters"]["scale"]
    (folder / "adapter_config.json").write_text(json.dumps(said))
    adapter = read_adapter(folder)
    assert adapter.scaling == 20.0
    assert any("default of 20" in warning for warning in adapter.warnings)
    said["lora_parameters"]["alpha"] = 16
    (folder / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(IncompatibleError, match="an alpha and no scale"):
        read_adapter(folder)
    said["lora_parameters"] = {"rank": 2, "scale": None}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(IncompatibleError, match="scale is None"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_rslora", True, "use_rslora is True, and torchtune scales"),
        ("alpha_pattern", {"q_proj": 3}, "alpha_pattern is .*, and torchtune scales"),
        ("use_dora", True, "holds no magnitude"),
    ],
)
def test_what_torchtune_has_not_is_no_part_of_its_configuration(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    folder = write_torchtune_file(tmp_path / "adapter").parent
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | {key: value}))
    with pytest.raises(IncompatibleError, match=message):
        read_adapter(folder)


def test_loralib_has_no_parameter_beside_the_factors_but_a_bias(tmp_path: Path) -> None:
    path = write_loralib_file(tmp_path / "adapter")
    module = next(iter(factors()))
    torch.save(torch.load(path) | {f"{module}.bias": torch.ones(8)}, path)
    assert f"{module}.bias" in read_adapter(path, ReadHints(alpha=6.0)).updates
    torch.save(torch.load(path) | {f"{module}.alpha": torch.tensor(6.0)}, path)
    with pytest.raises(IncompatibleError, match=r"no rule of loralib's explains the tensor .*q_proj\.alpha"):
        read_adapter(path, ReadHints(alpha=6.0))


def test_a_scale_that_one_number_cannot_be_is_baked(tmp_path: Path, shared_data: Path) -> None:
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(shared_data / "bases" / "tinyllama-char", "tiny")
    workspace.add(shared_data / "trained" / "tinyllama-char" / "lic-rankpattern", AddOptions(name="a", base="tiny"))
    for format in ("mlx", "gguf", "loralib"):
        report = workspace.export("a", tmp_path / format, format=format)
        assert any("carries" in note for note in report.notes)
        alpha = 16.0 if format == "loralib" else None
        workspace.add(tmp_path / format, AddOptions(name=format, base="tiny", alpha=alpha))
        assert workspace.diff("a", format).summary.relative_distance <= 2**-22


@pytest.mark.parametrize(
    ("adapter", "format", "message"),
    [
        ("lic-r8-dora", "gguf", r"q_proj.weight: llama.cpp cannot load it \(DoRA\)"),
        ("lic-r8-dora", "loralib", r"q_proj.weight: loralib cannot hold it \(DoRA\)"),
        ("py-r8-lmhead-saved", "gguf", r"lm_head.weight: llama.cpp cannot load it \(Replacement\)"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(
    tmp_path: Path, shared_data: Path, adapter: str, format: str, message: str
) -> None:
    workspace = Workspace(tmp_path / "home")
    base_folder = str(shared_data / "bases" / "tinyllama-char")
    path = str(shared_data / "trained" / "tinyllama-char" / adapter)
    with pytest.raises(IncompatibleError, match=message):
        workspace.export(path, tmp_path / "out", format=format, base=base_folder)
    assert not (tmp_path / "out").exists()


def test_names_that_need_a_base_are_not_written_without_one(tmp_path: Path) -> None:
    path = write_gguf_file(tmp_path / "adapter")
    workspace = Workspace(tmp_path / "home")
    with pytest.raises(IncompatibleError, match=r"the names of llama\.cpp") as caught:
        workspace.export(str(path), tmp_path / "out", format="peft")
    assert "--base" in str(caught.value.hint)
    workspace.export(str(path), tmp_path / "out")
    assert (tmp_path / "out" / "adapter.gguf").read_bytes() == path.read_bytes()
    with pytest.raises(ConflictError):
        workspace.export(str(path), tmp_path / "out", format="peft", base=str(base(tmp_path / "model")))


def test_a_plain_layer_is_low_rank(tmp_path: Path) -> None:
    updates = read_adapter(write_mlx_folder(tmp_path / "adapter").parent).updates
    name, (lora_A, lora_B) = next(iter(factors().items()))
    update = updates[f"{name}.weight"]
    assert isinstance(update, LowRank)
    assert torch.equal(update.lora_A.load(), lora_A)
    assert torch.equal(update.lora_B.load(), lora_B)


@pytest.mark.parametrize("format", ["gguf", "torchtune"])
def test_names_that_mean_nothing_without_a_base_are_not_combined(tmp_path: Path, format: str) -> None:
    workspace, options = Workspace(tmp_path / "home"), AddOptions(name="there", alpha=6.0)
    workspace.add(WRITERS[format](tmp_path / "adapter"), options)
    workspace.add(write_mlx_folder(tmp_path / "other"), AddOptions(name="plain"))
    for refs in (["there", "there"], ["plain", "there"]):
        with pytest.raises(
            IncompatibleError, match=r"there@v1 cannot be combined: its modules have the names"
        ) as caught:
            workspace.compose([(ref, 0.5) for ref in refs], "both")
        assert caught.value.hint == "loramgr bind there@v1 BASE"
    with pytest.raises(IncompatibleError, match="no module in common") as caught:
        workspace.diff("plain", "there")
    assert "bind" in str(caught.value.hint)
    workspace.base_add(base(tmp_path / "model"), "tiny")
    for name in ("there", "plain"):
        workspace.bind(name, "tiny")
    workspace.compose([("plain", 0.5), ("there", 0.5)], "both")
    assert workspace.diff("both", "plain").summary.relative_distance < 1e-6
