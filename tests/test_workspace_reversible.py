"""Merges that give the base back by themselves: in place, switched, unmerged, resumed, and what stands in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft_files import write_adapter

from loramgr import (
    IncompatibleError,
    IntegrityError,
    LoramgrError,
    MergeOptions,
    NotFoundError,
    UsageError,
    Workspace,
)
from loramgr.checkpoints.journal import JOURNAL
from loramgr.digests import digest_file

torch = pytest.importorskip("torch")
ADAPTERS = ("plain", "wide", "dora", "head")


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base in shards, adapters of several kinds, and a home that knows them."""
    from peft import LoraConfig
    from peft_files import save_with_peft, tiny_llama

    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    model = tiny_llama().to(getattr(torch, request.param))
    model.save_pretrained(root / "base", max_shard_size="1KB")
    (root / "base" / "notes").mkdir()
    (root / "base" / "notes" / "mine.txt").write_text("mine")
    (root / "base" / "link").symlink_to("notes")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"target_modules": ["q_proj", "v_proj"], "r": 3},
        "wide": {"target_modules": "all-linear", "r": 8, "lora_alpha": 5},
        "dora": {"target_modules": ["k_proj"], "use_dora": True},
        "head": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    }
    workspace = Workspace(root / "home")
    workspace.base_add(root / "base", "tiny")
    for name, kind in kinds.items():
        config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **kind)
        live = save_with_peft(root / name, tiny_llama().to(model.dtype), config)
        with torch.no_grad():
            for parameter in live.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        live.save_pretrained(root / name)
        workspace.add(root / name)
    return root


@pytest.fixture
def workspace(world: Path, tmp_path: Path) -> Workspace:
    """Return a home of the test's own, whose base is registered with files elsewhere."""
    return Workspace(shutil.copytree(world / "home", tmp_path / "home"))


@pytest.fixture
def model(world: Path, tmp_path: Path) -> Path:
    """Return a copy of the base to be changed."""
    return shutil.copytree(world / "base", tmp_path / "model", symlinks=True)


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file, by its path; of a link, where it leads."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in (*names, *folders):
            path = Path(root, name)
            if path.is_symlink():
                found[path.relative_to(folder).as_posix()] = str(path.readlink())
            elif path.is_file():
                found[path.relative_to(folder).as_posix()] = digest_file(path)
    return found


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_in_place_and_back(workspace: Workspace, model: Path, tmp_path: Path, adapter: str) -> None:
    before = contents(model)
    report = workspace.merge_in_place(str(model), [adapter])
    workspace.merge("tiny", [adapter], tmp_path / "beside")
    assert report.output_digest == workspace.status(tmp_path / "beside").output_digest
    assert workspace.status(model).modified == []
    assert (model / "notes" / "mine.txt").read_text() == "mine"
    assert workspace.verify_merge(model).ok
    workspace.base_remove("tiny")
    shutil.rmtree(tmp_path / "beside")
    back = workspace.unmerge(model)
    assert (back.source, back.exact, back.base_digest) == ("residual", True, report.base_digest)
    assert contents(model) == before
    assert not list(model.parent.glob(".model*"))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_reversible_merge_needs_no_base(workspace: Workspace, world: Path, tmp_path: Path, adapter: str) -> None:
    output = tmp_path / "merged"
    report = workspace.merge("tiny", [adapter, ("plain", 0.5)], output, MergeOptions(reversible=True))
    workspace.base_remove("tiny")
    back = workspace.unmerge(output, tmp_path / "back")
    assert (back.source, back.base_digest) == ("residual", report.base_digest)
    assert workspace.status(output).modified == []
    base = {name: digest for name, digest in contents(world / "base").items() if name != "link"}
    assert {name: digest for name, digest in contents(tmp_path / "back").items() if name in base} == base


def test_switching_is_merging_anew(workspace: Workspace, model: Path, tmp_path: Path) -> None:
    before = contents(model)
    workspace.merge_in_place(str(model), ["plain"])
    workspace.base_remove("tiny")
    for adapters in (["head"], ["dora"], [("wide", 0.25), "plain"], ["wide"]):
        report = workspace.switch(model, adapters)
        assert [adapter.ref for adapter in report.adapters] == [
            f"{each if isinstance(each, str) else each[0]}@v1" for each in adapters
        ]
        assert workspace.status(model).modified == []
        workspace.base_add(shutil.copytree(model, tmp_path / "copy"), "scratch")
        shutil.rmtree(tmp_path / "copy")
        workspace.base_remove("scratch")
    assert workspace.unmerge(model).source == "residual"
    assert contents(model) == before


def test_switching_gives_the_merge_of_the_base(workspace: Workspace, model: Path, tmp_path: Path) -> None:
    workspace.merge_in_place(str(model), ["head"])
    switched = workspace.switch(model, ["wide"])
    workspace.merge("tiny", ["wide"], tmp_path / "merged")
    assert switched.output_digest == workspace.status(tmp_path / "merged").output_digest
    mine = {name: digest for name, digest in contents(model).items() if not name.startswith("loramgr-")}
    plain = {name: digest for name, digest in contents(tmp_path / "merged").items() if not name.startswith("loramgr-")}
    assert mine == plain | {"link": "notes"}


def test_switching_without_residual_uses_the_base(workspace: Workspace, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    workspace.merge("tiny", ["plain"], output)
    workspace.switch(output, ["wide"])
    assert not (output / "loramgr-residual").exists()
    assert workspace.verify_merge(output).ok
    workspace.base_remove("tiny")
    record = json.loads((output / "loramgr-merge.json").read_text())
    record["base"]["source"] = "/nowhere"
    (output / "loramgr-merge.json").write_text(json.dumps(record))
    before = contents(output)
    with pytest.raises(NotFoundError, match="not at hand"):
        workspace.switch(output, ["plain"])
    assert contents(output) == before


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_numerics_are_recorded_and_replayed(workspace: Workspace, model: Path, numerics: str) -> None:
    before = contents(model)
    report = workspace.merge_in_place(str(model), ["wide"], MergeOptions(numerics=numerics, device="cpu"))
    assert (report.numerics, report.kernel) == (numerics, "torch")
    assert workspace.verify_merge(model).ok
    assert workspace.unmerge(model).source == "residual"
    assert contents(model) == before


def test_merged_weights_that_changed_are_found(workspace: Workspace, model: Path) -> None:
    original = contents(model)
    workspace.merge_in_place(str(model), ["wide"])
    workspace.base_remove("tiny")
    for path in model.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-200::3] = bytes(len(data[-200::3]))
        path.write_bytes(data)
    before = contents(model)
    with pytest.raises((IntegrityError, NotFoundError)):
        workspace.unmerge(model)
    assert contents(model) == before != original


@pytest.mark.parametrize("part", ["residual", "other tensor"])
def test_what_was_changed_since_is_found_and_nothing_is_lost(
    workspace: Workspace, model: Path, world: Path, part: str
) -> None:
    workspace.merge_in_place(str(model), ["plain"])
    changed = json.loads((model / "loramgr-merge.json").read_text())["tensors"][0]["name"]
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    name = index["model.norm.weight"] if part == "other tensor" else index[changed]
    path = model / ("loramgr-residual" if part == "residual" else "") / name
    data = bytearray(path.read_bytes())
    for at in range(1, 12):
        data[-at] ^= 1
    path.unlink()
    path.write_bytes(data)
    before = contents(model)
    workspace.base_remove("tiny")
    record = json.loads((model / "loramgr-merge.json").read_text())
    with pytest.raises((IntegrityError, NotFoundError)):
        workspace.unmerge(model)
    with pytest.raises((IntegrityError, NotFoundError)):
        workspace.switch(model, ["wide"])
    assert contents(model) == before
    workspace.base_add(world / "base", "tiny")
    back = workspace.unmerge(model)
    assert (back.source, back.base_digest) == ("base", record["base_digest"])


def test_a_kept_file_of_the_base_is_checked_before_it_goes_back(
    workspace: Workspace, model: Path, world: Path, tmp_path: Path
) -> None:
    q = "model.layers.0.self_attn.q_proj"
    shapes = {f"{q}.lora_A.weight": (2, 8), f"{q}.lora_B.weight": (8, 2), "score.weight": (4, 8)}
    config = {"target_modules": ["q_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    workspace.merge_in_place(str(model), [str(write_adapter(tmp_path / "four-labels", shapes, **config))])
    kept = model / "loramgr-residual" / "files" / "config.json"
    assert kept.read_bytes() == (world / "base" / "config.json").read_bytes()
    kept.write_text("{}")
    before = contents(model)
    workspace.base_remove("tiny")
    with pytest.raises(NotFoundError, match=r"files/config\.json: not the file that the base had"):
        workspace.unmerge(model)
    assert contents(model) == before
    workspace.base_add(world / "base", "tiny")
    assert workspace.unmerge(model).source == "base"
    assert (model / "config.json").read_bytes() == (world / "base" / "config.json").read_bytes()


def test_an_adapter_that_is_gone_leaves_the_base(workspace: Workspace, model: Path) -> None:
    workspace.merge_in_place(str(model), ["plain"])
    workspace.remove("plain", force=True)
    assert workspace.unmerge(model).source == "base"


def test_refusals(workspace: Workspace, model: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="another dtype"):
        workspace.merge("tiny", ["plain"], tmp_path / "out", MergeOptions(reversible=True, dtype="float64"))
    with pytest.raises(IncompatibleError, match="not a merged model"):
        workspace.switch(model, ["plain"])
    before = contents(model)
    with pytest.raises(UsageError, match="lies in the model folder"):
        workspace.merge(str(model), ["plain"], model / "new" / "out")
    assert contents(model) == before
    workspace.merge_in_place(str(model), ["plain"])
    with pytest.raises(UsageError, match="lies in the model folder"):
        workspace.unmerge(model, model / "out")
    with pytest.raises(IncompatibleError, match="merge already"):
        workspace.merge_in_place(str(model), ["wide"])
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "one.bin")
    with pytest.raises(IncompatibleError, match="no folder of safetensors"):
        workspace.merge_in_place(str(tmp_path / "one.bin"), ["plain"])


def test_too_little_room_is_said_before_anything_is_written(
    workspace: Workspace, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    before = contents(model)
    with pytest.raises(LoramgrError, match="bytes are needed and 1,000 are free"):
        workspace.merge_in_place(str(model), ["plain"])
    assert contents(model) == before


KILLED = """
import os, sys
from loramgr import MergeOptions, Workspace
from loramgr.checkpoints import streaming
close, count = streaming._close, [0]
def closing(*arguments):
    close(*arguments)
    count[0] += 1
    if count[0] == 2:
        os.kill(os.getpid(), 9)
streaming._close = closing
Workspace(sys.argv[1]).merge("tiny", ["wide"], sys.argv[2], MergeOptions(reversible=True))
"""


def test_a_killed_merge_goes_on_where_it_was(workspace: Workspace, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    command = [sys.executable, "-c", KILLED, str(workspace.home), str(output)]
    assert subprocess.run(command, check=False).returncode == -9
    stage = tmp_path / ".merged.loramgr-partial"
    finished = len((stage / JOURNAL).read_text().splitlines()) - 1
    assert finished == 2
    shards = [json.loads(line)[0] for line in (stage / JOURNAL).read_text().splitlines()[1:]]
    stamps = {name: (stage / name).stat().st_mtime_ns for name in shards}
    damaged = stage / shards[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    workspace.merge("tiny", ["wide"], output, MergeOptions(reversible=True))
    assert (output / shards[1]).stat().st_mtime_ns == stamps[shards[1]]
    assert (output / shards[0]).stat().st_mtime_ns != stamps[shards[0]]
    assert not stage.exists()
    assert not (output / JOURNAL).exists()
    assert workspace.verify_merge(output).ok
    workspace.base_remove("tiny")
    assert workspace.unmerge(output, tmp_path / "back").source == "residual"


def test_another_merge_does_not_take_what_a_killed_one_left(workspace: Workspace, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    command = [sys.executable, "-c", KILLED, str(workspace.home), str(output)]
    assert subprocess.run(command, check=False).returncode == -9
    workspace.merge("tiny", ["plain"], output)
    assert workspace.verify_merge(output).ok
    assert not (output / "loramgr-residual").exists()
