"""Many adapters at once: every one is added, in order, and one that fails takes no other along."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from model_files import write_safetensors
from peft_files import write_adapter, write_weights

from loramgr import (
    AddOptions,
    ConflictError,
    IncompatibleError,
    IntegrityError,
    NotFoundError,
    UsageError,
    VersionQuery,
    Workspace,
    to_json,
)
from loramgr.cli.main import run
from loramgr.workspace import adding

EVERY = VersionQuery(all_versions=True)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home")


def adapter(folder: Path, alpha: int) -> Path:
    folder.mkdir(parents=True)
    return write_adapter(folder, lora_alpha=alpha)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder with a run of three checkpoints and its end, and two single adapters."""
    root = tmp_path / "runs"
    for alpha, name in enumerate(["sql/checkpoint-100", "sql/checkpoint-5", "sql/checkpoint-20", "b", "deep/er/c"], 2):
        adapter(root / name, alpha)
    write_adapter(root / "sql", lora_alpha=1)
    adapter(root / "too" / "deep" / "for" / "this", 30)
    adapter(root / ".hidden", 31)
    (root / "linked").symlink_to(root / "b")
    return root


def spoil(folder: Path) -> Path:
    """Put NaN into an adapter."""
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + struct.pack("<f", float("nan")))
    return folder


def test_all_are_added_and_the_checkpoints_of_a_run_are_versions_in_its_order(workspace: Workspace, runs: Path) -> None:
    addition = workspace.add_all(runs)
    assert addition.failed == {}
    assert [(each.name, each.version, each.alpha) for each in addition.added] == [
        ("b", 1, 5), ("c", 1, 6), ("sql", 1, 3), ("sql", 2, 4), ("sql", 3, 2), ("sql", 4, 1),
    ]  # fmt: skip
    assert [each.parents for each in workspace.log("sql")] == [["sql@v3"], ["sql@v2"], ["sql@v1"], []]
    assert all(each.created for each in addition.added)
    found = workspace.verify()
    assert (found.corrupt, found.missing, found.notes) == ([], [], [])


def test_together_they_are_what_they_are_alone(workspace: Workspace, runs: Path, tmp_path: Path) -> None:
    alone = Workspace(tmp_path / "other")
    for each in workspace.add_all(runs).added:
        folder = next(path for path in adding.find_adapters(runs).adapters if json.loads(
            (path / "adapter_config.json").read_text())["lora_alpha"] == each.alpha)  # fmt: skip
        record = alone.add(folder)
        assert to_json(record) | {"created_at": None} == to_json(each) | {"created_at": None}


def test_adding_again_adds_what_is_missing(workspace: Workspace, runs: Path) -> None:
    workspace.add_all(runs)
    adapter(runs / "new", 40)
    again = workspace.add_all(runs)
    assert [each.name for each in again.added if each.created] == ["new"]
    assert len(workspace.list(EVERY)) == 7
    assert len(workspace.history()) == 7


def test_one_that_fails_stops_no_other(workspace: Workspace, runs: Path) -> None:
    spoil(runs / "b")
    (runs / "sql" / "checkpoint-20" / "adapter_model.safetensors").write_bytes(b"short")
    addition = workspace.add_all(runs)
    assert [(each.name, each.alpha) for each in addition.added] == [("c", 6), ("sql", 3), ("sql", 2), ("sql", 1)]
    assert {Path(path).name: type(error) for path, error in addition.failed.items()} == {
        "b": IncompatibleError, "checkpoint-20": IntegrityError,
    }  # fmt: skip
    with pytest.raises(IncompatibleError, match=r"2 of 6 adapters were not added:\n.*NaN.*\n.*checkpoint-20.*too few"):
        addition.check()
    assert workspace.verify().notes == []
    assert list((workspace.home / "store" / "scratch").iterdir()) == []


def test_what_only_failed_adapters_have_does_not_stay(workspace: Workspace, runs: Path) -> None:
    workspace.add_all(runs)
    before = {path for path in (workspace.home / "store").rglob("*") if path.is_file()}
    for name in ("x", "y"):
        spoil(adapter(runs / name, 50))
    assert len(workspace.add_all(runs).failed) == 2
    left = {path for path in (workspace.home / "store").rglob("*") if path.is_file()} - before
    assert left == set()


def test_names_that_would_be_shared_tell_the_folders_between(workspace: Workspace, tmp_path: Path) -> None:
    for at, name in enumerate(["m/lic", "n/lic/checkpoint-1", "n/lic", "n/py"], 1):
        (tmp_path / "all" / name).mkdir(parents=True, exist_ok=True)
        write_adapter(tmp_path / "all" / name, lora_alpha=at)
    added = workspace.add_all(tmp_path / "all").added
    assert [(each.name, each.version) for each in added] == [("m-lic", 1), ("n-lic", 1), ("n-lic", 2), ("py", 1)]
    assert "called m-lic, for another one is called lic as well" in added[0].warnings[0]


def test_names_that_are_the_same_all_the_same_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    for at, name in enumerate(["A", "a", "-a"], 1):
        adapter(tmp_path / "all" / name, at)
    addition = workspace.add_all(tmp_path / "all")
    assert len(addition.added) == 1
    assert {type(error) for error in addition.failed.values()} == {ConflictError}


def test_one_name_for_all_and_the_tag_for_the_last(workspace: Workspace, runs: Path) -> None:
    addition = workspace.add_all(runs, AddOptions(name="one", tags=["prod"], labels={"k": "v"}))
    assert [(each.name, each.version) for each in addition.added] == [("one", number) for number in range(1, 7)]
    assert [each.tags for each in addition.added] == [[]] * 5 + [["prod"]]
    assert {tuple(each.labels) for each in addition.added} == {("k",)}


def test_a_tag_that_is_taken_fails_alone(workspace: Workspace, runs: Path, tmp_path: Path) -> None:
    workspace.add(adapter(tmp_path / "b", 60), AddOptions(tags=["prod"]))
    addition = workspace.add_all(runs, AddOptions(tags=["prod"]))
    assert [Path(path).name for path in addition.failed] == ["b"]
    assert [each.tags for each in addition.added] == [["prod"], [], [], [], ["prod"]]
    assert [each.version for each in workspace.log("b")] == [1]
    assert workspace.verify().corrupt == []
    gone = {digest for digest in workspace._opened.store.manifests.digests()}
    assert len(gone) == 6


@pytest.mark.parametrize("options", [AddOptions(metrics={"acc": 1.0}), AddOptions(parents=["x"])])
def test_what_is_about_one_adapter_is_refused(workspace: Workspace, runs: Path, options: AddOptions) -> None:
    with pytest.raises(UsageError, match="about one adapter"):
        workspace.add_all(runs, options)


def test_there_has_to_be_an_adapter(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        with pytest.raises(NotFoundError):
            workspace.add_all(tmp_path / folder)


def test_groups_follow_each_other(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adding, "GROUP", 3)
    for at in range(1, 12):
        adapter(tmp_path / "run" / f"checkpoint-{at}", at)
    added = workspace.add_all(tmp_path / "run").added
    assert [(each.version, each.alpha) for each in added] == [(at, at) for at in range(1, 12)]
    assert workspace.db_rebuild().forks == []
    assert workspace.log("run") == [*reversed(workspace.list(VersionQuery(all_versions=True, sort="created")))]


def test_a_failing_group_leaves_what_was_acknowledged_and_nothing_else(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "GROUP", 2)
    for at in range(1, 8):
        adapter(tmp_path / "run" / f"checkpoint-{at}", at)
    settled = adding.StoreBatch.settle_entries
    calls = iter(range(10))

    def full(batch: adding.StoreBatch, logs: list[list[str]]) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        settled(batch, logs)

    monkeypatch.setattr(adding.StoreBatch, "settle_entries", full)
    with pytest.raises(OSError, match="No space"):
        workspace.add_all(tmp_path / "run")
    assert [each.alpha for each in workspace.log("run")] == [2, 1]
    assert workspace.verify().notes == []
    assert list((workspace.home / "store" / "scratch").iterdir()) == []
    blobs = [path for path in (workspace.home / "store" / "blobs").rglob("*") if path.is_file()]
    assert len(blobs) == 3  # two configurations, one file of weights
    monkeypatch.undo()
    assert [each.created for each in workspace.add_all(tmp_path / "run").added] == [False] * 2 + [True] * 5


def test_bases_are_matched(workspace: Workspace, runs: Path, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "base" / "model.safetensors", {"m.q.weight": (6, 4)})
    write_safetensors(tmp_path / "wrong" / "model.safetensors", {"m.q.weight": (7, 4)})
    workspace.base_add(tmp_path / "base", "tiny")
    workspace.base_add(tmp_path / "wrong", "wrong")
    assert {each.base and each.base.name for each in workspace.add_all(runs, AddOptions(base="tiny")).added} == {"tiny"}
    addition = workspace.add_all(runs, AddOptions(base="wrong"))
    assert (addition.added, len(addition.failed)) == ([], 6)
    assert len(workspace.add_all(runs, AddOptions(base=str(tmp_path / "base"))).added) == 6


def line(*arguments: str | Path) -> int:
    return run([str(argument) for argument in arguments])


def test_the_command_adds_a_folder_and_tells_what_failed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(runs / "b")
    assert line("add", runs, "--json") == 6
    output = capsys.readouterr()
    records = json.loads(output.out)
    assert [(each["name"], each["version"], each["created"]) for each in records] == [
        ("c", 1, True), *[("sql", at, True) for at in range(1, 5)],
    ]  # fmt: skip
    error = json.loads(output.err[output.err.index('{\n  "error"') :])["error"]
    assert error["kind"] == "incompatible"
    assert "1 of 6 adapters were not added" in error["message"]


def test_an_adapter_is_one_unless_all_are_asked_for(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("add", runs / "sql", "--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == 1
    assert line("add", runs / "sql", "--all", "--json") == 0
    assert [each["alpha"] for each in json.loads(capsys.readouterr().out)] == [3, 4, 2, 1]
    shutil.rmtree(runs / "sql")
    assert line("-q", "add", runs) == 0
    assert capsys.readouterr().out == "b@v1\nc@v1\n"


def test_files_side_by_side_are_adapters_by_themselves(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    (folder / "alone").mkdir(parents=True)
    for name, rank in (("sharp", 2), ("soft-000010", 3), ("alone/x", 4)):
        shapes = {"lora_unet_q.lora_down.weight": (rank, 4), "lora_unet_q.lora_up.weight": (6, rank)}
        write_weights(folder / f"{name}.safetensors", {f"!{key}": shape for key, shape in shapes.items()})
    write_weights(folder / "model.safetensors", {"!model.embed_tokens.weight": (2, 2)})
    (folder / "torn.gguf").write_bytes(b"GGUF\3\0")
    assert workspace.holds_several(folder)
    addition = workspace.add_all(folder)
    assert [(each.name, each.rank) for each in addition.added] == [("alone", 4), ("sharp", 2), ("soft-000010", 3)]
    assert addition.skipped == {str(folder / "model.safetensors"): "weights of a model, whole or a shard"}
    assert {Path(path).name: error.exit_code for path, error in addition.failed.items()} == {"torn.gguf": 5}
