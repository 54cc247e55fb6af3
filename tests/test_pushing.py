"""A push brings what the remote lacks and nothing else, and never takes anything away that others brought."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from peft_files import write_adapter
from remote_homes import filled, joined, make_remote, sound, tree, versions

from loramgr import (
    AddOptions,
    ConflictError,
    IntegrityError,
    NotFoundError,
    PullOptions,
    PushOptions,
    UsageError,
    Workspace,
)
from loramgr.remotes.opening import open_remote

REBASE = PushOptions(rebase=True)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return make_remote(tmp_path / "remote")


@pytest.fixture
def ours(tmp_path: Path, remote: Path, shared_data: Path) -> Workspace:
    return filled(tmp_path / "ours", remote, shared_data / "trained" / "minilm")


@pytest.fixture
def theirs(tmp_path: Path, remote: Path, ours: Workspace) -> Workspace:
    """Return a second home that has what the first one pushed."""
    ours.push([])
    workspace = Workspace(tmp_path / "theirs")
    workspace.clone(str(remote))
    return workspace


def small(folder: Path, alpha: int) -> Path:
    return write_adapter(folder, lora_alpha=alpha)


def test_a_push_arrives_and_a_second_one_transfers_nothing(ours: Workspace, remote: Path) -> None:
    first = ours.push(["sql"])
    assert (first.transferred, first.skipped, first.entries) == (4, 0, 2)
    assert first.versions == ["sql@v1", "sql@v2"]
    assert first.bytes == sum(version.bytes for version in ours.log("sql"))
    before = tree(remote)
    again = ours.push(["sql@prod"])
    assert (again.transferred, again.skipped, again.bytes, again.entries, again.versions) == (0, 4, 0, 0, [])
    assert tree(remote) == before
    assert ours.remote_verify().corrupt == []


def test_shared_files_travel_once(ours: Workspace, tmp_path: Path) -> None:
    ours.push(["sql"])
    done = ours.push(["copy"])
    assert (done.transferred, done.skipped, done.versions) == (0, 2, ["copy@v1"])
    folder = small(tmp_path / "x", 2)
    for at in range(4):
        ours.add(folder, AddOptions(name=f"same{at}"))
    done = ours.push([])
    assert (done.transferred, len(done.versions), done.bytes) == (2, 4, ours.log("same0")[0].bytes)


def test_a_new_version_brings_only_what_is_new(ours: Workspace, tmp_path: Path) -> None:
    ours.add(small(tmp_path / "x", 2))
    ours.push(["x"])
    ours.add(small(tmp_path / "x", 4))
    done = ours.push(["x"])
    assert (done.transferred, done.skipped, done.versions) == (1, 2, ["x@v2"])  # the weights are the same


def test_what_is_said_of_versions_goes_without_their_files(ours: Workspace, theirs: Workspace) -> None:
    ours.tag("sql@v2", "best")
    done = ours.push(["sql"])
    assert (done.transferred, done.entries, done.versions) == (0, 1, [])
    theirs.pull(["sql"])
    assert versions(theirs) == versions(ours)


def test_a_dry_run_writes_nothing(ours: Workspace, remote: Path) -> None:
    before = tree(ours.home), tree(remote)
    told = ours.push([], PushOptions(dry_run=True))
    assert (told.transferred, told.entries, len(told.versions)) == (4, 3, 3)
    assert (tree(ours.home), tree(remote)) == before
    assert ours.push([]) == told


def test_where_both_went_on_nothing_is_overwritten(
    ours: Workspace, theirs: Workspace, remote: Path, tmp_path: Path
) -> None:
    theirs.add(small(tmp_path / "t", 2), AddOptions(name="sql", tags=["theirs"]))
    theirs.push(["sql"])
    ours.add(small(tmp_path / "o", 4), AddOptions(name="sql", tags=["ours"], metrics={"acc": 0.75}))
    ours.add(small(tmp_path / "p", 8), AddOptions(name="other"))
    before = tree(remote)
    with pytest.raises(ConflictError, match=r"went on in both places: here its head is \w+, at origin \w+") as caught:
        ours.push(["sql"])
    assert caught.value.hint == "loramgr push --rebase sql"
    assert tree(remote) == before
    with pytest.raises(ConflictError, match="1 of 3 adapters were not pushed:\nsql: ") as caught:
        ours.push([])
    assert [row.name for row in ours.remote_adapters()] == ["copy", "other", "sql"]


def test_a_rebase_keeps_both_sides_and_all_homes_agree(ours: Workspace, theirs: Workspace, tmp_path: Path) -> None:
    theirs.add(small(tmp_path / "t", 2), AddOptions(name="sql", tags=["theirs"], message="theirs"))
    theirs.push(["sql"])
    mine = AddOptions(name="sql", tags=["ours"], metrics={"acc": 0.75}, labels={"by": "us"}, message="ours")
    added = ours.add(small(tmp_path / "o", 4), mine)
    ours.tag("sql@v1", "prod2")
    told = ours.push(["sql"], PushOptions(rebase=True, dry_run=True))
    done = ours.push(["sql"], REBASE)
    assert done == told
    assert done.notes == ["sql@v3 is v4 now: its number was given away at origin"]
    assert (done.versions, done.transferred, done.entries) == (["sql@v4"], 1, 2)
    newest, middle, *_ = ours.log("sql")
    assert (newest.digest, newest.tags, newest.metrics, newest.labels) == (
        added.digest,
        ["ours"],
        {"acc": 0.75},
        {"by": "us"},
    )
    assert (newest.message, newest.created_at, newest.parents) == ("ours", added.created_at, ["sql@v2"])
    assert (middle.tags, middle.message) == (["theirs"], "theirs")
    with pytest.raises(NotFoundError, match="the files of sql@v3 are not here") as caught:
        ours.export("sql@v3", tmp_path / "out")
    assert caught.value.hint == "loramgr pull sql@v3"
    theirs.pull(["sql"])
    assert versions(theirs) == versions(ours)
    for home in (ours, theirs):
        sound(home)
        assert [row.state for row in home.remote_status()] == ["same", "same"]
    ours.gc(timedelta(0))
    sound(ours)
    ours.pull(["sql"], PullOptions(all_versions=True))
    assert not any("origin" in note for note in ours.verify().notes)
    assert ours.remote_verify() == theirs.remote_verify()


def test_two_adapters_of_one_name_come_to_be_one(ours: Workspace, tmp_path: Path, remote: Path) -> None:
    other = joined(tmp_path / "other", remote)
    other.add(small(tmp_path / "t", 2), AddOptions(name="x", message="theirs"))
    other.push(["x"])
    ours.add(small(tmp_path / "o", 4), AddOptions(name="x", message="ours"))
    with pytest.raises(ConflictError):
        ours.push(["x"])
    with pytest.raises(ConflictError, match="another adapter's here than at origin") as caught:
        ours.pull(["x"])
    assert caught.value.hint == "loramgr rename x NEW, or loramgr pull --rebase x to have both in one"
    ours.push(["x"], REBASE)
    assert [version.message for version in ours.log("x")] == ["ours", "theirs"]
    other.pull(["x"])
    assert other.log("x") == ours.log("x")
    sound(ours)
    sound(other)


def test_a_renamed_adapter_is_renamed_there(ours: Workspace, theirs: Workspace) -> None:
    ours.rename("sql", "postgres")
    ours.push(["postgres"])
    assert [row.name for row in ours.remote_adapters()] == ["copy", "postgres"]
    theirs.pull(["postgres"])
    assert versions(theirs) == versions(ours)
    sound(theirs)


def test_a_removed_version_goes_or_adapter_goes_as_its_tombstone(
    ours: Workspace, theirs: Workspace, remote: Path, tmp_path: Path
) -> None:
    ours.add(small(tmp_path / "x", 2))
    ours.add(small(tmp_path / "x", 4))
    ours.remove("x@v1", force=True)
    done = ours.push(["x"])
    assert (done.versions, done.transferred, done.entries) == (["x@v2"], 2, 3)
    theirs.pull(["x"])
    assert versions(theirs) == versions(ours)
    ours.remove("x", force=True)
    assert ours.push(["x"], PushOptions(dry_run=True)).entries == 1
    assert ours.push(["x"]).entries == 1
    theirs.pull(["x"])
    assert "x" not in {version.name for version in versions(theirs)}
    ours.restore("x")
    ours.push(["x"])
    ours.remove("x", force=True)
    assert ours.push([]).entries > 0
    theirs.pull([])
    assert versions(theirs) == versions(ours)
    assert ours.remote_verify().missing == []


def test_many_at_once_arrive_as_they_do_one_by_one(ours: Workspace, tmp_path: Path) -> None:
    for at in range(4):
        ours.add(small(tmp_path / f"x{at}", at), AddOptions(name=f"x{at}", metrics={"at": 1e20}))
    ours.rename("x0", "first")
    ours.remove("x1", force=True)
    ours.restore("x1")
    for name in ("together", "alone"):
        ours.remote_add(name, str(make_remote(tmp_path / name)))
    ours.push([], PushOptions("together"))
    for adapter in ("copy", "first", "sql", "x1", "x2", "x3"):
        ours.push([adapter], PushOptions("alone"))
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")
    assert all(row.state == "same" for row in ours.remote_status("together"))


def test_a_removed_adapter_that_the_remote_does_not_have_does_not_go(ours: Workspace, tmp_path: Path) -> None:
    ours.add(small(tmp_path / "x", 2))
    ours.remove("x", force=True)
    with pytest.raises(NotFoundError, match="there is no adapter 'x'"):
        ours.push(["x"])
    ours.push([])
    assert "x" not in [row.name for row in ours.remote_status() if row.state != "here"]


def test_a_restored_version_brings_its_files(ours: Workspace, tmp_path: Path) -> None:
    ours.add(small(tmp_path / "x", 2))
    ours.add(small(tmp_path / "x", 4))
    ours.remove("x@v1", force=True)
    ours.push(["x"])
    ours.restore("x@v1")
    done = ours.push(["x"])
    assert (done.versions, done.transferred) == (["x@v1"], 1)
    assert ours.remote_verify().missing == []


def test_damaged_and_absent_files_are_not_pushed(
    ours: Workspace, theirs: Workspace, remote: Path, tmp_path: Path
) -> None:
    third = joined(tmp_path / "third", remote)
    third.pull(["sql@v1"])
    other = make_remote(tmp_path / "elsewhere")
    with pytest.raises(NotFoundError, match="the files of sql@v2 are not here, but at origin") as caught:
        third.push(["sql"], PushOptions(str(other)))
    assert caught.value.hint == "loramgr pull sql@v2"
    added = ours.add(small(tmp_path / "x", 2))
    blob = ours.home / "store" / "blobs" / added.files[0].digest[7:9] / added.files[0].digest[9:]
    blob.chmod(0o644)
    blob.write_bytes(bytes(len(blob.read_bytes())))
    with pytest.raises(IntegrityError):
        ours.push(["x"])
    assert open_remote(str(remote), 1).log("x", lambda _: None) is None


def test_wrong_input_is_refused_before_anything_is_written(ours: Workspace, remote: Path, tmp_path: Path) -> None:
    before = tree(ours.home)
    with pytest.raises(NotFoundError, match="there is no adapter 'absent'"):
        ours.push(["absent"])
    with pytest.raises(NotFoundError, match="there is no remote 'orign'") as caught:
        ours.push(["sql"], PushOptions("orign"))
    assert caught.value.hint == "did you mean origin? loramgr remote list shows all"
    with pytest.raises(NotFoundError):
        ours.push(["sql"], PushOptions(str(tmp_path / "absent")))
    with pytest.raises(UsageError) as refused:
        ours.remote_add("s3", "s3://key:topsecret@bucket/prefix")
    assert "topsecret" not in f"{refused.value.message}{refused.value.hint}"
    assert tree(ours.home) == before
    assert tree(remote) == {}


def test_a_remote_goes_without_saying_where_there_is_one_or_an_origin(tmp_path: Path, remote: Path) -> None:
    home = Workspace(tmp_path / "home")
    home.add(small(tmp_path / "x", 2))
    with pytest.raises(UsageError, match="there is no remote yet"):
        home.push(["x"])
    home.remote_add("one", str(remote))
    assert home.push(["x"]).remote == "one"
    home.remote_add("two", str(make_remote(tmp_path / "two")))
    with pytest.raises(UsageError, match="several remotes, one, two, and none is named origin"):
        home.push(["x"])
    home.remote_add("origin", str(make_remote(tmp_path / "three")))
    assert home.push(["x"]).remote == "origin"
    with pytest.raises(ConflictError, match="belongs to another remote"):
        home.remote_add("two", str(remote))
    home.remote_remove("two")
    assert [each.name for each in home.remote_list()] == ["one", "origin"]
    assert home.remote_add("two", str(remote)).url == f"file:{remote}"
    sound(home)
