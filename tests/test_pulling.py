"""A pull gives the same versions elsewhere, files only of what was asked for, and nothing half there after a kill."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from crash_stage import SEED, SOAK
from forkserver import ForkServer
from peft_files import write_adapter, write_weights
from remote_homes import filled, joined, make_remote, sound, tree, versions

from loramgr import (
    AddOptions,
    ConflictError,
    IntegrityError,
    NotFoundError,
    PullOptions,
    PushOptions,
    Retention,
    UncheckedError,
    Workspace,
)
from loramgr.digests import digest_bytes
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.remotes.opening import open_remote
from loramgr.remotes.protocol import Remote, RemoteLog, VersionContent
from loramgr.store.store import Store
from loramgr.workspace.fetching import Wanted, fetch

NOW = timedelta(0)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return make_remote(tmp_path / "remote")


@pytest.fixture
def ours(tmp_path: Path, remote: Path, shared_data: Path) -> Workspace:
    """Return a home whose adapters are all at the remote."""
    workspace = filled(tmp_path / "ours", remote, shared_data / "trained" / "minilm")
    workspace.push([])
    return workspace


@pytest.fixture
def fresh(tmp_path: Path, remote: Path, ours: Workspace) -> Workspace:
    return joined(tmp_path / "fresh", remote)


def blobs(workspace: Workspace) -> int:
    return sum(path.is_file() for path in (workspace.home / "store" / "blobs").rglob("*"))


def leftovers(workspace: Workspace) -> list[Path]:
    """Return what a pull that ended is not to leave behind."""
    folders = (workspace.home / "cache" / "partial", workspace.home / "store" / "scratch")
    return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def test_a_clone_has_the_same_versions_and_a_second_one_transfers_nothing(
    tmp_path: Path, remote: Path, ours: Workspace
) -> None:
    home = Workspace(tmp_path / "clone")
    done = home.clone(str(remote))
    assert versions(home) == versions(ours)
    assert [entry for entry in home.history() if entry.log == "adapter"] == [
        entry for entry in ours.history() if entry.log == "adapter"
    ]
    assert (done.transferred, done.entries, done.versions) == (4, 3, ["copy@v1", "sql@v1", "sql@v2"])
    assert leftovers(home) == []
    sound(home)
    again = home.clone(str(remote))
    assert (again.transferred, again.bytes, again.entries, again.versions) == (0, 0, 0, [])
    assert again.skipped == 4 + 2
    home.export("sql@prod", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_pull_brings_the_files_of_one_version_and_promises_the_others(fresh: Workspace, tmp_path: Path) -> None:
    done = fresh.pull(["sql@prod"])
    assert (done.versions, done.transferred, done.entries) == (["sql@v1"], 2, 2)
    assert [version.version for version in fresh.log("sql")] == [2, 1]
    found = fresh.verify()
    assert found.notes == ["sql@v2: its files are at origin, loramgr pull sql@v2 brings them"]
    assert (found.corrupt, found.missing) == ([], [])
    for use in (
        lambda: fresh.export("sql", tmp_path / "out"),
        lambda: fresh.inspect("sql@v2"),
        lambda: fresh.verify(["sql"]),
    ):
        with pytest.raises(NotFoundError, match="the files of sql@v2 are not here, but at origin") as caught:
            use()
        assert caught.value.hint == "loramgr pull sql@v2"
    with pytest.raises(NotFoundError, match="sql@v2 are not here"):
        fresh.home_export(tmp_path / "home.tar")
    assert fresh.gc(NOW).removed == []
    assert [(usage.name, usage.bytes) for usage in fresh.du()] == [("sql", fresh.log("sql")[1].bytes)]
    sound(fresh)
    assert fresh.pull(["sql@v2"]).versions == ["sql@v2"]
    assert fresh.verify().notes == []
    fresh.home_export(tmp_path / "home.tar")
    assert fresh.pull(["sql"], PullOptions(all_versions=True)).transferred == 0
    assert not any((fresh.home / "store" / "promised").iterdir())
    sound(fresh)


def test_a_bare_name_means_the_latest_version_and_a_digest_the_one_it_names(fresh: Workspace, ours: Workspace) -> None:
    assert fresh.pull(["sql"]).versions == ["sql@v2"]
    digest = ours.log("sql")[1].digest
    assert fresh.pull([f"sql@{digest[:20]}"]).versions == ["sql@v1"]
    assert fresh.pull([digest]).versions == []


def test_a_promised_version_that_was_removed_comes_back_promised(fresh: Workspace) -> None:
    fresh.pull(["sql@v1"])
    fresh.remove("sql@v2", force=True)
    fresh.gc(NOW)
    fresh.restore("sql@v2")
    assert fresh.verify().missing == []
    assert fresh.pull(["sql@v2"]).versions == ["sql@v2"]
    sound(fresh)


def test_promises_outlast_prune_and_a_removed_remote_is_asked_about(fresh: Workspace) -> None:
    fresh.pull(["sql@v1"])
    assert fresh.promised_at("origin") == 1
    fresh.prune("sql", Retention(last=1))
    assert fresh.promised_at("origin") == 1
    fresh.pull(["sql"])
    assert fresh.promised_at("origin") == 0


def test_a_dry_run_writes_nothing(fresh: Workspace, remote: Path) -> None:
    before = tree(fresh.home), tree(remote)
    told = fresh.pull([], PullOptions(dry_run=True))
    assert (tree(fresh.home), tree(remote)) == before
    assert fresh.pull([]) == told
    assert told.transferred == 4


def test_what_is_not_there_is_named(fresh: Workspace) -> None:
    for ref in ("absent", "sql@v9", "sql@nosuch", "sql@sha256:00"):
        before = tree(fresh.home)
        with pytest.raises(NotFoundError, match="at origin") as caught:
            fresh.pull([ref])
        assert caught.value.hint == "loramgr remote list-adapters origin"
        assert tree(fresh.home) == before
    fresh.pull(["sql"])
    fresh.remove("sql", force=True)
    with pytest.raises(NotFoundError, match="was removed here") as caught:
        fresh.pull(["sql"])
    assert caught.value.hint == "loramgr restore sql"


def test_one_adapter_that_fails_does_not_stop_the_others(fresh: Workspace, tmp_path: Path) -> None:
    fresh.add(write_adapter(tmp_path / "x"), AddOptions(name="copy"))
    with pytest.raises(ConflictError, match="1 of 2 adapters were not pulled:\ncopy: the name 'copy' is another"):
        fresh.pull([])
    assert [version.version for version in fresh.log("sql")] == [2, 1]
    sound(fresh)


def test_a_log_that_was_rebased_is_taken_by_who_has_nothing_of_his_own(
    ours: Workspace, fresh: Workspace, remote: Path, tmp_path: Path
) -> None:
    """A third home took one side of a fork, which was then rebased and pushed again."""
    third = joined(tmp_path / "third", remote)
    fresh.pull([], PullOptions(all_versions=True))
    fresh.add(write_adapter(tmp_path / "t", lora_alpha=8), AddOptions(name="sql", message="theirs"))
    elsewhere = make_remote(tmp_path / "elsewhere")
    fresh.push(["sql"], PushOptions(str(elsewhere)))
    third.pull(["sql"], PullOptions(str(elsewhere)))
    ours.add(write_adapter(tmp_path / "o", lora_alpha=16), AddOptions(name="sql", message="ours"))
    ours.push(["sql"])
    fresh.push(["sql"], PushOptions(rebase=True))
    done = third.pull(["sql"])
    assert done.notes == ["sql was rebased at origin: its log here is now the one there"]
    assert third.log("sql") == fresh.log("sql")
    sound(third)
    sound(fresh)


def test_an_adapter_that_was_renamed_there_is_found_by_its_old_name(ours: Workspace, fresh: Workspace) -> None:
    fresh.pull(["sql"])
    ours.rename("sql", "postgres")
    ours.push(["postgres"])
    with pytest.raises(NotFoundError, match="the files of sql@v1 are not here"):
        fresh.push(["sql"])
    fresh.pull(["copy"])  # which has the files of sql@v1
    with pytest.raises(ConflictError, match="'sql' is called 'postgres'"):
        fresh.push(["sql"])
    assert fresh.pull(["sql"]).notes == ["sql is called postgres at origin"]
    assert [version.name for version in fresh.list()] == ["copy", "postgres"]
    sound(fresh)


def test_an_archive_fulfils_a_promise_and_leaves_another_origin_out(
    ours: Workspace, tmp_path: Path, remote: Path
) -> None:
    home = Workspace(tmp_path / "fresh")
    home.remote_add("origin", f"file:{remote}/../remote")
    home.pull(["sql@v1"])
    ours.home_export(tmp_path / "home.tar")
    done = home.home_import(tmp_path / "home.tar")
    assert done.notes == ["the remote origin of the archive is left out: here that is another one"]
    assert home.verify().notes == []
    assert versions(home) == versions(ours)
    sound(home)


def test_a_pull_with_rebase_keeps_both(ours: Workspace, fresh: Workspace, tmp_path: Path) -> None:
    fresh.pull(["sql"])
    ours.add(write_adapter(tmp_path / "o", lora_alpha=16), AddOptions(name="sql", message="ours"))
    ours.push(["sql"])
    fresh.add(write_adapter(tmp_path / "t", lora_alpha=8), AddOptions(name="sql", message="theirs"))
    with pytest.raises(ConflictError, match="went on in both places"):
        fresh.pull(["sql"])
    before = tree(fresh.home)
    told = fresh.pull(["sql"], PullOptions(rebase=True, dry_run=True))
    assert tree(fresh.home) == before
    assert told.notes == ["sql@v3 is v4 now: its number was given away at origin"]
    fresh.pull(["sql"], PullOptions(rebase=True))
    assert [version.message for version in fresh.log("sql")] == ["theirs", "ours", "second", "first"]
    sound(fresh)
    assert [row.state for row in fresh.remote_status(names=["sql"])] == ["ahead"]


def test_damage_at_the_remote_gets_no_name_here(ours: Workspace, fresh: Workspace, remote: Path) -> None:
    files = [path for path in (remote / "blobs").rglob("*") if path.is_file()]
    weights = max(files, key=lambda path: path.stat().st_size)
    good = weights.read_bytes()
    weights.chmod(0o644)
    for bad, said in (
        (good[:-1] + b"!", "is damaged there"),
        (good[:-7], "ends after"),
        (good + b"x", "has more"),
    ):
        weights.write_bytes(bad)
        with pytest.raises(IntegrityError, match=said) as caught:
            fresh.pull(["sql@v1"])
        assert caught.value.hint == f"loramgr remote verify file:{remote}"
        assert (fresh.list(), blobs(fresh)) == ([], 0)
        found = fresh.remote_verify()
        assert len(found.corrupt) == 1
        assert found.missing == []
        assert bool(fresh.remote_verify(quick=True).missing) == (len(bad) != len(good))
    weights.unlink()
    with pytest.raises(IntegrityError, match="is missing there"):
        fresh.pull(["sql@v1"])
    weights.write_bytes(good)
    assert fresh.pull(["sql@v1"]).versions == ["sql@v1"]
    assert leftovers(fresh) == []
    sound(fresh)


class Flaky:
    """A source of one file that fails in the ways that it is told, one after the other, and then gives what it has."""

    url = "test:flaky"

    def __init__(self, data: bytes, *ways: str) -> None:
        self.data = data
        self.ways = list(ways)
        self.given: list[tuple[int, int]] = []

    def read_blob(self, name: str, number: int, file: FileRecord, offset: int = 0) -> Iterator[bytes]:
        way = self.ways.pop(0) if self.ways else "well"
        data = self.data[offset:]
        if way == "wrong":
            data = bytes(len(data))
        if way in ("cut", "short"):
            data = data[: len(data) // 2]
        self.given.append((offset, len(data)))
        yield from (data[at : at + 1000] for at in range(0, len(data), 1000))
        if way == "cut":
            raise UncheckedError("the connection was cut")


@pytest.mark.parametrize(
    ("ways", "offsets"),
    [
        ([], [0]),
        (["cut"], [0, 5000]),
        (["cut", "cut", "short"], [0, 5000, 7500, 8750]),
        (["wrong"], [0, 0]),
        (["cut", "wrong"], [0, 5000, 0]),
    ],
)
def test_a_cut_transfer_goes_on_where_it_was(tmp_path: Path, ways: list[str], offsets: list[int]) -> None:
    data = random.Random(SEED).randbytes(10_000)
    source, seen = Flaky(data, *ways), list[int]()
    wanted = Wanted("x", 1, FileRecord("f", digest_bytes(data), len(data)))
    assert fetch(source, wanted, tmp_path, seen.append).read_bytes() == data
    assert [offset for offset, _ in source.given] == offsets


def test_what_an_earlier_pull_left_is_gone_on_with_and_dropped_when_it_is_wrong(tmp_path: Path) -> None:
    data = random.Random(SEED).randbytes(10_000)
    wanted = Wanted("x", 1, FileRecord("f", digest_bytes(data), len(data)))
    for left, offsets in ((data[:4000], [4000]), (data, []), (bytes(4000), [4000, 0]), (data + b"x", [0])):
        (tmp_path / digest_bytes(data)[7:]).write_bytes(left)
        source = Flaky(data)
        assert fetch(source, wanted, tmp_path, lambda _: None).read_bytes() == data
        assert [offset for offset, _ in source.given] == offsets
    (tmp_path / digest_bytes(data)[7:]).unlink()
    with pytest.raises(IntegrityError, match="is damaged there"):
        fetch(Flaky(data, "wrong", "wrong"), wanted, tmp_path, lambda _: None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UncheckedError, match="cut"):
        fetch(Flaky(b"", *["cut"] * 9), wanted, tmp_path, lambda _: None)


def test_a_pull_that_is_killed_goes_on_and_damages_nothing(tmp_path: Path, remote: Path) -> None:
    """The child dies after a random time; whatever it left, the home verifies, and the last pull completes it."""
    ours = joined(tmp_path / "ours", remote)
    for at in range(4):
        folder = write_adapter(tmp_path / "big", lora_alpha=2 + at)
        write_weights(
            folder / "adapter_model.safetensors", {"m.q.lora_A.weight": (2, 500_000 + at), "m.q.lora_B.weight": (6, 2)}
        )
        ours.add(folder, AddOptions(name=f"big{at % 2}"))
    ours.push([])
    home = joined(tmp_path / "fresh", remote)
    server = ForkServer(tmp_path / "io")
    try:
        argv = ["--home", str(home.home), "pull", "--all", "--jobs", "2"]
        told = Workspace(home.home).pull([], PullOptions(dry_run=True))
        assert told.transferred == 8
        generator, died = random.Random(SEED), 0
        for _ in range(200 if SOAK else 8):
            pid = server.start(*argv)
            time.sleep(generator.uniform(0, 0.25))
            os.kill(pid, signal.SIGKILL)
            died += server.wait(pid) != 0
            found = home.verify()
            assert (found.corrupt, found.missing) == ([], [])
        assert died > 2
        pid = server.start(*argv)
        assert server.wait(pid) == 0, server.errors(pid)
    finally:
        server.close()
    assert versions(home) == versions(ours)
    assert (home.home / "cache" / "partial").is_dir()
    assert list((home.home / "cache" / "partial").iterdir()) == []
    sound(home)


def test_logs_that_forked_at_a_remote_are_taken_and_settled(ours: Workspace, remote: Path, tmp_path: Path) -> None:
    """A store without conditional writes keeps both ends; here its description says that it is one."""
    plain = make_remote(tmp_path / "plain")
    (plain / "loramgr.json").write_text('{"heads":"branches","layout":1}')
    one, two, three = (Workspace(tmp_path / name) for name in ("one", "two", "three"))
    for at, home in enumerate((one, two)):
        home.clone(str(remote))
        home.remote_remove("origin")
        home.remote_add("origin", str(plain))
        if not at:
            home.push(["sql"])
        home.add(write_adapter(tmp_path / f"n{at}", lora_alpha=8 * (at + 1)), AddOptions(name="sql", message=f"n{at}"))
    known = open_remote(str(plain), 1).log("sql", lambda _: None)
    one.push(["sql"])
    late = open_remote(str(plain), 1)
    entries = [entry for entry in two.history("sql") if entry.kind == "publish"]
    assert known is not None
    assert len(entries) == 3
    forked = _append_blindly(two, late, known)
    assert len(forked.heads) == 2
    assert [row.state for row in one.remote_status()][-1] == "forked"
    for home in (one, two):
        with pytest.raises(ConflictError, match="went on in two ways"):
            home.push(["sql"])
    three.clone(str(plain))
    assert len(three.log("sql")) == 3
    done = two.push(["sql"], PushOptions(rebase=True))
    assert done.versions == ["sql@v4"]
    assert {row.state for row in two.remote_status(names=["sql"])} == {"same"}
    for home in (one, three):
        home.pull(["sql"], PullOptions(all_versions=True))
        assert [version.message for version in home.log("sql")] == ["n1", "n0", "second", "first"]
        sound(home)
    sound(two)


def _append_blindly(home: Workspace, remote: Remote, known: RemoteLog) -> RemoteLog:
    """Append what a home has beyond a log as it was, as a client does that read it before another one wrote."""
    store = Store.open(home.home / "store")
    (newest, *_) = home.history("sql", limit=1)
    entry = Entry.decode(store.entries.get(newest.digest))
    files = tuple(FileRecord(**file) for file in entry.content["summary"]["files"])
    for file in files:
        remote.put_blob("sql", file, store.blobs.path(file.digest))
    digest = entry.content["version"]
    content = VersionContent(entry.content["number"], digest, store.manifests.get(digest), files)
    return remote.append(known, [entry], [content], store.blobs.path)
