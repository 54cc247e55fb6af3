"""Who did what when, and what the bytes in the store are for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_files import write_safetensors
from peft_files import write_adapter

from loramgr import AddOptions, NotFoundError, Usage, Workspace
from loramgr.cli.main import run


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Return a home with a history."""
    workspace = Workspace(tmp_path / "home")
    write_safetensors(tmp_path / "base" / "model.safetensors", {"m.q.weight": (6, 4)})
    workspace.base_add(tmp_path / "base", "tiny")
    for alpha in (2, 4, 8):
        workspace.add(write_adapter(tmp_path / "x", lora_alpha=alpha), AddOptions(base="tiny", tags=[f"t{alpha}"]))
    workspace.tag("x@v1", "prod")
    workspace.tag("x@v2", "prod", move=True)
    workspace.untag("x@prod")
    workspace.metric("x@v1", {"acc": 0.5})
    workspace.rename("x", "y")
    workspace.add(write_adapter(tmp_path / "child", lora_alpha=16), AddOptions(parents=["y@v1"]))
    workspace.remove("y@v1", force=True)
    return workspace


def events(workspace: Workspace, ref: str | None = None, limit: int | None = None) -> list[str]:
    return [f"{entry.name} {entry.kind}" for entry in workspace.history(ref, limit=limit)]


def test_everything_that_happened_newest_first(workspace: Workspace) -> None:
    published = ["x publish"] * 3
    edits = ["y remove", "child publish", "y rename", "x metric", "x untag", "x tag", "x tag"]
    assert events(workspace) == [*edits, *published, "tiny add"]
    assert events(workspace, limit=2) == edits[:2]
    assert events(workspace, limit=0) == []
    newest = workspace.history()[0]
    assert (newest.log, newest.content) == ("adapter", {"numbers": [1], "whole": False})
    assert newest.digest.startswith("sha256:")
    assert newest.author


def test_of_an_adapter_under_its_name_of_today(workspace: Workspace) -> None:
    assert events(workspace, "y") == [event for event in events(workspace) if event.split()[0] in "xy"]
    assert events(workspace, "y", limit=1) == ["y remove"]
    with pytest.raises(NotFoundError):
        workspace.history("x")
    workspace.remove("child", force=True)
    assert events(workspace, "child") == ["child remove", "child publish"]


def test_of_one_version(workspace: Workspace) -> None:
    first = ["y remove", "child publish", "x metric", "x tag", "x tag", "x publish", "x publish"]
    assert events(workspace, "y@v1") == first
    assert events(workspace, "y@v2") == ["x untag", "x tag", "x publish", "x publish"]
    assert events(workspace, "y@t4") == events(workspace, "y@v2")
    assert events(workspace, "y@v3") == ["x publish"]
    assert events(workspace, workspace.log("y")[0].digest) == ["x publish"]
    for ref in ("y@v9", "nobody@v1"):
        with pytest.raises(NotFoundError):
            workspace.history(ref)


def test_people_see_a_table_and_programs_the_entries(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    home = str(workspace.home)
    assert run(["--home", home, "history", "y", "--limit", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3:6] for line in lines[1:]] == [
        ["y", "remove", "v1"],
        ["y", "rename", "from"],
        ["x", "metric", "v1"],
    ]
    assert run(["--home", home, "--json", "history", "y@v1", "--limit", "1"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry.keys() == {"digest", "log", "kind", "name", "time", "author", "content"}
    assert run(["--home", home, "--quiet", "history", "--limit", "1"]) == 0
    assert capsys.readouterr().out == f"{entry['digest']}\n"


def blob_bytes(workspace: Workspace) -> int:
    return sum(path.stat().st_size for path in (workspace.home / "store" / "blobs").rglob("*") if path.is_file())


def test_every_blob_counts_once(workspace: Workspace, tmp_path: Path) -> None:
    rows = {row.name: row.bytes for row in workspace.du()}
    weights = (tmp_path / "x" / "adapter_model.safetensors").stat().st_size
    configs = {name: (tmp_path / name / "adapter_config.json").stat().st_size for name in ("x", "child")}
    assert rows["(shared)"] == weights
    assert rows["y"] == 2 * configs["x"]
    assert rows["child"] == configs["child"]
    assert rows["(removed)"] == configs["x"]
    assert rows.keys() == {"y", "child", "(shared)", "(bases)", "(removed)"}
    assert sum(rows.values()) == blob_bytes(workspace)


def test_by_base_versions_without_one_stand_apart(workspace: Workspace) -> None:
    rows = workspace.du("base")
    assert [row.name for row in rows][:1] == ["tiny"]
    assert {row.name for row in rows} == {"tiny", "(no base)", "(shared)", "(bases)", "(removed)"}
    assert sum(row.bytes for row in rows) == blob_bytes(workspace)


def test_what_gc_set_aside_counts_as_trash(workspace: Workspace) -> None:
    trash = workspace.home / "store" / "trash" / "20260101T000000.000000Z" / "blobs" / "aa"
    trash.mkdir(parents=True)
    (trash / "bb").write_bytes(b"12345")
    assert Usage("(trash)", 5) in workspace.du()


def test_people_see_the_total(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--home", str(workspace.home), "du"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "BYTES"]
    assert lines[-1].startswith("total ")
    assert f"({blob_bytes(workspace):,} bytes)" in lines[-1]
    assert Workspace(workspace.home / "other").du() == []
