"""gc: takes what no log refers to, in two steps, and touches nothing while something is amiss."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_files import write_adapter

from loramgr import AddOptions, IntegrityError, LoramgrError, Retention, VersionQuery, Workspace
from loramgr.log import Entry
from loramgr.store.store import Store
from loramgr.temporary import temporary_folder

NOW = timedelta(0)
ALL = VersionQuery(all_versions=True)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home")


@pytest.fixture
def store(workspace: Workspace) -> Store:
    return Store.create(workspace.home / "store")


def add(workspace: Workspace, name: str, alpha: int = 4) -> None:
    folder = write_adapter(workspace.home.parent / f"{name}-{alpha}", lora_alpha=alpha)
    workspace.add(folder, AddOptions(name=name))


def files(store: Store) -> list[str]:
    return [digest for collection in store.collections for digest in collection.digests()]


def stray(store: Store, **changes: Any) -> Entry:
    """Store an entry that no catalog knows, as a killed command leaves it."""
    last = Entry.decode(store.entries.get(next(store.entries.digests())))
    said = {"log": "adapter", "kind": "label", "name": last.name, "predecessor": last.digest, "time": last.time}
    entry = Entry(**{**said, "author": "tester", "content": {"number": 1, "labels": {"a": "b"}}, **changes})
    store.entries.put_bytes(entry.encode())
    return entry


def test_what_is_referred_to_stays(workspace: Workspace, store: Store) -> None:
    add(workspace, "sql")
    before = files(store)
    report = workspace.gc(NOW)
    assert (report.removed, report.purged, report.bytes) == ([], [], 0)
    assert files(store) == before
    assert not store.trash.folder.exists()


def test_what_was_removed_goes_into_the_trash_and_from_there_in_a_second_run(
    workspace: Workspace, store: Store
) -> None:
    add(workspace, "sql", 4)
    add(workspace, "sql", 8)
    kept = files(store)
    gone = workspace.log("sql")[0]
    workspace.remove("sql@v2")
    dry = workspace.gc(NOW, dry_run=True)
    assert set(kept) < set(files(store)) | {gone.digest}
    first = workspace.gc(NOW)
    config = next(file for file in gone.files if file.path == "adapter_config.json")
    assert first == dry
    assert first.removed == [f"manifest {gone.digest}", f"blob {config.digest}"]
    assert first.bytes > config.bytes
    assert list(store.trash.holding(store.blobs, config.digest))
    second = workspace.gc(NOW)
    assert (second.removed, second.purged) == ([], first.removed)
    assert second.purged_bytes == first.bytes
    assert list(store.trash.folder.iterdir()) == []
    workspace.export("sql", workspace.home.parent / "out")
    assert workspace.verify().missing == []


def test_the_grace_holds_in_the_store_and_in_the_trash(workspace: Workspace, store: Store) -> None:
    digest = store.blobs.put_bytes(b"nobody's")
    add(workspace, "sql")
    assert workspace.gc().removed == []
    yesterday = time.time() - 25 * 3600
    os.utime(store.blobs.path(digest), (yesterday, yesterday))
    assert workspace.gc().removed == [f"blob {digest}"]
    assert workspace.gc().purged == []
    (batch,) = store.trash.folder.iterdir()
    batch.rename(batch.with_name("20200101T000000.000000Z"))
    assert workspace.gc().purged == [f"blob {digest}"]


def test_what_a_kill_left_goes_entries_first_each_after_its_followers(workspace: Workspace, store: Store) -> None:
    add(workspace, "sql")
    before = files(store)
    first = stray(store)
    second = stray(store, predecessor=first.digest)
    report = workspace.gc(NOW)
    assert report.removed == [f"log entry {second.digest}", f"log entry {first.digest}"]
    assert all("label of adapter sql" in note for note in report.notes)
    assert files(store) == before
    assert workspace.verify().notes == []


def test_a_young_stray_keeps_what_it_follows_and_what_it_names(workspace: Workspace, store: Store) -> None:
    add(workspace, "sql")
    blob, manifest = store.blobs.put_bytes(b"file"), store.manifests.put_bytes(b"{}")
    file = {"path": "f", "digest": blob, "bytes": 4}
    old = stray(store)
    summary = {"method": "lora", "base": None, "files": [file]}
    young = stray(store, kind="publish", predecessor=old.digest, content={"version": manifest, "summary": summary})
    past = time.time() - 7200
    for collection, digest in ((store.entries, old.digest), (store.blobs, blob), (store.manifests, manifest)):
        os.utime(collection.path(digest), (past, past))
    assert workspace.gc(timedelta(hours=1)).removed == []
    os.utime(store.entries.path(young.digest), (past, past))
    assert len(workspace.gc(timedelta(hours=1)).removed) == 4


def test_temporary_files_of_the_dead_are_swept_and_those_of_the_living_stay(workspace: Workspace, store: Store) -> None:
    add(workspace, "sql")
    scratch, home = store.root / "scratch", workspace.home
    (scratch / "tmpdead").write_bytes(b"half")
    for left in (home / ".catalog-dead", home / ".store-dead", scratch / "tmpfolder"):
        left.mkdir()
        (left / "file").write_bytes(b"half")
    assert workspace.gc().removed == []
    with temporary_folder(scratch) as alive:
        report = workspace.gc(NOW)
        assert alive.is_dir()
    names = [".catalog-dead", ".store-dead", "store/scratch/tmpdead", "store/scratch/tmpfolder"]
    assert sorted(report.removed) == [f"temporary file {name}" for name in names]
    assert report.bytes == 16
    assert sorted(path.name for path in home.iterdir()) == ["catalog.sqlite3", "store"]
    assert list(scratch.iterdir()) == []


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"{" + path.read_bytes())


def a_damaged_entry(workspace: Workspace, store: Store) -> None:
    damage(store.entries.path(next(store.entries.digests())))


def a_lost_entry(workspace: Workspace, store: Store) -> None:
    store.entries.discard(next(store.entries.digests()))


def a_damaged_stray(workspace: Workspace, store: Store) -> None:
    damage(store.entries.path(stray(store).digest))


def a_stray_after_nothing(workspace: Workspace, store: Store) -> None:
    stray(store, predecessor="sha256:" + "0" * 64)


def an_entry_of_a_later_loramgr(workspace: Workspace, store: Store) -> None:
    stray(store, kind="sign")


def a_lost_blob(workspace: Workspace, store: Store) -> None:
    store.blobs.discard(workspace.log("sql")[0].files[0].digest)


def a_lost_manifest(workspace: Workspace, store: Store) -> None:
    store.manifests.discard(workspace.log("sql")[0].digest)


def a_catalog_of_before(workspace: Workspace, store: Store) -> None:
    """Take the newest entry out of the catalog, but for the head of its log."""
    import sqlite3

    with sqlite3.connect(workspace.home / "catalog.sqlite3") as connection:
        connection.execute("DELETE FROM entries WHERE sequence = 2")
    connection.close()


@pytest.mark.parametrize(
    "harm",
    [
        a_damaged_entry,
        a_lost_entry,
        a_damaged_stray,
        a_stray_after_nothing,
        an_entry_of_a_later_loramgr,
        a_lost_blob,
        a_lost_manifest,
        a_catalog_of_before,
    ],
)
def test_nothing_is_touched_while_something_is_amiss(
    workspace: Workspace, store: Store, harm: Callable[[Workspace, Store], None]
) -> None:
    add(workspace, "sql")
    workspace.tag("sql", "prod")
    store.blobs.put_bytes(b"nobody's")
    store.trash.take(store.blobs, [store.blobs.put_bytes(b"old")], datetime(2020, 1, 1, tzinfo=UTC))
    harm(workspace, store)
    before = sorted(store.root.rglob("*"))
    for dry_run in (True, False):
        with pytest.raises(IntegrityError):
            workspace.gc(NOW, dry_run=dry_run)
    assert sorted(store.root.rglob("*")) == sorted({*before, store.root / "lock"})


ACTIONS = st.tuples(
    st.sampled_from(["add", "add", "remove", "whole", "restore", "back", "prune", "tag", "rename", "gc"]),
    st.sampled_from(["a", "b"]),
    st.integers(1, 4),
)


def act(workspace: Workspace, what: str, name: str, number: int, adapters: Path) -> None:
    """Do one thing, if it can be done."""
    deeds: dict[str, Callable[[], object]] = {
        "add": lambda: workspace.add(adapters / str(number), AddOptions(name=name)),
        "remove": lambda: workspace.remove(f"{name}@v{number}", force=True),
        "whole": lambda: workspace.remove(name, force=True),
        "restore": lambda: workspace.restore(f"{name}@v{number}"),
        "back": lambda: workspace.restore(name),
        "prune": lambda: workspace.prune(None, Retention(last=number, force=True)),
        "tag": lambda: workspace.tag(f"{name}@v{number}", "t", move=True),
        "rename": lambda: workspace.rename(name, "c" if name == "a" else "a"),
        "gc": lambda: workspace.gc(timedelta(0)),
    }
    with suppress(LoramgrError):
        deeds[what]()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for number in range(1, 5):
        write_adapter(folder / str(number), lora_alpha=number)
    return folder


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, min_size=5, max_size=20))
def test_after_any_life_everything_live_is_there_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, adapters: Path, actions: list[tuple[str, str, int]]
) -> None:
    place = tmp_path_factory.mktemp("life")
    workspace = Workspace(place / "home")
    workspace.add(adapters / "1", AddOptions(name="a"))
    for action in actions:
        act(workspace, *action, adapters)
    workspace.gc(timedelta(0))
    check = workspace.verify()
    assert (check.corrupt, check.missing, check.unchecked, check.notes) == ([], [], [], [])
    versions = workspace.list(ALL)
    for version in versions:
        workspace.export(f"{version.name}@v{version.version}", place / f"{version.name}-{version.version}")
    store = Store.open(workspace.home / "store")
    assert {*store.manifests.digests()} == {version.digest for version in versions}
    assert {*store.blobs.digests()} == {file.digest for version in versions for file in version.files}
    workspace.db_rebuild()
    assert Workspace(workspace.home).list(ALL) == versions
