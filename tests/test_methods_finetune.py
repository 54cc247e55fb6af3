"""Full fine-tunes and BitFit as adapters: the fine-tune's bits after the merge, the base's after taking it out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import save, tensors

from loramgr import AddOptions, IncompatibleError, Workspace


def _tuned(weights: dict[str, torch.Tensor], share: float, only_biases: bool = False) -> dict[str, torch.Tensor]:
    """Change a share of the values of every tensor, or of the biases, signs of zeros among them."""
    generator = torch.Generator().manual_seed(11)
    result = {}
    for name, tensor in weights.items():
        moved = tensor.clone()
        if not only_biases or name.endswith(".bias"):
            mask = torch.rand(tensor.shape, generator=generator) < share
            moved[mask] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)[mask]
            moved.view(-1)[0] = -0.0
        result[name] = moved
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.02, 1.0])
def test_a_fine_tune_gives_its_bits_back(tmp_path: Path, dtype: torch.dtype, share: float) -> None:
    weights = tensors(dtype)
    base, tuned = save(tmp_path / "base", weights), save(tmp_path / "tuned", _tuned(weights, share))
    workspace = Workspace(tmp_path / "home")
    record = workspace.base_add(base, "base")
    other = workspace.base_add(tuned, "other")
    added = workspace.add(tuned, AddOptions(base="base"))
    assert (added.name, added.method, added.format) == ("tuned", "full", "loramgr")
    assert added.base is not None
    assert added.base.digest == record.digest
    if share < 0.1:
        assert added.bytes < 0.75 * sum(tensor.nbytes for tensor in weights.values())
    report = workspace.merge("base", ["tuned"], tmp_path / "merged")
    assert report.base_digest == record.digest
    assert workspace.base_add(tmp_path / "merged", "again").digest == other.digest
    assert workspace.unmerge(tmp_path / "merged", tmp_path / "restored").base_digest == record.digest
    inspected = workspace.inspect("tuned")
    assert inspected.mergeable
    assert {module.rank for module in inspected.modules} == {None}


def test_half_of_a_fine_tune_is_half_way(tmp_path: Path) -> None:
    weights = tensors()
    tuned = _tuned(weights, 0.02)
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(save(tmp_path / "base", weights), "base")
    workspace.add(save(tmp_path / "tuned", tuned), AddOptions(base="base"))
    workspace.merge("base", ["tuned=0.5"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in weights.items():
        exact = tensor.double() + 0.5 * (tuned[name].double() - tensor.double())
        assert torch.equal(merged[name], exact.float()), name


def test_a_fine_tune_that_is_the_base_is_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(save(tmp_path / "base", tensors()), "base")
    with pytest.raises(IncompatibleError, match="no tensor that differs"):
        workspace.add(save(tmp_path / "same", tensors()), AddOptions(base="base"))


def test_biases_alone_are_bitfit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"m.lin.weight": torch.randn(4, 3), "m.lin.bias": torch.randn(4), "m.norm.bias": torch.randn(3)}
    tuned = _tuned(weights, 1.0, only_biases=True)
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(save(tmp_path / "base", weights), "base")
    other = workspace.base_add(save(tmp_path / "tuned", tuned), "other")
    assert workspace.add(tmp_path / "tuned", AddOptions(base="base")).method == "bitfit"
    save_file({name: each for name, each in tuned.items() if name.endswith(".bias")}, tmp_path / "biases.safetensors")
    added = workspace.add(tmp_path / "biases.safetensors", AddOptions(base="base", name="biases"))
    assert (added.method, added.format) == ("bitfit", "bitfit")
    for name in ("tuned", "biases"):
        workspace.merge("base", [name], tmp_path / f"merged-{name}")
        assert workspace.base_add(tmp_path / f"merged-{name}", f"m-{name}").digest == other.digest
