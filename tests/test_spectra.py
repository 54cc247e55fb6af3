"""What `inspect --spectrum` adds: ranks really used, dead ones, shares of the weights, outliers."""

from __future__ import annotations

from math import isclose
from pathlib import Path

import pytest
import torch
from peft_files import write_adapter
from safetensors.torch import load_file, save_file

from loramgr import ModuleRecord, Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home", jobs=2)


def adapter(folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    rank = next(iter(factors.values()))[0].shape[0]
    write_adapter(folder, r=rank, lora_alpha=rank)
    tensors = {}
    for module, (lora_A, lora_B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_A.clone()
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_B.clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def inspected(workspace: Workspace, ref: str) -> dict[str, ModuleRecord]:
    return {module.name: module for module in workspace.inspect(ref, spectrum=True).modules}


def test_ranks_that_are_not_used(workspace: Workspace, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    lora_A, lora_B = torch.randn(4, 9, generator=generator), torch.randn(7, 4, generator=generator)
    dead_A, twice_B = lora_A.clone(), lora_B.clone()
    dead_A[1] = 0
    twice_B[:, 3] = 2 * lora_B[:, 0]
    found = inspected(
        workspace,
        adapter(tmp_path / "a", {"m.q": (lora_A, lora_B), "m.k": (dead_A, lora_B), "m.v": (lora_A, twice_B)}),
    )
    assert (found["m.q"].rank_used, found["m.q"].dead_ranks) == (4, [])
    assert (found["m.k"].rank_used, found["m.k"].dead_ranks) == (3, [1])
    assert (found["m.v"].rank_used, found["m.v"].dead_ranks) == (3, [])


def test_outliers_stand_out_of_the_modules_of_their_name(workspace: Workspace, tmp_path: Path) -> None:
    ones = torch.ones(1, 4), torch.ones(5, 1)
    sizes = {"q": (1, 1, 2.9, 1 / 2.9, 3.1, 0.2), "v": (10, 1)}
    factors = {
        f"m.{layer}.{kind}": (ones[0] * each, ones[1])
        for kind, values in sizes.items()
        for layer, each in enumerate(values)
    }
    found = inspected(workspace, adapter(tmp_path / "a", factors))
    assert [found[f"m.{layer}.q"].outlier for layer in range(6)] == [False, False, False, False, True, True]
    assert isclose(found["m.4.q"].norm_to_median or 0, 3.1, rel_tol=1e-6)
    assert (found["m.0.v"].outlier, found["m.0.v"].norm_to_median) == (None, None)


def test_the_share_of_the_weight(workspace: Workspace, shared_data: Path) -> None:
    workspace.base_add(shared_data / "bases" / "tinygpt2-char")
    folder = shared_data / "trained" / "tinygpt2-char" / "lic-r8-qv"
    version = workspace.add(folder)
    weights = load_file(shared_data / "bases" / "tinygpt2-char" / "model.safetensors")
    for name, module in inspected(workspace, version.name).items():
        expected = (module.delta_norm or 0) / float(weights[f"{name}.weight"].double().norm())
        assert isclose(module.share_of_weight or 0, expected, rel_tol=1e-9)
    assert all(module.share_of_weight is None for module in inspected(workspace, str(folder)).values())


def test_a_base_that_is_gone_is_said(workspace: Workspace, shared_data: Path, tmp_path: Path) -> None:
    base = tmp_path / "tinygpt2-char"
    base.symlink_to(shared_data / "bases" / "tinygpt2-char")
    workspace.base_add(base)
    version = workspace.add(shared_data / "trained" / "tinygpt2-char" / "lic-r8-qv")
    base.unlink()
    report = workspace.inspect(version.name, spectrum=True)
    assert any(warning.startswith("no shares of the weights") for warning in report.warnings)
    assert report.modules[0].share_of_weight is None
    assert report.modules[0].spectrum


def test_what_is_no_number_has_no_figures(workspace: Workspace, tmp_path: Path) -> None:
    bad = torch.ones(2, 4)
    bad[0, 0] = float("nan")
    found = inspected(workspace, adapter(tmp_path / "a", {"m.q": (bad, torch.ones(5, 2))}))["m.q"]
    assert (found.delta_norm, found.effective_rank, found.spectrum, found.rank_used) == (None, None, None, None)


def test_nothing_of_it_is_there_unasked(workspace: Workspace, tmp_path: Path) -> None:
    ref = adapter(tmp_path / "a", {"m.q": (torch.ones(1, 4), torch.ones(5, 1))})
    module = workspace.inspect(ref).modules[0]
    asked = (module.spectrum, module.rank_used, module.dead_ranks, module.share_of_weight, module.outlier)
    assert asked == (None,) * 5
