"""Base, adapter and remainder are the fine-tune, bit for bit, or nothing appears."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_models import CONFIG, CONV, UP, Q, moved, save, tensors

from loramgr import (
    AddOptions,
    ConflictError,
    ExtractOptions,
    IncompatibleError,
    IntegrityError,
    MergeOptions,
    NotFoundError,
    UsageError,
    Workspace,
)
from loramgr.cli.main import run
from loramgr.formats.folder import REMAINDER

EXACT = ExtractOptions(rank=2, exact=True)
NAMED = AddOptions(name="made")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Return a workspace with the toy base, and a version `made` that was extracted exactly."""
    workspace = Workspace(tmp_path / "home", jobs=2)
    weights = tensors()
    workspace.base_add(save(tmp_path / "base", weights), name="base")
    tuned = moved(weights, f"{Q}.weight", f"{CONV}.weight", "lm_head.weight", rank=8)
    workspace.extract(save(tmp_path / "tuned", tuned), "base", EXACT, NAMED)
    return workspace


def digest_of(workspace: Workspace, folder: Path) -> str:
    return workspace.base_add(folder, name=f"of-{folder.name}").digest


@pytest.mark.parametrize("folder", ["bert_ft", "bert_ft_10k_25s"])
def test_a_real_fine_tune_comes_back(rxnfp_bases: Path, tmp_path: Path, folder: str) -> None:
    workspace = Workspace(tmp_path / "home", jobs=2)
    workspace.base_add(rxnfp_bases / "bert_pretrained", name="base")
    workspace.extract(rxnfp_bases / folder, "base", ExtractOptions(rank=8, exact=True), NAMED)
    report = workspace.remake("base", ["made"], tmp_path / "out", MergeOptions(verify=True))
    shutil.copytree(rxnfp_bases / folder, tmp_path / "source")
    assert report.output_digest == digest_of(workspace, tmp_path / "out") == digest_of(workspace, tmp_path / "source")
    assert (tmp_path / "out" / "config.json").read_bytes() == (rxnfp_bases / folder / "config.json").read_bytes()
    tuned = torch.load(rxnfp_bases / folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.numpy().tobytes() for name, tensor in found.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in tuned.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tuned_dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_tensor_comes_back(tmp_path: Path, dtype: torch.dtype, tuned_dtype: torch.dtype) -> None:
    workspace = Workspace(tmp_path / "home", jobs=2)
    weights = tensors(dtype) | {"cls.bias": torch.ones(3).to(dtype), "buffer": torch.arange(3)}
    workspace.base_add(save(tmp_path / "base", weights), name="base")
    tuned = {name: each.to(tuned_dtype) for name, each in moved(tensors(dtype), f"{Q}.weight", f"{UP}.weight").items()}
    tuned |= {"score.weight": torch.ones(2, 24), "buffer": torch.arange(3) + 1, "new_buffer": torch.tensor([True])}
    tuned["model.layers.0.input_layernorm.weight"][0] = -0.0
    folder = save(tmp_path / "tuned", tuned, CONFIG | {"made": "by hand"})
    workspace.extract(folder, "base", EXACT, NAMED)
    workspace.remake("base", ["made"], tmp_path / "out")
    assert digest_of(workspace, tmp_path / "out") == digest_of(workspace, folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["made"] == "by hand"


def test_tied_models_come_back(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    workspace = Workspace(tmp_path / "home", jobs=2)
    weights = {name: tensor for name, tensor in tensors().items() if name != "lm_head.weight"}
    workspace.base_add(save(tmp_path / "base", weights, config), name="base")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    for name, tuned in {"tied": moved(weights, "model.embed_tokens.weight"), "untied": weights | head}.items():
        folder = save(tmp_path / name, tuned, config if name == "tied" else CONFIG)
        workspace.extract(folder, "base", EXACT, AddOptions(name=name))
        workspace.remake("base", [name], tmp_path / f"{name}-out")
        assert digest_of(workspace, tmp_path / f"{name}-out") == digest_of(workspace, folder)


def test_large_models_come_in_shards(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramgr.workspace.remaking._SHARD", 5000)
    workspace.remake("base", ["made"], tmp_path / "out")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == [f"model-0000{at}-of-0000{len(shards)}.safetensors" for at in range(1, len(shards) + 1)]
    assert digest_of(workspace, tmp_path / "out") == digest_of(workspace, tmp_path / "tuned")


def test_the_remainder_is_a_file_of_the_version_and_a_plain_merge_ignores_it(
    workspace: Workspace, tmp_path: Path
) -> None:
    assert REMAINDER in [file.path for file in workspace.log("made")[0].files]
    workspace.merge("base", ["made"], tmp_path / "merged")
    assert not (tmp_path / "merged" / REMAINDER).exists()
    workspace.export("made", tmp_path / "exported")
    workspace.remake("base", [str(tmp_path / "exported")], tmp_path / "out")
    assert digest_of(workspace, tmp_path / "out") == digest_of(workspace, tmp_path / "tuned")


def test_what_is_not_there_or_not_of_it_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    workspace.extract(tmp_path / "tuned", "base", ExtractOptions(rank=2), AddOptions(name="plain"))
    workspace.base_add(tmp_path / "tuned", name="other")
    for base, adapters, options, error in (
        ("base", ["plain"], None, NotFoundError),
        ("base", ["made=0.5"], None, UsageError),
        ("base", ["made", "plain"], None, UsageError),
        ("base", [], None, UsageError),
        ("base", ["made"], MergeOptions(dtype="float16"), UsageError),
        ("base", ["made"], MergeOptions(numerics="fast"), UsageError),
        ("other", ["made"], None, IncompatibleError),
    ):
        with pytest.raises(error):
            workspace.remake(base, adapters, tmp_path / "out", options)
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConflictError):
        workspace.remake("base", ["made"], tmp_path / "out")


@pytest.mark.parametrize("at", [0.2, 0.6, 0.9, 0.99])
def test_a_damaged_remainder_gives_nothing(workspace: Workspace, tmp_path: Path, at: float) -> None:
    workspace.export("made", tmp_path / "exported")
    path = tmp_path / "exported" / REMAINDER
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)
    with pytest.raises((IntegrityError, IncompatibleError)):
        workspace.remake("base", [str(tmp_path / "exported")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_gives_the_fine_tune_back(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--home", str(tmp_path / "home"), "--json", "merge", "base", "made", "--with-remainder"]
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["output_digest"] == digest_of(workspace, tmp_path / "tuned")
    assert run([*command, "--in-place"]) == 2
    assert run([*command, "-o", str(tmp_path / "out")]) == 7
