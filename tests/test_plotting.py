"""Pictures: they appear whole, say what they show, and are asked for before anything is computed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft_files import write_adapter
from safetensors.torch import save_file

from loramgr import LoramgrError, NotFoundError, UsageError, Workspace
from loramgr.cli.main import run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home", jobs=2)


def adapter(folder: Path, modules: list[str], seed: int = 1) -> str:
    write_adapter(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, 6, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(4, 2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def shown(picture: Path) -> set[str]:
    """Return the texts of an SVG, which matplotlib names in comments."""
    text = picture.read_text()
    return {part.partition("-->")[0].strip() for part in text.split("<!--")[1:]}


FEW = ["embed", *(f"model.layers.{layer}.attn.q" for layer in range(2)), "model.layers.1.mlp.up"]
MANY = [f"model.layers.{layer}.self_attn.m{kind}_proj" for layer in range(32) for kind in range(7)]


@pytest.mark.parametrize(("modules", "spectrum"), [(FEW, False), (FEW, True), (MANY, True)])
def test_an_inspection_is_drawn(workspace: Workspace, tmp_path: Path, modules: list[str], spectrum: bool) -> None:
    picture = tmp_path / "a.png"
    report = workspace.inspect(adapter(tmp_path / "a", modules), spectrum=spectrum, plot=picture)
    assert report.plot == str(picture)
    assert picture.read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.png", "home"]


def test_rows_are_kinds_and_columns_layers(workspace: Workspace, tmp_path: Path) -> None:
    picture = tmp_path / "a.svg"
    report = workspace.inspect(adapter(tmp_path / "a", FEW), spectrum=True, plot=str(picture))
    texts = shown(picture)
    assert texts >= {"embed", "attn.q", "mlp.up", "layer", "0", "1", "singular value"}
    assert {f"{module.delta_norm:.2g}" for module in report.modules} <= texts


def test_stacks_of_layers_keep_their_names_apart(workspace: Workspace, tmp_path: Path) -> None:
    modules = [f"{stack}.block.0.q" for stack in ("encoder", "decoder")]
    workspace.inspect(adapter(tmp_path / "a", modules), plot=tmp_path / "a.svg")
    assert shown(tmp_path / "a.svg") >= {"encoder.block.*.q", "decoder.block.*.q"}


def test_a_diff_is_drawn(workspace: Workspace, tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", ["m.0.q", "m.1.q"]), adapter(tmp_path / "b", ["m.1.q", "m.2.q"], 2)
    report = workspace.diff(a, b, plot=tmp_path / "d.svg")
    both = next(module for module in report.modules if module.status == "changed")
    texts = shown(tmp_path / "d.svg")
    assert texts >= {"+", "−", "‖ΔA − ΔB‖ / ‖ΔA‖", f"{both.relative_distance:.2g}"}
    assert any(text.startswith(f"A = {a}") for text in texts)


def test_names_are_texts_and_no_formulas(workspace: Workspace, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", ["m.0.q$_{", "m.1.$x$"])
    workspace.inspect(path, spectrum=True, plot=tmp_path / "a.svg")
    assert shown(tmp_path / "a.svg") >= {"q$_{", "$x$"}


def test_a_picture_replaces_the_one_that_is_there(workspace: Workspace, tmp_path: Path) -> None:
    picture = tmp_path / "a.pdf"
    picture.write_bytes(b"old")
    workspace.inspect(adapter(tmp_path / "a", FEW), plot=picture)
    assert picture.read_bytes().startswith(b"%PDF")


def test_what_cannot_be_drawn_is_said_at_once(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        workspace.diff("./nothing", "./nobody", plot=tmp_path / "a.jpg")
    with pytest.raises(NotFoundError, match="no such folder"):
        workspace.inspect("./nothing", plot=tmp_path / "none" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoramgrError, match="need matplotlib") as raised:
        workspace.inspect("./nothing", plot=tmp_path / "a.png")
    assert raised.value.hint == 'pip install "loramgr[plot]"'
    assert list(tmp_path.glob("*.png")) == []


def test_the_command_line_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = adapter(tmp_path / "a", FEW)
    assert run(["inspect", path, "--plot", str(tmp_path / "i.png")]) == 0
    assert run(["diff", path, path, "--plot", str(tmp_path / "d.png")]) == 0
    assert str(tmp_path / "d.png") in capsys.readouterr().out
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("i.png", "d.png"))
