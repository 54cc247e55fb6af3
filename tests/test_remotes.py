"""What every remote has to do: the same suite for each kind.

A kind is a function in `KINDS` that makes a place and gives a way to open it; each call of that is another client.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from fake_hub import FakeHub
from object_servers import KINDS as SERVERS
from object_servers import ObjectServers
from remote_world import CountingStore, Line, MemoryStore, nothing_known, read_all

from loramgr.errors import ConflictError, IntegrityError, NotFoundError, RacedError
from loramgr.log import Entry
from loramgr.remotes.log_remote import LogRemote
from loramgr.remotes.opening import open_remote
from loramgr.remotes.protocol import KnownEntry, Remote, RemoteLog

RACES = 100 if os.environ.get("LORAMGR_SOAK") else 4
ALL_GRACE = timedelta(0)
KINDS = ["memory", "memory without swaps", "folder", "hub 409", "hub 412", *SERVERS]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub client's own


@dataclass(frozen=True)
class Place:
    """Somewhere to push to: `open` gives one more client, `swaps` says that of two pushes at once one is refused."""

    open: Callable[[], Remote]
    swaps: bool
    can_race: bool = True
    collects: bool = True


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param.startswith("memory"):
        store = MemoryStore(swaps=request.param == "memory")
        return Place(lambda: LogRemote(store, 4), store.swaps)
    if request.param == "folder":
        (tmp_path / "remote").mkdir()
        return Place(partial(open_remote, f"file:{tmp_path / 'remote'}"), swaps=True)
    if request.param.startswith("hub"):  # which answers a commit with a wrong parent so
        hub: FakeHub = request.getfixturevalue("hub")
        hub.wrong_parent = int(request.param.removeprefix("hub "))
        return Place(partial(open_remote, "hf:org"), swaps=True, collects=False)
    servers: ObjectServers = request.getfixturevalue("object_servers")
    server = servers.get(request.param)
    server.enter(monkeypatch)
    url = server.url(tmp_path.name, timeout=20)
    return Place(partial(open_remote, url), server.swaps, can_race=server.kind != "moto")


@pytest.fixture
def line(tmp_path: Path) -> Line:
    folder = tmp_path / "files"
    folder.mkdir()
    made = Line(folder)
    made.publish({"adapter_config.json": b"{}", "adapter_model.safetensors": random.Random(0).randbytes(200_000)})
    made.add("tag", {"tag": "prod", "number": 1})
    return made


def read(remote: Remote, name: str = "sql", known: KnownEntry = nothing_known) -> RemoteLog:
    log = remote.log(name, known)
    assert log is not None
    return log


def test_a_place_where_nothing_was_pushed_is_empty(place: Place) -> None:
    remote = place.open()
    assert (remote.names(), remote.log("sql", nothing_known), list(remote.logs(nothing_known))) == ([], None, [])
    with pytest.raises(NotFoundError, match="sql"):
        remote.delete("sql")


def test_what_was_pushed_is_read_by_another_client(place: Place, line: Line) -> None:
    pushed = line.push(place.open())
    remote = place.open()
    log = read(remote)
    assert log.entries == pushed.entries == tuple(line.entries)
    assert log.heads == pushed.heads == (line.entries[-1].digest,)
    assert remote.names() == ["sql"]
    read_all(remote, log, line.versions)


def test_known_entries_are_not_fetched(line: Line) -> None:
    counting = CountingStore(MemoryStore())
    line.push(LogRemote(counting))
    counting.counts.clear()
    log = LogRemote(counting).log("sql", line.known)
    assert log is not None
    assert log.entries == tuple(line.entries)
    assert counting.counts == {"get loramgr.json": 1, "head heads": 1, "get heads": 1}


def test_a_second_push_brings_no_blob_and_a_new_version_only_its_new_files(place: Place, line: Line) -> None:
    line.push(place.open())
    line.publish({"adapter_config.json": b"{}", "adapter_model.safetensors": b"other weights"})
    old, new = line.versions
    remote = place.open()
    assert remote.missing("sql", {file.digest: file.bytes for file in old.files}) == set()
    sizes = {file.digest: file.bytes for file in new.files}
    assert remote.missing("sql", sizes) == {new.files[1].digest}
    line.push(remote)
    log = read(place.open())
    assert log.entries == tuple(line.entries)
    read_all(place.open(), log, line.versions)


def test_an_append_may_be_repeated(place: Place, line: Line) -> None:
    line.push(place.open())
    line.pushed = None
    again = line.push(place.open())
    assert again.heads == (line.entries[-1].digest,)
    before = again
    line.publish({"a": b"2"})
    line.push(place.open())
    assert line.push(place.open(), before).heads == (line.entries[-1].digest,)
    assert read(place.open()).entries == tuple(line.entries)


def test_many_logs_are_read_at_once(place: Place, tmp_path: Path) -> None:
    lines = [Line(tmp_path, f"adapter-{at}") for at in range(5)]
    for at, each in enumerate(lines):
        each.publish({"weights": bytes([at])})
        each.push(place.open())
    logs = list(place.open().logs(lines[0].known))
    assert [log.name for log in logs] == [each.name for each in lines] == place.open().names()
    assert [log.entries for log in logs] == [tuple(each.entries) for each in lines]


def two_pushes(place: Place, line: Line, turn: int) -> list[Line | ConflictError]:
    """Have two clients append to one log at once, and return each, or why it was refused."""
    clients = [line.copy(f"client {at}") for at in range(2)]
    for at, client in enumerate(clients):
        client.publish({"adapter_config.json": b"{}", "weights": f"{turn} {at}".encode()})
    ready, outcomes = threading.Barrier(2), list[Line | ConflictError]()

    def push(client: Line) -> None:
        remote = place.open()
        remote.names()
        ready.wait()
        try:
            client.push(remote)
            outcomes.append(client)
        except ConflictError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=push, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 2
    return outcomes


def test_no_version_is_lost_when_two_push_at_once(place: Place, line: Line) -> None:
    if not place.can_race:
        return  # moto looks and then writes: both of two conditional writes may win
    line.push(place.open())
    for turn in range(RACES):
        outcomes = two_pushes(place, line, turn)
        won = [outcome for outcome in outcomes if isinstance(outcome, Line)]
        log = read(place.open(), known=line.known)
        there = {entry.digest for entry in log.entries}
        assert won
        for client in won:
            assert client.entries[-1].digest in there
            read_all(place.open(), log, client.versions[-1:])
        for outcome in outcomes:
            if isinstance(outcome, ConflictError):
                assert "its head there is" in outcome.message
                assert outcome.hint == "loramgr push --rebase sql"
        assert len(won) == (1 if place.swaps else 2)
        assert log.heads == tuple(sorted(client.entries[-1].digest for client in won))
        line = won[0]
        if not place.swaps:
            line = rebased(place, log, *won)
        line.pushed = read(place.open(), known=line.known)
    assert read(place.open()).entries == tuple(line.entries)


def rebased(place: Place, fork: RemoteLog, kept: Line, other: Line) -> Line:
    """Solve a fork as a rebase does: what the other branch said is said again after the kept one."""
    lost = other.entries[-1]
    kept.add("rebase", {"replaces": [lost.digest]})
    content = lost.content | {"number": lost.content["number"] + 1}
    kept.add("publish", content)
    kept.versions.append(other.versions[-1])
    kept.push(place.open(), fork)
    log = read(place.open(), known=kept.known)
    assert log.heads == (kept.entries[-1].digest,)
    assert log.entries == tuple(kept.entries)
    return kept


def test_a_number_that_another_client_took_meanwhile_is_told_so(place: Place, line: Line) -> None:
    if not place.swaps:
        return  # a fork, as in the next test
    line.push(place.open())
    other = line.copy("other")
    line.publish({"a": b"here"})
    line.push(place.open())
    other.publish({"a": b"there"})  # under the same number
    with pytest.raises(RacedError, match="its head there is"):
        other.push(place.open())
    assert read(place.open()).entries == tuple(line.entries)


def test_a_log_that_went_on_is_refused_or_a_fork(place: Place, line: Line) -> None:
    line.push(place.open())
    other = line.copy("other")
    line.add("tag", {"tag": "here", "number": 1})
    line.push(place.open())
    other.publish({"a": b"there"})
    if place.swaps:
        with pytest.raises(ConflictError, match="went on") as caught:
            other.push(place.open())
        for head in (line.entries[-1].digest, other.entries[-1].digest):
            assert head.removeprefix("sha256:")[:12] in caught.value.message
        assert read(place.open()).entries == tuple(line.entries)
    else:
        fork = other.push(place.open())
        assert set(fork.heads) == {line.entries[-1].digest, other.entries[-1].digest}
        assert read(place.open()) == fork
        rebased(place, fork, line, other)


def test_a_name_that_another_log_has_is_refused(place: Place, line: Line, tmp_path: Path) -> None:
    line.push(place.open())
    other = Line(tmp_path, "sql", "other")
    other.publish({"a": b"1"})
    with pytest.raises(ConflictError, match="another log's") as caught:
        other.push(place.open())
    assert caught.value.hint == "loramgr rename sql NEW, then push it"
    assert read(place.open()).entries == tuple(line.entries)


def test_a_renamed_log_is_found_under_its_new_name_alone(place: Place, line: Line) -> None:
    line.push(place.open())
    other = line.copy("other")
    line.rename("sql-2")
    line.add("untag", {"tag": "prod"})
    line.push(place.open())
    remote = place.open()
    assert remote.names() == ["sql-2"]
    assert [log.name for log in remote.logs(nothing_known)] == ["sql-2"]
    assert remote.log("sql", nothing_known) is None
    log = read(remote, "sql-2")
    assert log.entries == tuple(line.entries)
    read_all(remote, log, line.versions)
    if place.swaps:
        other.add("tag", {"tag": "late", "number": 1})
        with pytest.raises(ConflictError):
            other.push(place.open())
        other.pushed = None
        with pytest.raises(ConflictError, match="called 'sql-2'"):
            other.push(place.open())
    line.rename("sql")  # and back
    line.push(place.open(), read(place.open(), "sql-2"))
    assert place.open().names() == ["sql"]
    assert read(place.open()).entries == tuple(line.entries)


def test_a_log_cannot_be_renamed_to_another_ones_name(place: Place, line: Line, tmp_path: Path) -> None:
    line.push(place.open())
    other = Line(tmp_path, "other")
    other.publish({"a": b"1"})
    other.push(place.open())
    other.rename("sql")
    with pytest.raises(ConflictError, match="another log's"):
        other.push(place.open())
    assert place.open().names() == ["other", "sql"]
    assert len(read(place.open(), "other").entries) == 1


def test_a_deleted_log_is_gone_and_its_name_free(place: Place, line: Line, tmp_path: Path) -> None:
    line.push(place.open())
    place.open().delete("sql")
    remote = place.open()
    assert (remote.names(), remote.log("sql", nothing_known)) == ([], None)
    with pytest.raises(NotFoundError):
        remote.delete("sql")
    stale = line.copy("stale")
    stale.publish({"a": b"late"})
    with pytest.raises(ConflictError, match="went on"):
        stale.push(place.open())
    assert place.open().names() == []
    another = Line(tmp_path, "sql", "another")
    another.publish({"a": b"1"})
    another.push(place.open())
    assert read(place.open()).entries == tuple(another.entries)


def test_gc_takes_what_no_log_refers_to(place: Place, line: Line, tmp_path: Path) -> None:
    if not place.collects:
        assert place.open().collect(ALL_GRACE, dry_run=False).removed == ()
        return  # what keeps the files there collects them itself
    line.push(place.open())
    other = Line(tmp_path, "other")
    other.publish({"adapter_config.json": b"{}", "weights": b"of the other"})
    other.push(place.open())
    assert place.open().collect(ALL_GRACE, dry_run=False).removed == ()
    place.open().delete("other")
    assert place.open().collect(timedelta(hours=1), dry_run=False).removed == ()
    would = place.open().collect(ALL_GRACE, dry_run=True)
    gone = place.open().collect(ALL_GRACE, dry_run=False)
    assert gone == would
    kinds = sorted(key.split("/")[0] for key in gone.removed)
    assert kinds == ["blobs", *(["logs"] if place.swaps else []), "manifests"]
    assert gone.bytes > 0
    read_all(place.open(), read(place.open()), line.versions)
    other.pushed = None
    other.push(place.open())
    read_all(place.open(), read(place.open(), "other"), other.versions)


def test_gc_takes_the_files_of_removed_versions_and_leaves_their_log(place: Place, line: Line) -> None:
    if not place.collects:
        return
    line.publish({"a": b"second"})
    line.add("remove", {"numbers": [1], "whole": False})
    line.push(place.open())
    gone = place.open().collect(ALL_GRACE, dry_run=False)
    assert len(gone.removed) == 3
    log = read(place.open())
    assert log.entries == tuple(line.entries)
    read_all(place.open(), log, line.versions[1:])
    first = line.versions[0]
    with pytest.raises(NotFoundError):
        place.open().read_manifest("sql", 1, first.digest)
    assert place.open().missing("sql", {file.digest: file.bytes for file in first.files}) == {
        file.digest for file in first.files
    }


def test_a_source_that_is_damaged_gets_no_name_there(place: Place, line: Line) -> None:
    file = line.versions[0].files[1]
    path = line.path(file.digest)
    path.write_bytes(bytes(file.bytes))
    with pytest.raises(IntegrityError, match=file.digest):
        line.push(place.open())
    assert place.open().missing("sql", {file.digest: file.bytes}) == {file.digest}
    assert place.open().names() == []


def test_a_push_by_many_threads(place: Place, tmp_path: Path) -> None:
    lines = [Line(tmp_path, f"adapter-{at}") for at in range(8)]
    for line in lines:
        line.publish({"adapter_config.json": b"{}", "weights": line.name.encode()})
    remote = place.open()
    assert list(remote.logs(nothing_known)) == []
    threads = [threading.Thread(target=line.push, args=(remote,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known: dict[str, Entry] = {}
    assert [log.entries for log in place.open().logs(known.get)] == [tuple(line.entries) for line in lines]
