"""cloneofsimo's numbered pairs: kept with what is known of them, and refused for merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kohya_files import Network, save_base
from safetensors.torch import save_file

from loramgr import AddOptions, IncompatibleError, Workspace
from loramgr.formats import read_adapter

METADATA = {"unet": '["CrossAttention"]', "unet:0:rank": "2", "<s1>": "<embed>"}
SHAPES = {"unet:0:down": (2, 4), "unet:0:up": (4, 2), "<s1>": (4,)}


def _save(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> Path:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path, metadata)
    return path


def test_a_real_file_is_kept(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "found" / "cloneofsimo-disney"
    adapter = read_adapter(folder)
    assert (adapter.format, adapter.method, set(adapter.ranks.values())) == ("cloneofsimo", "lora", {1})
    assert len(adapter.ranks) == 192
    assert adapter.target_modules == ("Attention", "CLIPAttention", "CrossAttention", "GEGLU")
    assert any("<s1>, <s2>" in said for said in adapter.warnings)
    save_base(tmp_path / "base.safetensors", Network())
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(tmp_path / "base.safetensors", "base")
    added = workspace.add(folder, AddOptions(name="disney"))
    assert (added.format, added.rank) == ("cloneofsimo", 1)
    report = workspace.inspect("disney")
    assert not report.mergeable
    assert "order" in str(report.reason)
    with pytest.raises(IncompatibleError, match="order of the model's code"):
        workspace.merge("base", ["disney"], tmp_path / "merged")


WRONG = {
    "half": ({"unet:0:down": (2, 4)}, METADATA, "no up"),
    "gap": ({name.replace("0", "1"): shape for name, shape in SHAPES.items()}, METADATA, "one by one"),
    "rank": (SHAPES, METADATA | {"unet:0:rank": "3"}, "rank 3"),
    "swapped": ({"unet:0:up": (2, 4), "unet:0:down": (4, 2)}, {}, "look exchanged"),
    "stray": (SHAPES | {"<s2>": (4,)}, METADATA, "<s2>"),
    "table": (SHAPES | {"<s1>": (4, 4)}, METADATA, "<s1>"),
}


@pytest.mark.parametrize(("shapes", "metadata", "message"), WRONG.values(), ids=WRONG)
def test_wrong_files_are_named(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(IncompatibleError, match=message):
        read_adapter(_save(tmp_path / "wrong.safetensors", shapes, metadata))


def test_names_of_nobodys_format_are_told(shared_data: Path) -> None:
    with pytest.raises(IncompatibleError, match="w_a_000"):
        read_adapter(shared_data / "found" / "sam-lora-ranks" / "lora_rank2.safetensors")
