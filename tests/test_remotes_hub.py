"""A hub as a remote, over the real client and a hub on 127.0.0.1; `test_the_older_client` runs most of it with 1.x."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from fake_hub import FakeHub
from hub_parcels import fetched, log_of, nothing, push
from peft_files import write_adapter

from loramgr.digests import digest_bytes
from loramgr.errors import ConflictError, IntegrityError, LoramgrError, NotFoundError, UncheckedError, UsageError
from loramgr.records import FileRecord
from loramgr.remotes.hub_client import HubClient
from loramgr.remotes.opening import open_remote
from loramgr.remotes.protocol import Remote
from loramgr.workspace.hub_pulling import pull_foreign
from loramgr.workspace.options import AddOptions, PullOptions, PushOptions
from loramgr.workspace.workspace import Workspace

SOAK = bool(os.environ.get("LORAMGR_SOAK"))
OLDER = Path(__file__).resolve().parents[1] / ".cache" / "huggingface_hub-1.33"
README = "---\nlicense: mit\n---\n# By hand\n\nbytes stay: \t \n"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Return a home with `sql`: three versions, tags, a label and metrics; v3 has v1's weights and no README."""
    workspace = Workspace(tmp_path / "home", jobs=2)
    for number, rank in ((1, 2), (2, 3), (3, 2)):
        folder = adapter(tmp_path / f"run{number}", rank, README if number < 3 else None)
        workspace.add(folder, AddOptions(name="sql", message=f"run | {number}", force=True))
    workspace.tag("sql@v1", "prod")
    workspace.metric("sql@v3", {"acc": 0.75})
    workspace.label("sql@v1", {"team": "data"})
    return workspace


def adapter(folder: Path, rank: int, readme: str | None, **config: Any) -> Path:
    shapes = {"m.q.lora_A.weight": (rank, 4), "m.q.lora_B.weight": (6, rank)}
    base = {"base_model_name_or_path": "org/base"}
    write_adapter(folder, shapes, r=rank, **{**base, **config})
    if readme is not None:
        (folder / "README.md").write_bytes(readme.encode())
    return folder


def opened(hub: FakeHub, place: str = "org", options: str = "") -> Remote:
    return open_remote(f"hf:{place}{options}", 4)


def files_of(workspace: Workspace, name: str) -> dict[tuple[int, str], bytes]:
    blobs = workspace._opened.store.blobs
    return {(v.version, file.path): blobs.get(file.digest) for v in workspace.log(name) for file in v.files}


@pytest.mark.parametrize("place", ["org", "org/of-sql"])
@pytest.mark.parametrize("wrong_parent", [409, 412])
def test_what_is_pushed_comes_back(hub: FakeHub, workspace: Workspace, place: str, wrong_parent: int) -> None:
    hub.wrong_parent, hub.page = wrong_parent, 3
    log, _ = push(workspace, opened(hub, place), "sql")
    assert [entry.digest for entry in log.entries] == [entry.digest for entry in log_of(workspace, "sql")]
    found = fetched(opened(hub, place), "sql")
    assert found["log"] == [entry.digest for entry in log.entries]
    assert found["files"] == files_of(workspace, "sql")
    assert opened(hub, place).names() == ["sql"]
    assert [each.name for each in opened(hub, place).logs(nothing)] == ["sql"]


def test_each_version_is_a_commit_with_a_tag(hub: FakeHub, workspace: Workspace) -> None:
    push(workspace, opened(hub), "sql")
    repository = hub.repositories["org/sql"]
    assert [commit.title for commit in repository.history] == ["initial commit", "sql v1", "sql v2", "sql v3"]
    assert repository.tags == {f"v{number}": repository.history[number].oid for number in (1, 2, 3)}
    for number in (1, 2, 3):
        files = repository.history[number].files
        for (version, path), data in files_of(workspace, "sql").items():
            if version == number and path != "README.md":
                assert files[path].data == data
    newest = repository.history[-1].files
    assert [path for path in newest if path.startswith("loramgr/blobs/")] == []  # v3 has no README
    card = newest["README.md"].data.decode()
    assert card.startswith("---\nbase_model: org/base\nlibrary_name: peft\n")
    for said in ("# sql v3", "| rank | 2 |", "| acc | 0.75 |", "| targets | q |", "run \\| 3"):
        assert said in card
    assert "license: mit" in repository.history[2].files["README.md"].data.decode()
    commits = [path for method, path, _ in hub.requests if method == "POST" and "/commit/" in path]
    assert len(commits) == 3


def test_a_second_push_brings_only_what_is_new(hub: FakeHub, workspace: Workspace, tmp_path: Path) -> None:
    remote = opened(hub)
    push(workspace, remote, "sql")
    assert len(hub.uploads) == 2  # v3 has the weights of v1
    hub.uploads.clear()
    hub.requests.clear()
    assert push(workspace, remote, "sql")[1] == 0
    assert [method for method, _, _ in hub.requests if method != "GET"] == []
    workspace.add(adapter(tmp_path / "next", 2, "# only this is new\n"), AddOptions(name="sql"))
    assert push(workspace, remote, "sql")[1] == 1
    assert hub.uploads == []
    workspace.metric("sql@v4", {"acc": 0.5})
    push(workspace, remote, "sql")
    assert "| acc | 0.5 |" in hub.repositories["org/sql"].history[-1].files["README.md"].data.decode()


def test_versions_are_found_without_their_tags(hub: FakeHub, workspace: Workspace) -> None:
    push(workspace, opened(hub), "sql")
    repository = hub.repositories["org/sql"]
    repository.tags = {"v1": repository.history[-1].oid, "v2": repository.history[0].oid}
    hub.push("org/sql", {"README.md": b"---\ntags: [loramgr]\n---\nedited on the page"})
    assert fetched(opened(hub), "sql")["files"] == files_of(workspace, "sql")


def test_a_commit_by_hand_does_not_stop_a_push(hub: FakeHub, workspace: Workspace) -> None:
    remote = opened(hub)
    push(workspace, remote, "sql")
    found = remote.log("sql", nothing)
    hub.push("org/sql", {"notes.txt": b"by hand"})
    workspace.tag("sql@v2", "next")
    log, _ = push(workspace, remote, "sql", found)
    assert [entry.digest for entry in log.entries] == [entry.digest for entry in log_of(workspace, "sql")]
    assert hub.repositories["org/sql"].history[-1].files["notes.txt"].data == b"by hand"


@pytest.mark.parametrize("wrong_parent", [409, 412])
def test_whoever_comes_second_is_told(hub: FakeHub, workspace: Workspace, tmp_path: Path, wrong_parent: int) -> None:
    hub.wrong_parent = wrong_parent
    remote = opened(hub)
    found, _ = push(workspace, remote, "sql")
    archive = tmp_path / "home.tar"
    workspace.home_export(archive)
    other = Workspace(tmp_path / "other")
    other.home_import(archive)
    workspace.tag("sql@v1", "ours")
    other.tag("sql@v1", "theirs")
    theirs = opened(hub)
    theirs.log("sql", nothing)
    push(workspace, remote, "sql", found)
    before = [commit.oid for commit in hub.repositories["org/sql"].history]
    with pytest.raises(ConflictError) as told:
        push(other, theirs, "sql", found)
    assert told.value.hint == "loramgr push --rebase sql"
    heads = [log_of(home, "sql")[-1].digest for home in (workspace, other)]
    assert all(head.removeprefix("sha256:")[:12] in told.value.message for head in heads)
    assert [commit.oid for commit in hub.repositories["org/sql"].history] == before


def race(homes: list[Workspace], remotes: list[Remote]) -> list[LoramgrError | None]:
    """Push from all homes at once, each on what it read before; return what each was told."""
    outcomes: list[LoramgrError | None] = [None for _ in homes]
    barrier = threading.Barrier(len(homes))

    def run(index: int) -> None:
        found = remotes[index].log("sql", nothing)
        barrier.wait()
        try:
            push(homes[index], remotes[index], "sql", found)
        except LoramgrError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(homes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_two_at_once_lose_nothing(hub: FakeHub, tmp_path: Path) -> None:
    """Of two clients that push to one name at once, one is told, and what the other pushed is there."""
    homes = [Workspace(tmp_path / name, jobs=1) for name in ("a", "b")]
    homes[0].add(adapter(tmp_path / "first", 2, None), AddOptions(name="sql"))
    push(homes[0], opened(hub), "sql")
    homes[0].home_export(tmp_path / "home.tar")
    homes[1].home_import(tmp_path / "home.tar")
    remotes = [opened(hub) for _ in homes]
    repository = hub.repositories["org/sql"]
    for turn in range(100 if SOAK else 4):
        hub.wrong_parent = (409, 412)[turn % 2]
        repository.history = repository.history[:2]  # as after the first push
        for index, home in enumerate(homes):
            home.metric("sql@v1", {"turn": turn + index / 2})
        outcomes = race(homes, remotes)
        there = opened(hub).log("sql", nothing)
        assert there is not None
        lasts = [log_of(home, "sql")[-1].digest for home in homes]
        assert sorted(isinstance(outcome, ConflictError) for outcome in outcomes) == [False, True]
        assert there.heads == (lasts[outcomes.index(None)],)


def test_what_has_a_purpose_is_not_replaced(hub: FakeHub, workspace: Workspace) -> None:
    hub.create("org/sql", {"model.safetensors": b"x" * 64})
    with pytest.raises(ConflictError, match=r"holds model\.safetensors, which loramgr did not push"):
        push(workspace, opened(hub), "sql")
    hub.create("org/other", {"README.md": b"# to come"})
    push(workspace, opened(hub, "org/other"), "sql")
    hub.create("org/third")
    hub.repositories["org/third"].tags["v2"] = hub.repositories["org/third"].history[0].oid
    with pytest.raises(ConflictError, match="the git tag v2 is there already") as told:
        push(workspace, opened(hub, "org/third"), "sql")
    assert told.value.hint == "hf repos tag delete org/third v2"
    assert len(hub.repositories["org/third"].history) == 1


def test_one_repository_holds_one_adapter(hub: FakeHub, workspace: Workspace, tmp_path: Path) -> None:
    push(workspace, opened(hub, "org/one"), "sql")
    workspace.add(adapter(tmp_path / "chat", 2, None), AddOptions(name="chat"))
    assert opened(hub, "org/one").log("chat", nothing) is None
    with pytest.raises(ConflictError, match="holds the adapter 'sql', and each repository holds one"):
        push(workspace, opened(hub, "org/one"), "chat")


def test_a_dry_run_refuses_what_the_push_refuses(hub: FakeHub, workspace: Workspace, tmp_path: Path) -> None:
    workspace.add(write_adapter(tmp_path / "other", lora_alpha=9))
    with pytest.raises(ConflictError, match=r"org/one holds the adapter '(sql|other)', and each repository holds one"):
        workspace.push(["sql", "other"], PushOptions("hf:org/one"))
    held = [row.name for row in workspace.remote_adapters("hf:org/one")]
    (second,) = {"sql", "other"}.difference(held)
    for rebase in (False, True):
        with pytest.raises(ConflictError, match=f"org/one holds the adapter '{held[0]}'"):
            workspace.push([second], PushOptions("hf:org/one", dry_run=True, rebase=rebase))


def test_a_manifest_that_a_commit_took_away_is_told(hub: FakeHub, workspace: Workspace) -> None:
    workspace.push(["sql"], PushOptions("hf:org"))
    assert workspace.push(["sql"], PushOptions("hf:org", repair=True)).notes == []
    path = f"loramgr/manifests/{workspace.list()[0].digest.removeprefix('sha256:')}.json"
    api = huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT, token=hub.token)
    api.create_commit("org/sql", [huggingface_hub.CommitOperationDelete(path)], commit_message="tidy", revision="main")
    with pytest.raises(IntegrityError, match="the manifest of v3 is damaged or missing there") as told:
        workspace.push(["sql"], PushOptions("hf:org"))
    assert str(told.value.hint).startswith("where a home has it: loramgr remote delete hf:org sql")
    assert workspace.remote_verify("hf:org", quick=True).missing != []


def test_a_renamed_adapter_takes_its_repository_along(hub: FakeHub, workspace: Workspace) -> None:
    remote = opened(hub)
    found, _ = push(workspace, remote, "sql")
    workspace.rename("sql", "query")
    log, _ = push(workspace, remote, "query", found)
    assert (log.name, [*hub.repositories], remote.log("sql", nothing)) == ("query", ["org/query"], None)
    assert fetched(remote, "query")["files"] == files_of(workspace, "query")


def test_delete(hub: FakeHub, workspace: Workspace) -> None:
    remote = opened(hub)
    push(workspace, remote, "sql")
    hub.create("org/foreign", {"model.safetensors": b"x"})
    with pytest.raises(NotFoundError):
        remote.delete("foreign")
    remote.delete("sql")
    assert [*hub.repositories] == ["org/foreign"]
    assert remote.log("sql", nothing) is None
    push(workspace, remote, "sql")


def test_tags_of_the_adapter_become_git_tags_where_asked(hub: FakeHub, workspace: Workspace) -> None:
    url = "hf:org?private=true&tags=true"
    workspace.push(["sql"], PushOptions(url))
    repository = hub.repositories["org/sql"]
    assert repository.private
    assert repository.tags["prod"] == repository.tags["v1"]
    workspace.tag("sql@v3", "prod", move=True)
    workspace.push(["sql"], PushOptions(url))
    assert repository.tags["prod"] == repository.tags["v3"]
    workspace.untag("sql@prod")
    workspace.push(["sql"], PushOptions(url))
    assert "prod" not in repository.tags


def test_a_push_that_is_asked_to_brings_the_tags_to_git(hub: FakeHub, workspace: Workspace) -> None:
    workspace.push(["sql"], PushOptions("hf:org"))
    repository = hub.repositories["org/sql"]
    assert [*repository.tags] == ["v1", "v2", "v3"]
    told = workspace.push(["sql"], PushOptions("hf:org", tags=True))  # nothing else is new
    assert (told.entries, told.notes) == (0, ["the git tag prod of org/sql is set"])
    assert repository.tags["prod"] == repository.tags["v1"]
    workspace.tag("sql@v2", "prod", move=True)
    workspace.push(["sql"], PushOptions("hf:org"))
    assert repository.tags["prod"] == repository.tags["v1"]
    workspace.push(["sql"], PushOptions("hf:org", tags=True))
    assert repository.tags["prod"] == repository.tags["v2"]
    workspace.remove("sql@v2", force=True)
    repository.tags["by-hand"] = repository.history[0].oid
    workspace.push(["sql"], PushOptions("hf:org", tags=True))
    assert sorted(repository.tags) == ["by-hand", "v1", "v2", "v3"]


@pytest.mark.parametrize("status", [500, 403])
def test_a_version_whose_tag_failed_gets_it_with_the_next_push(
    hub: FakeHub, workspace: Workspace, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramgr.remotes.hub_client._rest", lambda *_: None)
    hub.fault = lambda method, path: status if method == "POST" and "/tag/" in path else None
    with pytest.raises(UncheckedError):
        workspace.push(["sql"], PushOptions("hf:org"))
    hub.fault = None
    repository = hub.repositories["org/sql"]
    assert repository.tags == {}
    told = workspace.push(["sql"], PushOptions("hf:org"))
    commits = {commit.title: commit.oid for commit in repository.history}
    assert repository.tags == {f"v{number}": commits[f"sql v{number}"] for number in (1, 2, 3)}
    del repository.tags["v2"]
    told = workspace.push(["sql"], PushOptions("hf:org"))  # nothing is new
    assert (told.entries, told.notes) == (0, ["the git tag v2 of org/sql was missing, and is set"])
    assert repository.tags["v2"] == commits["sql v2"]
    assert workspace.push(["sql"], PushOptions("hf:org")).notes == []


def test_an_adapter_whose_card_was_edited_is_listed(hub: FakeHub, workspace: Workspace) -> None:
    push(workspace, opened(hub), "sql")
    hub.create("org/foreign", {"adapter_config.json": b"{}"})
    hub.push("org/sql", {"README.md": b"# by hand"})
    assert opened(hub).names() == ["sql"]
    hub.lists_files = False
    assert opened(hub).names() == []
    hub.push("org/sql", {"README.md": b"---\ntags:\n- loramgr\n---\n"})
    assert opened(hub).names() == ["sql"]


def test_files_that_have_no_place_at_the_top(hub: FakeHub, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "home")
    folder = adapter(tmp_path / "run", 2, README)
    odd = {"loramgr/log/x.json": b"{}", ".gitattributes": b"* -text", ".cache/x": b"y", "a b/ü [1].txt": b"z", "e": b""}
    for path, data in odd.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    include = ["loramgr/**/*", ".gitattributes", ".cache/x", "a b/*", "e"]
    workspace.add(folder, AddOptions(name="odd", include=[glob for glob in include if glob != "loramgr/**/*"]))
    push(workspace, opened(hub), "odd")
    assert fetched(opened(hub), "odd")["files"] == files_of(workspace, "odd")


@pytest.mark.parametrize("size", [3 << 20, 9 << 20])
def test_large_files_go_in_one_part_or_several(hub: FakeHub, tmp_path: Path, size: int) -> None:
    workspace = Workspace(tmp_path / "home")
    rank = size // 40
    workspace.add(adapter(tmp_path / "run", rank, None), AddOptions(name="big"))
    push(workspace, opened(hub), "big")
    assert fetched(opened(hub), "big")["files"] == files_of(workspace, "big")


@pytest.mark.parametrize(
    ("client", "server", "answer"), [(False, False, False), (True, True, True), (True, False, False)]
)
def test_files_go_by_xet_where_both_sides_speak_it(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, client: bool, server: bool, answer: bool
) -> None:
    """Without the question, a client with Xet cannot push to a hub without (huggingface_hub issue 4507)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", not client)
    hub.has_xet = server
    hub.create("org/sql")
    assert HubClient().has_xet("org/sql") == answer


def test_redirects_to_another_host_get_no_token(hub: FakeHub, workspace: Workspace) -> None:
    push(workspace, opened(hub), "sql")
    fetched(opened(hub), "sql")
    stored = [headers for _, path, headers in hub.requests if path.startswith(("/storage", "/part", "/complete"))]
    told = [headers for _, path, headers in hub.requests if path.startswith("/api/models")]
    assert len(stored) > 4
    for headers in stored:
        assert hub.token not in json.dumps(headers)
    assert all(hub.token in json.dumps(headers) for headers in told)


FAULTS = ("cut", "lost", "truncate", 500, 503, 429, "stall")
LIES = ("flip", "flip inside", "short", "long")


def broken_at(number: int, fault: str | int, times: int = 1) -> Callable[[str, str], str | int | None]:
    count = iter(range(1 << 30))

    def at(method: str, path: str) -> str | int | None:
        return fault if number <= next(count) < number + times else None

    return at


def test_a_push_and_a_pull_that_break_at_any_request(
    hub: FakeHub, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks once, the push and the pull finish, and each version has one commit and its tag."""
    push(workspace, opened(hub, "org/count"), "sql")
    pushed = len(hub.requests)
    fetched(opened(hub, "org/count"), "sql")
    total = len(hub.requests)
    hub.stall = 1.5
    cases = [(number, fault) for number in range(total) for fault in FAULTS]
    if not SOAK:
        cases = random.Random(7).sample(cases, 16)
    wanted = files_of(workspace, "sql")
    for number, fault in cases:
        hub.repositories.clear()
        hub.storage.clear()
        hub.fault = broken_at(number, fault)
        push(workspace, opened(hub, "org/one"), "sql")
        hub.fault = broken_at(number - pushed, fault) if number >= pushed else None
        assert fetched(opened(hub, "org/one"), "sql")["files"] == wanted, (number, fault)
        hub.fault = None
        repository = hub.repositories["org/one"]
        titles = [commit.title for commit in repository.history]
        assert titles == ["initial commit", "sql v1", "sql v2", "sql v3"], (number, fault)
        assert sorted(repository.tags) == ["v1", "v2", "v3"], (number, fault)


def test_answers_that_lie_once_harm_nothing(hub: FakeHub, workspace: Workspace, tmp_path: Path) -> None:
    """Whatever one answer says wrongly, no wrong byte gets a name, and the next push and pull are right."""
    there, every = "hf:org/one", PullOptions("hf:org/one", all_versions=True)
    workspace.push(["sql"], PushOptions(there))
    pushed = len(hub.requests)
    Workspace(tmp_path / "count").pull(["sql"], every)
    cases = [(number, lie) for number in range(len(hub.requests)) for lie in LIES]
    wanted = files_of(workspace, "sql")
    for case, (number, lie) in enumerate(cases if SOAK else random.Random(8).sample(cases, 4)):
        fresh = Workspace(tmp_path / f"fresh{case}")
        hub.fault = broken_at(number - pushed, lie)
        if number < pushed:
            hub.repositories.clear()
            hub.storage.clear()
            hub.fault = broken_at(number, lie)
            ended_in_words(lambda: workspace.push(["sql"], PushOptions(there)))
            hub.fault = None
            workspace.push(["sql"], PushOptions(there))
            assert sorted(hub.repositories["org/one"].tags) == ["v1", "v2", "v3"], (number, lie)
        ended_in_words(partial(fresh.pull, ["sql"], every))
        hub.fault = None
        fresh.pull(["sql"], every)
        assert files_of(fresh, "sql") == wanted, (number, lie)
        assert fresh.verify().corrupt == [], (number, lie)


def ended_in_words(work: Callable[[], object]) -> None:
    """Do it, whether it ends well or in an error that a remote can give."""
    code = 0
    with suppress(LoramgrError):
        try:
            work()
        except LoramgrError as error:
            code = error.exit_code
            raise
    assert code in (0, 3, 4, 5, 7)


def test_bytes_that_were_changed_on_the_way_get_no_name(hub: FakeHub, workspace: Workspace) -> None:
    push(workspace, opened(hub), "sql")
    wanted = files_of(workspace, "sql")
    hub.requests.clear()
    fetched(opened(hub), "sql")
    for number, (_, path, _) in enumerate(list(hub.requests)):
        hub.fault = broken_at(number, "flip", 5)
        if "/resolve/" in path and "loramgr/" in path:
            with pytest.raises(LoramgrError) as told:
                fetched(opened(hub), "sql")
            assert told.value.exit_code in (3, 4, 5), (number, path)
            hub.fault = broken_at(number, "flip")
            assert fetched(opened(hub), "sql")["files"] == wanted  # once only: it is asked for again
        hub.fault = None


def test_no_secret_is_told(hub: FakeHub, workspace: Workspace, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    big = workspace.home.parent / "big"
    workspace.add(adapter(big, 40_000, None), AddOptions(name="big"))
    hub.fault = lambda method, path: 403 if path.startswith("/storage") and method == "PUT" else None
    with pytest.raises(UncheckedError) as told:
        push(workspace, opened(hub), "big")
    hub.fault = None
    push(workspace, opened(hub), "big")
    hub.fault = lambda method, path: 500 if path.startswith("/storage") else None
    with pytest.raises(UncheckedError) as again:
        fetched(opened(hub), "big")
    output = capfd.readouterr()
    for text in (told.value.message, again.value.message, output.out, output.err, caplog.text):
        assert hub.token not in text
        assert "presigned_secret" not in text
    assert told.value.__cause__ is None


def test_refusals_in_words(hub: FakeHub, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    push(workspace, opened(hub, options="?private=true"), "sql")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UncheckedError) as told:
        opened(hub).log("sql", nothing)
    assert told.value.hint == "hf auth login"
    hub.repositories["org/sql"].private = False
    hub.repositories["org/sql"].gated = True
    with pytest.raises(UncheckedError, match="terms to be accepted"):
        opened(hub).log("sql", nothing)
    workspace.rename("sql", "a..b")
    with pytest.raises(UsageError, match="cannot be the name of a repository"):
        opened(hub).log("a..b", nothing)


def test_nothing_is_asked_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for ask in (
        lambda: opened(hub).names(),
        lambda: opened(hub).log("sql", nothing),
        lambda: opened(hub).delete("sql"),
    ):
        with pytest.raises(UncheckedError, match="HF_HUB_OFFLINE"):
            ask()
    assert hub.requests == []


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UncheckedError, match="cannot be asked"):
        open_remote("hf:org").log("sql", nothing)


@pytest.mark.parametrize("closed", [True, False])
def test_a_silent_server_ends_an_upload_after_a_failed_connection(
    hub: FakeHub, tmp_path: Path, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client opens a new session after a failed connection; nobody may wait in that one forever either."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    pauses = SimpleNamespace(sleep=lambda _: Event().wait(0.3))  # the client's own are seconds
    monkeypatch.setattr("huggingface_hub.utils._http.time", pauses)
    data = random.Random(1).randbytes(2 << 20)
    (tmp_path / "weights").write_bytes(data)
    file = FileRecord("adapter_model.safetensors", digest_bytes(data), len(data))
    hub.create("org/sql")
    remote = opened(hub)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        hub.files_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if not closed:
            silent.listen()
        timer = threading.Timer(0.2, silent.listen)  # first it refuses, then it takes connections and says nothing
        timer.start()
        begin = time.monotonic()
        with pytest.raises(UncheckedError, match="org/sql"):
            remote.put_blob("sql", file, tmp_path / "weights")
        timer.join()
    assert time.monotonic() - begin < 60
    session = huggingface_hub.get_session()
    huggingface_hub.close_session()
    assert huggingface_hub.get_session() is not session
    assert huggingface_hub.get_session().timeout.read == 6 * 0.2


def test_a_factory_of_somebody_else_is_kept(hub: FakeHub) -> None:
    made = type(huggingface_hub.get_session())
    made_here = []

    def factory() -> Any:
        made_here.append(made(timeout=None))
        return made_here[-1]

    huggingface_hub.set_client_factory(factory)
    try:
        opened(hub).log("sql", nothing)
        assert huggingface_hub.get_session() is made_here[-1]
        assert made_here[-1].timeout.read == 6
        huggingface_hub.close_session()
        assert huggingface_hub.get_session().timeout.read == 6
        made_here.append(made(timeout=33))
        huggingface_hub.set_client_factory(lambda: made_here[-1])
        opened(hub).log("sql", nothing)
        assert huggingface_hub.get_session().timeout.read == 33
    finally:
        default = import_module("huggingface_hub.utils._http").default_client_factory
        huggingface_hub.set_client_factory(default)


def test_xet_gives_up(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "9")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_DURATION", "x")
    monkeypatch.delenv("HF_XET_CLIENT_RETRY_MAX_DURATION")
    hub.has_xet = True
    hub.create("org/sql")
    monkeypatch.setattr("loramgr.remotes.hub_client.find_spec", lambda _: True)
    assert HubClient().has_xet("org/sql")
    assert os.environ["HF_XET_CLIENT_RETRY_MAX_ATTEMPTS"] == "9"
    assert os.environ["HF_XET_CLIENT_RETRY_MAX_DURATION"] == "120s"


def a_push_by_xet_to_nobody_ends(hub: FakeHub, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    data = random.Random(2).randbytes(2 << 20)
    (tmp_path / "weights").write_bytes(data)
    hub.has_xet = True  # at a port where nobody listens
    hub.create("org/sql")
    begin = time.monotonic()
    file = FileRecord("adapter_model.safetensors", digest_bytes(data), len(data))
    with pytest.raises(UncheckedError, match="cannot be asked"):
        opened(hub).put_blob("sql", file, tmp_path / "weights")
    assert time.monotonic() - begin < 150


if SOAK:  # half a minute
    test_a_push_by_xet_to_nobody_ends = a_push_by_xet_to_nobody_ends


def test_hostile_answers(hub: FakeHub, workspace: Workspace) -> None:
    push(workspace, opened(hub), "sql")
    repository = hub.repositories["org/sql"]
    newest = repository.history[-1]
    digest = log_of(workspace, "sql")[1].digest.removeprefix("sha256:")
    cases: list[dict[str, bytes]] = [
        {f"loramgr/log/{digest}.json": b"{}"},
        {f"loramgr/log/{digest}.json": b"[" * 100_000},
        {f"loramgr/log/{digest}.json": b" " * (5 << 20)},
        {f"loramgr/log/{'0' * 64}.json": b"{}"},
        {"../outside": b"x"},
    ]
    for files in cases:
        repository.history = repository.history[: repository.history.index(newest) + 1]
        hub.push("org/sql", files)
        with pytest.raises(IntegrityError):
            opened(hub).log("sql", nothing)
    lost = {path: blob for path, blob in newest.files.items() if digest not in path}
    repository.history = repository.history[: repository.history.index(newest) + 1]
    repository.commit(lost, "an entry is gone")
    with pytest.raises(IntegrityError, match="is missing"):
        opened(hub).log("sql", nothing)
    repository.history.pop()
    manifest = next(path for path in newest.files if path.startswith("loramgr/manifests/"))
    hub.push("org/sql", {manifest: b"{}"})
    remote = opened(hub)
    with pytest.raises(IntegrityError):
        remote.read_manifest("sql", 1, "sha256:" + Path(manifest).stem)


def test_a_foreign_repository_becomes_a_version(hub: FakeHub, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "theirs", 40_000, "# theirs")
    (folder / "tokenizer.json").write_text("{}")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.create("them/Their-LoRA", {**files, "optimizer.bin": b"no", "train.py": b"no", "onnx/x.bin": b"no"})
    workspace = Workspace(tmp_path / "home")
    tried = pull_foreign(workspace._opened, "hf://them/Their-LoRA", PullOptions(dry_run=True))
    assert (tried.transferred, tried.bytes) == (4, sum(map(len, files.values())))
    report = pull_foreign(workspace._opened, "hf://them/Their-LoRA@main", PullOptions())
    assert report.versions == ["their-lora@v1"]
    assert any("no sha256 of README.md, adapter_config.json, tokenizer.json" in note for note in report.notes)
    (version,) = workspace.log("their-lora")
    commit = hub.repositories["them/Their-LoRA"].history[-1].oid
    assert version.labels == {"source": "hf://them/Their-LoRA", "commit": commit}
    assert {file.path: file.digest for file in version.files} == {
        name: digest_bytes(data) for name, data in files.items()
    }
    assert not [path for path in workspace.home.glob("cache/partial/*")]
    again = pull_foreign(workspace._opened, f"hf://them/Their-LoRA@{commit}", PullOptions())
    assert (again.versions, len(workspace.log("their-lora"))) == (["their-lora@v1"], 1)
    hub.repositories["them/Their-LoRA"].tags["refs/pr/1"] = hub.push("them/Their-LoRA", {"README.md": b"# new"}).oid
    proposed = pull_foreign(workspace._opened, "hf://them/Their-LoRA@refs/pr/1", PullOptions())
    assert proposed.versions == ["their-lora@v2"]
    workspace.add(adapter(tmp_path / "mine", 2, None), AddOptions(name="mine"))
    hub.create("them/mine", files)
    with pytest.raises(ConflictError, match="did not come from hf://them/mine"):
        pull_foreign(workspace._opened, "hf://them/mine", PullOptions())


def test_foreign_repositories_that_are_not_taken(hub: FakeHub, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in adapter(tmp_path / "theirs", 2, None).iterdir()}
    hub.create("them/model", {"config.json": b"{}", "model.safetensors": b"x"})
    hub.create("them/below", {f"checkpoint-1/{name}": data for name, data in files.items()})
    hub.create("them/config", {"adapter_config.json": files["adapter_config.json"]})
    hub.create("them/gated", files, gated=True)
    hub.create("them/good", files)
    workspace = Workspace(tmp_path / "home")
    expected = {
        "hf://them/model": (6, "loramgr base add"),
        "hf://them/below": (6, ""),
        "hf://them/config": (6, ""),
        "hf://them/none": (4, "check the name"),
        "hf://them/good@v9": (4, "check the name"),
        "hf://a/b/c": (2, "hf://org/name"),
    }
    for address, (code, hint) in expected.items():
        with pytest.raises(LoramgrError) as told:
            pull_foreign(workspace._opened, address, PullOptions())
        assert told.value.exit_code == code, address
        assert hint in (told.value.hint or ""), address
    hub.fault = lambda method, path: "flip" if "/storage/" in path or "adapter_config" in path else None
    with pytest.raises(IntegrityError):
        pull_foreign(workspace._opened, "hf://them/good", PullOptions())
    assert workspace.list() == []
    assert [*workspace._opened.store.blobs.digests()] == []


def test_what_loramgr_pushed_comes_with_its_log(hub: FakeHub, workspace: Workspace, tmp_path: Path) -> None:
    push(workspace, opened(hub), "sql")
    other = Workspace(tmp_path / "other")
    assert pull_foreign(other._opened, "hf://org/sql", PullOptions()).versions == ["sql@v3"]
    assert [version.digest for version in other.log("sql")] == [version.digest for version in workspace.log("sql")]
    assert pull_foreign(other._opened, "hf://org/sql@v1", PullOptions()).versions == ["sql@v1"]
    assert other.list()[0].metrics == {"acc": 0.75}


def test_what_is_pushed_loads_in_peft(hub: FakeHub, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel
    from peft_files import save_with_peft, tiny_llama

    torch.manual_seed(0)
    base = tiny_llama()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    save_with_peft(tmp_path / "run", base, config)
    workspace = Workspace(tmp_path / "home")
    workspace.add(tmp_path / "run", AddOptions(name="llama"))
    push(workspace, opened(hub), "llama")
    code = "import sys, huggingface_hub as h; print(h.snapshot_download('org/llama', revision='v1'))"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    child = [sys.executable, "-c", code]  # the client reads where its hub is when it is imported
    done = subprocess.run(child, env={**os.environ, **settings, **quiet}, capture_output=True, text=True, check=True)
    tokens = torch.arange(12).reshape(1, 12)
    logits = []
    for folder in (tmp_path / "run", Path(done.stdout.strip())):
        torch.manual_seed(0)
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            logits.append(PeftModel.from_pretrained(tiny_llama(), str(folder))(input_ids=tokens).logits)
    assert torch.equal(*logits)
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(logits[0], tiny_llama()(input_ids=tokens).logits)


def test_the_older_client() -> None:
    """Run this file with huggingface_hub 1.33, as `.ci/run` installs it."""
    if not OLDER.is_dir():
        pytest.skip(f"{OLDER} is absent (pip install --target {OLDER} huggingface_hub==1.33.0)")
    chosen = ["-k", "not peft and not older_client"]  # PEFT and transformers are made for the newer one
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, __file__]
    code = "import huggingface_hub; assert huggingface_hub.__version__.startswith('1.')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OLDER), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
