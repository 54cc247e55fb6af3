"""verify finds every harm, tells damage from what it could not see, and --repair mends what can be mended."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from model_files import write_safetensors
from peft_files import write_adapter

from loramgr import (
    AddOptions,
    IntegrityError,
    LoramgrError,
    StoreVerification,
    UncheckedError,
    UsageError,
    VersionQuery,
    Workspace,
)
from loramgr.log import Entry
from loramgr.store.blobs import BlobStore
from loramgr.store.store import Store
from loramgr.workspace.home import Home
from loramgr.workspace.repairing import Source, repair
from loramgr.workspace.verifying import Scope

ALL = VersionQuery(all_versions=True)


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory, tinyllama_base: Path) -> Path:
    """Return a home with a base, two adapters, and something of every kind said about them."""
    place = tmp_path_factory.mktemp("stocked")
    workspace = Workspace(place / "home")
    workspace.base_add(tinyllama_base, "tiny")
    for alpha in (4, 8):
        workspace.add(
            write_adapter(place / f"sql-{alpha}", lora_alpha=alpha),
            AddOptions(name="sql", labels={"a": "b"}, metrics={"loss": 0.5}, message="m"),
        )
    workspace.add(write_adapter(place / "other", lora_alpha=16), AddOptions(name="other"))
    workspace.tag("sql@v1", "prod")
    return place / "home"


@pytest.fixture
def workspace(stocked: Path, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(stocked, tmp_path / "home"))


@pytest.fixture
def store(workspace: Workspace) -> Store:
    return Store.open(workspace.home / "store")


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"\0" + path.read_bytes()[1:])


def is_clean(report: StoreVerification) -> bool:
    return (report.corrupt, report.missing, report.unchecked) == ([], [], [])


def config_of(workspace: Workspace, ref: str = "other") -> str:
    version = next(each for each in workspace.list(ALL) if each.name == ref)
    return next(file.digest for file in version.files if file.path == "adapter_config.json")


def test_a_sound_home_is_clean_in_every_scope(workspace: Workspace) -> None:
    everything = workspace.verify()
    assert is_clean(everything)
    assert everything.notes == []
    assert workspace.verify(quick=True).checked == everything.checked
    assert is_clean(workspace.verify(["sql@prod", "other"], sample=(1, 2)))
    assert workspace.verify(repair=True) == everything


def test_the_parts_of_a_sample_are_everything_once(workspace: Workspace, store: Store) -> None:
    entries = len(list(store.entries.digests()))
    files = workspace.verify().checked - entries
    parts = [workspace.verify(sample=(number, 3)).checked - entries for number in (1, 2, 3)]
    assert sum(parts) == files
    damage(store.blobs.path(config_of(workspace)))
    found = [len(workspace.verify(sample=(number, 3)).corrupt) for number in (1, 2, 3)]
    assert sorted(found) == [0, 0, 1]


@pytest.mark.parametrize("sample", [(0, 1), (3, 2), (1, 0), (-1, 5)])
def test_there_is_no_such_part(workspace: Workspace, sample: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="no part"):
        workspace.verify(sample=sample)


@pytest.mark.parametrize("kind", ["blobs", "manifests", "entries"])
@pytest.mark.parametrize("harm", ["corrupt", "missing"])
def test_a_damaged_or_missing_file_is_named(workspace: Workspace, store: Store, kind: str, harm: str) -> None:
    collection: BlobStore = getattr(store, kind)
    versions = workspace.log("other")
    digest = {
        "blobs": config_of(workspace),
        "manifests": versions[0].digest,
        "entries": next(iter(store.entries.digests())),
    }[kind]
    damage(collection.path(digest)) if harm == "corrupt" else collection.discard(digest)
    report = workspace.verify()
    assert any(digest in line for line in getattr(report, harm))
    assert ("other@v1 needs " + digest in report.notes) is (kind != "entries")


def test_quick_sees_sizes(workspace: Workspace, store: Store) -> None:
    path = store.blobs.path(config_of(workspace))
    damage(path)
    assert is_clean(workspace.verify(quick=True))
    path.write_bytes(b"{}")
    (line,) = workspace.verify(quick=True).corrupt
    assert "2 bytes" in line


def test_what_cannot_be_read_is_neither_sound_nor_damaged(
    workspace: Workspace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = config_of(workspace)
    path = store.blobs.path(digest)
    path.unlink()
    path.mkdir()
    report = workspace.verify()
    assert (report.corrupt, report.missing) == ([], [])
    (line,) = report.unchecked
    assert digest in line
    assert workspace.verify(repair=True).unchecked == [line]
    assert path.is_dir()
    with pytest.raises(UncheckedError):
        store.blobs.check(digest)


def test_a_manifest_that_says_something_else_than_the_log(workspace: Workspace, store: Store) -> None:
    first = workspace.log("other")[0]
    entry = next(
        entry
        for entry in (Entry.decode(store.entries.get(digest)) for digest in store.entries.digests())
        if entry.kind == "publish" and entry.name == "other"
    )
    manifest = store.manifests.get(first.digest).replace(b'"lora"', b'"dora"')
    wrong = {**entry.content, "version": store.manifests.put_bytes(manifest)}
    store.entries.discard(entry.digest)
    store.entries.put_bytes(replace(entry, content=wrong).encode())
    workspace.db_rebuild()
    (line,) = Workspace(workspace.home).verify().corrupt
    assert "is not what the log says" in line


def edit(workspace: Workspace, *statements: str) -> None:
    with closing(sqlite3.connect(workspace.home / "catalog.sqlite3")) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            connection.execute(statement)


ROWS = [
    "UPDATE versions SET rank = 3 WHERE number = 1",
    "UPDATE versions SET ranks = '{'",
    "UPDATE versions SET removed = 1 WHERE number = 2",
    "DELETE FROM tags",
    "INSERT INTO labels SELECT root, number, 'x', 'y' FROM versions",
    "UPDATE metrics SET value = -value",
    "UPDATE logs SET next_number = 9",
    "DELETE FROM entries WHERE sequence = 2",
    "UPDATE entries SET digest = 'sha256:' || substr(digest, 9) || 'f' WHERE sequence = 1 AND kind = 'add'",
    "UPDATE entries SET author = x'ff' WHERE sequence = 1",
    "DROP INDEX ix_versions_digest",
    "UPDATE sqlite_master SET sql = replace(sql, 'rank ', 'rbnk ') WHERE name = 'versions'",
]


@pytest.mark.parametrize("statement", ROWS)
def test_damaged_rows_are_found_and_made_again_from_the_logs(workspace: Workspace, statement: str) -> None:
    before = workspace.list(ALL)
    edit(workspace, statement)
    try:
        found = not is_clean(Workspace(workspace.home).verify())
    except IntegrityError:  # too damaged to be opened
        found = True
    assert found
    mended = Workspace(workspace.home).verify(repair=True)
    assert is_clean(mended)
    assert any("made again" in line for line in mended.repaired)
    assert Workspace(workspace.home).list(ALL) == before


def test_a_lost_catalog_is_made_again(workspace: Workspace) -> None:
    before = workspace.list(ALL)
    (workspace.home / "catalog.sqlite3").write_bytes(b"no database" * 100)
    mended = Workspace(workspace.home).verify(repair=True)
    assert is_clean(mended)
    assert len(mended.repaired) == 1
    assert Workspace(workspace.home).list(ALL) == before


def test_rows_are_not_made_from_logs_that_lost_something(workspace: Workspace, store: Store) -> None:
    head = next(entry.digest for entry in workspace.history("sql") if entry.kind == "tag")
    store.entries.discard(head)
    edit(workspace, "DELETE FROM labels")
    report = Workspace(workspace.home).verify(repair=True)
    assert any(head in line for line in report.missing)
    assert report.repaired == []
    assert Workspace(workspace.home).log("sql")[1].tags == ["prod"]


@pytest.mark.parametrize("harm", ["damage", "loss"])
def test_files_come_back_from_the_trash_the_base_and_the_version(workspace: Workspace, store: Store, harm: str) -> None:
    config = config_of(workspace)
    wanted = [
        (store.blobs, config),
        (store.blobs, workspace.base_list()[0].digest),
        (store.manifests, workspace.log("sql")[0].digest),
        (store.entries, workspace.history("sql")[0].digest),
    ]
    workspace.remove("other")
    workspace.gc(timedelta(0))
    workspace.restore("other")
    for collection, digest in (wanted[0], wanted[3]):
        content = collection.get(digest)
        store.trash.take(collection, [digest], datetime.now(UTC))
        collection.put_bytes(content)
    for collection, digest in wanted:
        damage(collection.path(digest)) if harm == "damage" else collection.discard(digest)
    report = workspace.verify(repair=True)
    assert is_clean(report)
    assert len(report.repaired) == len(wanted)
    assert not store.quarantine.folder.exists()


def test_damage_that_nobody_can_mend_is_kept_aside_and_reported(workspace: Workspace, store: Store) -> None:
    digest = config_of(workspace)
    damage(store.blobs.path(digest))
    damaged = store.blobs.path(digest).read_bytes()
    report = workspace.verify(repair=True)
    assert [digest in line for line in report.missing] == [True]
    assert "quarantine" in report.repaired[0]
    (place,) = store.quarantine.holding(store.blobs, digest)
    assert place.path(digest).read_bytes() == damaged
    with pytest.raises(LoramgrError):
        workspace.export("other", workspace.home.parent / "out")
    assert workspace.verify(repair=True).repaired == []


def test_further_sources_are_asked_and_never_believed(workspace: Workspace, store: Store, tmp_path: Path) -> None:
    digest = config_of(workspace)
    content = store.blobs.get(digest)
    store.blobs.discard(digest)
    home = Home.open(workspace.home, 1, False)
    (tmp_path / "right").write_bytes(content)
    (tmp_path / "wrong").write_bytes(b"{}")

    def failing(*_: Any) -> bytes:
        raise OSError("unreachable")

    lying = [
        Source("a", lambda *_: b"{}"),
        Source("b", lambda *_: tmp_path / "wrong"),
        Source("c", lambda *_: tmp_path / "absent"),
        Source("d", lambda *_: None),
        Source("e", failing),
    ]
    assert repair(home, [], Scope(), lying).repaired == []
    report = repair(home, [], Scope(), [*lying, Source("the remote", lambda *_: tmp_path / "right")])
    assert report.repaired == [f"blob {digest}: had again from the remote"]
    assert is_clean(report)


def test_a_damaged_entry_that_never_counted_is_put_aside(workspace: Workspace, store: Store) -> None:
    digest = store.entries.put_bytes(b"{}")
    damage(store.entries.path(digest))
    assert len(workspace.verify().corrupt) == 1
    assert is_clean(workspace.verify(repair=True))
    assert list(store.quarantine.holding(store.entries, digest))


def test_an_entry_of_a_later_loramgr_is_not_put_aside(workspace: Workspace, store: Store) -> None:
    entry = replace(Entry.decode(store.entries.get(next(store.entries.digests()))), kind="sign")
    digest = store.entries.put_bytes(entry.encode())
    (line,) = workspace.verify(repair=True).corrupt
    assert "another version of loramgr" in line
    assert store.entries.contains(digest)


@pytest.mark.parametrize("place", ["store", "trash"])
def test_the_files_of_a_removed_version_count_while_they_can_be_restored(workspace: Workspace, place: str) -> None:
    digest = config_of(workspace)
    workspace.remove("other")
    if place == "trash":
        workspace.gc(timedelta(0))
    report = workspace.verify()
    assert is_clean(report)
    [path] = (workspace.home / "store").rglob(digest.removeprefix("sha256:")[2:])
    assert ("trash" in path.parts) is (place == "trash")
    damage(path)
    report = workspace.verify()
    assert report.checked > 0
    assert [digest in line for line in report.corrupt] == [True]
    mended = workspace.verify(repair=True)
    assert any(digest in line and "quarantine" in line for line in mended.repaired)
    assert is_clean(workspace.verify())
    with pytest.raises(IntegrityError):
        workspace.restore("other")


@pytest.fixture
def merged(workspace: Workspace, tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "base" / "model.safetensors", {"m.q.weight": (6, 4), "m.k.weight": (2, 2)})
    (tmp_path / "base" / "config.json").write_text('{"model_type": "tiny"}')
    workspace.base_add(tmp_path / "base", "small")
    workspace.merge("small", ["sql"], tmp_path / "merged")
    return tmp_path / "merged"


def test_a_merged_folder_that_changed_is_found(workspace: Workspace, merged: Path) -> None:
    before = workspace.verify()
    assert is_clean(before)
    weights = merged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x2a")
    (merged / "config.json").write_text("{}")
    report = workspace.verify()
    assert report.checked == before.checked
    [line] = report.corrupt
    assert line.startswith(f"merged folder {merged}: changed since it was made: ")
    assert "config.json" in line
    assert is_clean(workspace.verify(quick=True))
    assert is_clean(workspace.verify(["sql"]))


def test_a_merged_folder_with_a_damaged_record_or_weights_is_found(workspace: Workspace, merged: Path) -> None:
    record = merged / "loramgr-merge.json"
    whole = record.read_bytes()
    record.write_bytes(whole[:100])
    assert any(str(record) in line for line in workspace.verify().corrupt)
    record.write_bytes(whole)
    (merged / "model.safetensors").unlink()
    report = workspace.verify()
    assert any(str(merged) in line for line in [*report.corrupt, *report.unchecked])


def test_a_merged_folder_that_somebody_took_away_is_forgotten(workspace: Workspace, merged: Path) -> None:
    shutil.rmtree(merged)
    assert is_clean(workspace.verify())
    assert not list((workspace.home / "merged").iterdir())


def test_a_folder_that_is_another_merge_by_now_is_forgotten(workspace: Workspace, merged: Path, tmp_path: Path) -> None:
    shutil.rmtree(merged)
    Workspace(shutil.copytree(workspace.home, tmp_path / "copy")).merge("small", ["other"], merged)
    assert is_clean(workspace.verify())
    assert not list((workspace.home / "merged").iterdir())
