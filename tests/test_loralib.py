"""Checkpoints that loralib writes: merged they are its live layers, which merge themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, IncompatibleError, InspectReport, ReadHints, UsageError, Workspace
from loramgr.adapter import LowRank, Replacement
from loramgr.formats import read_adapter

loralib = pytest.importorskip("loralib")


def live_model() -> Any:
    """Return every kind of layer that loralib has, with factors that are not zero."""
    torch.manual_seed(7)
    model = torch.nn.ModuleDict(
        {
            "plain": loralib.Linear(8, 6, r=2, lora_alpha=6),
            "fused": loralib.MergedLinear(8, 24, r=2, lora_alpha=6, enable_lora=[True, False, True]),
            "conv1d": loralib.MergedLinear(
                8, 24, r=2, lora_alpha=6, enable_lora=[False, True, True], fan_in_fan_out=True
            ),
            "whole": loralib.MergedLinear(8, 24, r=2, lora_alpha=6, enable_lora=[True, True, True]),
            "kernel": loralib.Conv2d(5, 7, 3, r=2, lora_alpha=6),
            "wte": loralib.Embedding(11, 4, r=2, lora_alpha=6),
            "classifier": torch.nn.Linear(4, 2),
        }
    ).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model.train()


def saved(model: Any, folder: Path, keep: list[str], wrapped: bool) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    state = {
        name.replace(".conv.", "."): each.contiguous()
        for name, each in model.state_dict().items()
        if "lora_" not in name
    }
    save_file(state, folder / "model.safetensors")
    chosen = {
        name: each for name, each in loralib.lora_state_dict(model, bias="none").items() if name.split(".")[0] in keep
    }
    path = folder / "lora.pt"
    torch.save({"model_state_dict": chosen} if wrapped else chosen, path)
    return folder / "model.safetensors", path


@pytest.mark.parametrize(
    ("keep", "slices"),
    [
        (["plain", "whole", "kernel", "wte"], None),
        (["fused"], (True, False, True)),
        (["conv1d"], (False, True, True)),
    ],
)
def test_merged_it_is_the_live_layer(tmp_path: Path, keep: list[str], slices: tuple[bool, ...] | None) -> None:
    model = live_model()
    base, path = saved(model, tmp_path / "files", keep, wrapped=slices is None)
    (tmp_path / "files" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    workspace = Workspace(tmp_path / "home", hints=ReadHints(6.0, slices))
    workspace.merge(str(base.parent), [str(path)], tmp_path / "merged")
    merged = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    model.train(False)  # which merges its layers
    for name in keep:
        live = model[name].conv.weight if name == "kernel" else model[name].weight
        assert (merged[f"{name}.weight"] - live).abs().max() <= 1e-6 * live.abs().max()


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    base, path = saved(live_model(), tmp_path / "files", ["fused"], wrapped=False)
    with pytest.raises(UsageError, match="loralib does not store alpha") as caught:
        read_adapter(path)
    assert "--alpha" in str(caught.value.hint)
    workspace = Workspace(tmp_path / "home")
    with pytest.raises(UsageError, match="2 of 3 slices") as caught:
        workspace.add(path, AddOptions(base=str(base), alpha=6.0))
    assert "--enable-lora" in str(caught.value.hint)
    added = workspace.add(path, AddOptions(base=str(base), alpha=6.0, enable_lora=(True, False, True)))
    assert (added.format, added.alpha, added.scaling) == ("loralib", 6.0, 3.0)
    assert {file.path for file in added.files} == {"lora.pt", "loramgr_hints.json"}
    assert workspace.verify([]).corrupt == []
    workspace.export("lora", tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["lora.pt"]


def test_the_release_of_the_paper(shared_data: Path) -> None:
    adapter = read_adapter(shared_data / "found" / "loralib-roberta-base-mnli", ReadHints(alpha=16.0))
    pairs = [each for each in adapter.updates.values() if isinstance(each, LowRank)]
    assert {(each.rank, each.scaling) for each in pairs} == {(8, 2.0)}
    assert len(pairs) == 24
    assert sorted(name for name, each in adapter.updates.items() if isinstance(each, Replacement)) == [
        "classifier.dense.bias",
        "classifier.dense.weight",
        "classifier.out_proj.bias",
        "classifier.out_proj.weight",
    ]
    assert adapter.target_modules == ("query", "value")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"q.lora_A": (2, 4)}, "only one of lora_A and lora_B"),
        ({"q.lora_A": (4, 2), "q.lora_B": (2, 6)}, "do not multiply"),
        ({"q.lora_A": (2, 4), "q.lora_B": (6, 2), "q.lora_C": (1,)}, "no rule of loralib's explains"),
        ({"q.lora_A": (2, 4, 1), "q.lora_B": (6, 2)}, "do not multiply"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str) -> None:
    torch.save({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "x.bin")
    with pytest.raises(IncompatibleError, match=message):
        read_adapter(tmp_path / "x.bin", ReadHints(alpha=2.0))


def test_slices_are_measured_without_a_base_and_not_compared(tmp_path: Path) -> None:
    model = live_model()
    _, path = saved(model, tmp_path / "files", ["fused"], wrapped=False)
    workspace = Workspace(tmp_path / "home", hints=ReadHints(6.0))
    report = workspace.inspect(str(path), spectrum=True)
    assert isinstance(report, InspectReport)
    before = model["fused"].weight.detach().clone()
    model.train(False)  # which merges its layers
    values = torch.linalg.svdvals(model["fused"].weight.detach() - before)
    (module,) = report.modules
    assert module.delta_norm == pytest.approx(float(values.norm()))
    assert module.spectrum == pytest.approx(values[:4].tolist())
    with pytest.raises(IncompatibleError, match=r"fused.lora_A: which slices of the fused weight"):
        workspace.diff(str(path), str(path))


def test_without_alpha_it_is_looked_at_and_not_added(tmp_path: Path) -> None:
    _, path = saved(live_model(), tmp_path / "files", ["plain"], wrapped=False)
    report = Workspace(tmp_path / "home").inspect(str(path), spectrum=True)
    assert isinstance(report, InspectReport)
    assert (report.format, report.method, report.rank, report.alpha, report.scaling) == (
        "loralib",
        "lora",
        2,
        None,
        None,
    )
    assert "--alpha N" in report.warnings[0]
    assert (report.mergeable, report.evidence) == (False, [*report.evidence])
    (module,) = (each for each in report.modules if each.rank)
    assert (module.alpha, module.scaling, module.delta_norm, module.spectrum) == (None, None, None, None)
    assert (module.in_features, module.out_features) == (8, 6)
    known = Workspace(tmp_path / "home", hints=ReadHints(6.0)).inspect(str(path))
    assert isinstance(known, InspectReport)
    assert {each.scaling for each in known.modules if each.rank} == {3.0}
    with pytest.raises(UsageError, match="does not store alpha"):
        Workspace(tmp_path / "home").add(path)
