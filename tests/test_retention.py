"""prune keeps what it is told to keep, and restore undoes removals exactly, but for tags."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_files import write_adapter

from loramgr import (
    AddOptions,
    IntegrityError,
    LoramgrError,
    NotFoundError,
    Retention,
    UsageError,
    VersionQuery,
    VersionRecord,
    Workspace,
)
from loramgr.store.store import Store

ALL = VersionQuery(all_versions=True)
NOW = timedelta(0)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Return a workspace with four versions of `sql`: losses 4, 1, 1, 3."""
    workspace = Workspace(tmp_path / "home")
    for number, loss in enumerate((4.0, 1.0, 1.0, 3.0), start=1):
        add(workspace, "sql", number, metrics={"loss": loss}, labels={"number": str(number)})
    return workspace


def add(workspace: Workspace, name: str, alpha: int, **options: object) -> VersionRecord:
    folder = write_adapter(workspace.home.parent / f"adapter-{alpha}", lora_alpha=alpha)
    return workspace.add(folder, AddOptions(name=name, **options))  # type: ignore[arg-type]


def numbers(workspace: Workspace, name: str = "sql") -> list[int]:
    return [version.version for version in workspace.log(name)]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Retention(last=1), [4]),
        (Retention(last=3), [4, 3, 2]),
        (Retention(last=9), [4, 3, 2, 1]),
        (Retention(last=1, best=["loss"]), [4, 1]),
        (Retention(last=1, best=["-loss"]), [4, 3, 2]),
        (Retention(last=1, best=["loss", "-loss"]), [4, 3, 2, 1]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(workspace: Workspace, keep: Retention, left: list[int]) -> None:
    gone = [f"sql@v{number}" for number in (4, 3, 2, 1) if number not in left]
    assert workspace.prune("sql", keep, dry_run=True).removed == gone
    assert numbers(workspace) == [4, 3, 2, 1]
    assert workspace.prune("sql", keep).removed == gone
    assert numbers(workspace) == left


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Retention(last=1), [4, 2]),
        (Retention(last=1, tagged=True), [4, 2]),
        (Retention(last=1, force=True), [4]),
        (Retention(last=1, force=True, tagged=True), [4, 2]),
    ],
)
def test_a_tagged_version_goes_only_by_force(workspace: Workspace, keep: Retention, left: list[int]) -> None:
    workspace.tag("sql@v2", "prod")
    workspace.prune("sql", keep)
    assert numbers(workspace) == left


def test_the_parent_of_another_adapters_version_goes_only_by_force_or_with_it(workspace: Workspace) -> None:
    add(workspace, "mix", 11, parents=["sql@v1"])
    add(workspace, "mix", 12, parents=["sql@v2"])
    assert workspace.prune("sql", Retention(last=1), dry_run=True).removed == ["sql@v3"]
    both = workspace.prune(None, Retention(last=1), dry_run=True).removed
    assert both == ["mix@v1", "sql@v3", "sql@v1"]
    assert workspace.prune("sql", Retention(last=1, force=True)).removed == ["sql@v3", "sql@v2", "sql@v1"]


def test_a_parent_under_an_earlier_name_counts(workspace: Workspace) -> None:
    add(workspace, "mix", 11, parents=["sql@v1"])
    workspace.rename("sql", "sequel")
    add(workspace, "sql", 1)
    assert workspace.prune(None, Retention(last=1), dry_run=True).removed == ["sequel@v3", "sequel@v2"]
    workspace.remove("mix")
    assert workspace.prune(None, Retention(last=1), dry_run=True).removed == ["sequel@v3", "sequel@v2", "sequel@v1"]


def test_what_is_kept_for_another_keeps_its_own_parents(workspace: Workspace) -> None:
    add(workspace, "mid", 11, parents=["sql@v1"])
    add(workspace, "mid", 12)
    add(workspace, "top", 13, parents=["mid@v1"])
    assert workspace.prune(None, Retention(last=1), dry_run=True).removed == ["sql@v3", "sql@v2"]


def test_prune_refuses_what_is_likely_a_mistake(workspace: Workspace) -> None:
    with pytest.raises(UsageError):
        workspace.prune("sql", Retention(last=0))
    with pytest.raises(NotFoundError, match="lost"):
        workspace.prune("sql", Retention(last=1, best=["-lost"]))
    with pytest.raises(NotFoundError, match="sqk"):
        workspace.prune("sqk", Retention(last=1))
    assert numbers(workspace) == [4, 3, 2, 1]
    assert Workspace(workspace.home.parent / "empty").prune(None, Retention(last=1)).removed == []


def test_prune_is_one_entry_an_adapter_and_its_undo_one_command(workspace: Workspace) -> None:
    before = workspace.log("sql")
    workspace.prune("sql", Retention(last=1))
    assert [entry.kind for entry in workspace.history("sql")].count("remove") == 1
    assert workspace.restore("sql").version == 3
    assert workspace.log("sql") == before


@pytest.mark.parametrize("ref", ["sql@v2", "DIGEST", "NAME@DIGEST"])
def test_restore_brings_one_version_back(workspace: Workspace, ref: str) -> None:
    before = workspace.log("sql")
    digest = before[2].digest
    workspace.remove("sql@v2", force=True)
    restored = workspace.restore(ref.replace("NAME", "sql").replace("DIGEST", digest[:20]))
    assert restored == before[2]
    assert workspace.log("sql") == before


def test_restore_brings_an_adapter_back_without_what_was_removed_before(workspace: Workspace) -> None:
    workspace.remove("sql@v2", force=True)
    workspace.tag("sql@v3", "prod")
    before = [replace(version, tags=[]) for version in workspace.log("sql")]
    workspace.remove("sql", force=True)
    assert workspace.restore("sql").version == 4
    assert workspace.log("sql") == before
    assert workspace.restore("sql").version == 2
    with pytest.raises(NotFoundError, match="no version of sql is removed"):
        workspace.restore("sql")


def test_one_version_of_a_removed_adapter_brings_the_adapter_back(workspace: Workspace) -> None:
    workspace.remove("sql", force=True)
    assert workspace.restore("sql@v3").version == 3
    assert numbers(workspace) == [3]
    assert workspace.restore("sql").version == 4
    assert numbers(workspace) == [4, 3, 2, 1]
    assert add(workspace, "sql", 20).version == 5


def test_restoring_what_is_there_changes_nothing(workspace: Workspace) -> None:
    before = workspace.history()
    assert workspace.restore("sql@v2").version == 2
    assert workspace.history() == before


@pytest.mark.parametrize(
    ("ref", "error"),
    [
        ("nobody", NotFoundError),
        ("sql", NotFoundError),
        ("sql@v9", NotFoundError),
        ("sql@prod", UsageError),
        ("sql@latest", UsageError),
        ("sha256:0000000", NotFoundError),
    ],
)
def test_what_cannot_be_restored(workspace: Workspace, ref: str, error: type[LoramgrError]) -> None:
    with pytest.raises(error):
        workspace.restore(ref)


def test_a_digest_that_fits_several_removed_versions_is_refused(workspace: Workspace) -> None:
    add(workspace, "copy", 1)
    digest = workspace.log("copy")[0].digest
    workspace.remove("copy")
    workspace.remove("sql@v1", force=True)
    with pytest.raises(UsageError, match="copy@v1, sql@v1"):
        workspace.restore(digest)


def test_restore_takes_files_out_of_the_trash_until_they_are_purged(workspace: Workspace) -> None:
    before = workspace.log("sql")
    workspace.remove("sql", force=True)
    workspace.gc(NOW)
    workspace.restore("sql")
    assert workspace.log("sql") == before
    assert workspace.verify().missing == []
    workspace.remove("sql", force=True)
    workspace.gc(NOW)
    workspace.gc(NOW)
    entries = workspace.history()
    with pytest.raises(IntegrityError, match=r"manifest of sql@v4.*adapter_config\.json of sql@v1"):
        workspace.restore("sql")
    assert workspace.history() == entries


def test_a_damaged_file_in_the_trash_does_not_come_back_and_moves_nothing(workspace: Workspace) -> None:
    gone = workspace.log("sql")[2]
    workspace.remove("sql@v2", force=True)
    workspace.gc(NOW)
    store = Store.open(workspace.home / "store")
    config = next(file.digest for file in gone.files if file.path == "adapter_config.json")
    (place,) = store.trash.holding(store.blobs, config)
    place.path(config).chmod(0o644)
    place.path(config).write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=r"adapter_config\.json of sql@v2"):
        workspace.restore("sql@v2")
    assert not store.manifests.contains(gone.digest)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "tag", "prune", "gc"]), st.sampled_from("ab"), st.integers(1, 3)),
    max_size=10,
)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(actions=ACTIONS, ref=st.sampled_from(["a", "b", "a@v1", "b@v2"]))
def test_restore_undoes_remove_but_for_tags(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, str, int]], ref: str
) -> None:
    workspace = Workspace(tmp_path_factory.mktemp("life") / "home")
    for name in "ab":
        for alpha in (1, 2):
            add(workspace, name, alpha, labels={"alpha": str(alpha)})
    for what, name, number in actions:
        deeds: dict[str, Callable[[], object]] = {
            "add": lambda name=name, number=number: add(workspace, name, number + 2),
            "remove": lambda name=name, number=number: workspace.remove(f"{name}@v{number}", force=True),
            "tag": lambda name=name, number=number: workspace.tag(f"{name}@v{number}", "t", move=True),
            "prune": lambda name=name, number=number: workspace.prune(name, Retention(last=number)),
            "gc": lambda: workspace.gc(NOW),
        }
        with suppress(LoramgrError):
            deeds[what]()
    before = workspace.list(ALL)
    try:
        removed = workspace.remove(ref, force=True).removed
    except NotFoundError:
        return
    workspace.gc(NOW)
    workspace.restore(ref)
    after = [
        replace(version, tags=[]) if f"{version.name}@v{version.version}" in removed else version for version in before
    ]
    assert workspace.list(ALL) == after
    assert workspace.verify().corrupt == []
