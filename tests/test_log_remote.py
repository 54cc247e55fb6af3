"""The remote over a key store: how often it asks, what it repeats, and its gc beside pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from remote_world import CountingStore, Line, MemoryStore, nothing_known, read_all

from loramgr.digests import digest_bytes
from loramgr.errors import ConflictError, IncompatibleError, IntegrityError, UncheckedError, UsageError
from loramgr.remotes.layout import (
    Description,
    Head,
    content_key,
    entry_key,
    parse_content_key,
    parse_entry_key,
    parse_head_key,
)
from loramgr.remotes.log_remote import LogRemote
from loramgr.remotes.opening import open_remote
from loramgr.remotes.parallel import each
from loramgr.remotes.protocol import KeyStore, RemoteLog

GRACE = timedelta(hours=24)
LONG_AGO = timedelta(days=3)
FILES = {"adapter_config.json": b"{}", "weights": b"first"}


@pytest.fixture
def line(tmp_path: Path) -> Line:
    made = Line(tmp_path)
    made.publish(FILES)
    return made


def read(store: KeyStore, name: str = "sql") -> RemoteLog:
    log = LogRemote(store).log(name, nothing_known)
    assert log is not None
    return log


def age(store: MemoryStore) -> None:
    """Have everything been written long ago."""
    for key, (data, modified) in list(store.keys.items()):
        store.keys[key] = (data, modified - LONG_AGO)


@pytest.mark.parametrize("swaps", [True, False])
def test_a_push_of_many_makes_three_requests_a_version_beyond_its_blobs(tmp_path: Path, swaps: bool) -> None:
    counting = CountingStore(MemoryStore(swaps=swaps))
    count = 50
    lines = [Line(tmp_path, f"adapter-{at}") for at in range(count)]
    for at, line in enumerate(lines):
        line.publish({"adapter_config.json": b"{}", "weights": f"{at}".encode()})
    remote = LogRemote(counting)
    assert list(remote.logs(nothing_known)) == []
    for line in lines:
        line.push(remote)
    blobs = counting.counts.pop("put_if_absent blobs")
    assert blobs == count + 1
    assert sum(counting.counts.values()) <= 3 * count + 12

    counting.counts.clear()
    remote = LogRemote(counting)
    known = {entry.digest: entry for line in lines for entry in line.entries}
    assert len(list(remote.logs(known.get))) == count
    for line in lines:
        line.publish({"adapter_config.json": b"{}", "weights": f"second of {line.name}".encode()})
        line.push(remote)
    assert counting.counts.pop("put_if_absent blobs") == count
    assert sum(counting.counts.values()) <= (4 if swaps else 3) * count + 10  # each head is read once


def test_a_short_blob_is_missing_and_replaced(line: Line) -> None:
    store = MemoryStore()
    file = line.versions[0].files[1]
    key = content_key("blobs/", file.digest)
    store.put_if_absent(key, b"fi")
    assert file.digest in LogRemote(store).missing("sql", {file.digest: file.bytes})
    line.push(LogRemote(store))
    assert store.keys[key][0] == b"first"


@pytest.mark.parametrize("garbage", [b"", b"{}", bytes(5 << 20)])
@pytest.mark.parametrize("swaps", [True, False])
def test_a_damaged_entry_or_manifest_of_an_earlier_try_is_replaced(line: Line, garbage: bytes, swaps: bool) -> None:
    store = MemoryStore()
    store.put_if_absent("loramgr.json", Description("swapped" if swaps else "branches").encode())
    version, entry = line.versions[0], line.entries[0]
    for key in (content_key("manifests/", version.digest), entry_key("sql", entry.digest)):
        store.put_if_absent(key, garbage)
    store.swaps = swaps
    line.push(LogRemote(store))
    log = read(store)
    assert [each.digest for each in log.entries] == [each.digest for each in line.entries]
    read_all(LogRemote(store), log, line.versions)


class LostAnswer(MemoryStore):
    """Swaps, but the answer gets lost, and the next try finds another state than it expects."""

    lost = 0

    def put_if_match(self, key: str, data: bytes, token: str | None) -> str:
        answer = super().put_if_match(key, data, token)
        if self.lost:
            self.lost -= 1
            super().put_if_match(key, data, token)
        return answer


def test_an_own_success_whose_answer_was_lost_is_no_conflict(line: Line) -> None:
    store = LostAnswer()
    store.lost = 1
    assert line.push(LogRemote(store)).heads == (line.entries[-1].digest,)
    line.publish({"weights": b"second"})
    store.lost = 1
    assert line.push(LogRemote(store)).entries == tuple(line.entries)
    line.rename("other")
    store.lost = 1
    assert line.push(LogRemote(store)).name == "other"
    assert LogRemote(store).names() == ["other"]


@pytest.mark.parametrize("step", range(12))
def test_a_push_that_was_cut_anywhere_is_finished_by_the_next(line: Line, step: int) -> None:
    store = MemoryStore()
    line.push(LogRemote(store))
    line.publish({"weights": b"second"})
    line.rename("other")
    line.publish({"weights": b"third"})

    def cut(at: int, *_: Any) -> None:
        if at == step:
            raise UncheckedError("cut")

    try:
        line.push(LogRemote(Stepped(store, cut), 1))
    except UncheckedError:
        found = [log for name in ("other", "sql") if (log := LogRemote(store).log(name, nothing_known))]
        line.pushed = found[0] if found else None
        if found and found[0].name == "other":
            assert found[0].entries == tuple(line.entries)
            return
        line.push(LogRemote(store))
    assert LogRemote(store).names() == ["other"]
    read_all(LogRemote(store), read(store, "other"), line.versions)


class Stepped:
    """A key store that does something before each request, which is told its number."""

    def __init__(self, store: KeyStore, before: Callable[..., None]) -> None:
        self._store = store
        self._before = before
        self.steps = 0

    @property
    def url(self) -> str:
        return self._store.url

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def stepped(*arguments: Any) -> Any:
            self._before(self.steps, method, *arguments)
            self.steps += 1
            answer = getattr(self._store, method)(*arguments)
            return iter(list(answer)) if isinstance(answer, Iterator) else answer

        return stepped


def world_with_garbage(tmp_path: Path, swaps: bool) -> tuple[MemoryStore, Line, Line]:
    """Return a remote with a log, and what a push that never ended left there long ago; then that push's adapter."""
    store = MemoryStore(swaps=swaps)
    kept, arriving = Line(tmp_path, "kept"), Line(tmp_path, "arriving")
    kept.publish(FILES)
    kept.push(LogRemote(store))
    arriving.publish({"adapter_config.json": b"{}", "weights": b"was there before"})
    arriving.push(LogRemote(store))
    LogRemote(store).delete("arriving")
    arriving.pushed = None
    age(store)
    return store, kept, arriving


@pytest.mark.parametrize("swaps", [True, False])
def test_a_gc_at_any_moment_of_a_push_takes_nothing_that_it_needs(tmp_path: Path, swaps: bool) -> None:
    step, steps = 0, 1
    while step < steps:
        store, kept, arriving = world_with_garbage(tmp_path, swaps)

        def gc(at: int, *_: Any, store: MemoryStore = store, step: int = step) -> None:
            if at == step:
                LogRemote(store, 1).collect(GRACE, dry_run=False)

        stepped = Stepped(store, gc)
        arriving.push(LogRemote(stepped, 1))
        LogRemote(store).collect(GRACE, dry_run=False)
        for line in (kept, arriving):
            read_all(LogRemote(store), read(store, line.name), line.versions)
        step, steps = step + 1, stepped.steps
    assert steps > 8


@pytest.mark.parametrize("swaps", [True, False])
def test_a_push_at_any_moment_of_a_gc_loses_nothing(tmp_path: Path, swaps: bool) -> None:
    step, steps, refused = 0, 1, 0
    while step < steps:
        store, kept, arriving = world_with_garbage(tmp_path, swaps)
        outcome: list[ConflictError | None] = []

        def push(
            at: int,
            *_: Any,
            store: MemoryStore = store,
            step: int = step,
            line: Line = arriving,
            outcome: list[ConflictError | None] = outcome,
        ) -> None:
            if at == step:
                try:
                    line.push(LogRemote(store, 1))
                    outcome.append(None)
                except ConflictError as error:
                    outcome.append(error)

        stepped = Stepped(store, push)
        LogRemote(stepped, 1).collect(GRACE, dry_run=False)
        if outcome != [None]:
            assert outcome == [] or "a gc is at work" in str(outcome[0])
            refused += 1
            arriving.pushed = None
            arriving.push(LogRemote(store))
        for line in (kept, arriving):
            read_all(LogRemote(store), read(store, line.name), line.versions)
        step, steps = step + 1, stepped.steps
    assert steps > 8
    assert 0 < refused < steps or not swaps


@pytest.mark.parametrize("swaps", [True, False])
def test_gc_refuses_while_a_log_is_damaged(line: Line, swaps: bool) -> None:
    store = MemoryStore(swaps=swaps)
    line.publish({"weights": b"second"})
    line.push(LogRemote(store))
    store.put_if_absent(content_key("blobs/", digest_bytes(b"garbage")), b"garbage")
    age(store)
    store.delete(entry_key("sql", line.entries[0].digest))
    before = dict(store.keys)
    with pytest.raises(IntegrityError, match=line.entries[0].digest):
        LogRemote(store).collect(GRACE, dry_run=False)
    assert store.keys == before
    LogRemote(store).delete("sql")
    assert LogRemote(store).names() == []
    assert len(LogRemote(store).collect(timedelta(0), dry_run=False).removed) >= 5


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("thorough", [True, False])
def test_a_damaged_log_is_mended_by_who_has_it(line: Line, swaps: bool, thorough: bool) -> None:
    store = MemoryStore(swaps=swaps)
    line.publish({"weights": b"second"})
    line.rename("other")
    line.push(LogRemote(store))
    line.rename("sql2")
    line.push(LogRemote(store))
    keys = {name: [entry_key(name, entry.digest) for entry in line.entries] for name in ("other", "sql2")}
    whole = dict(store.keys)
    store.delete(keys["sql2"][0])
    for key in (keys["sql2"][1], keys["other"][1]):
        store.keys[key] = (b"damaged", store.keys[key][1])
    data, when = store.keys[keys["sql2"][2]]
    store.keys[keys["sql2"][2]] = (data[:-1] + b" ", when)  # as long as it was
    with pytest.raises(IntegrityError) as caught:
        read(store, "sql2")
    assert caught.value.hint == "where a home has it: loramgr push --repair sql2 --to memory:"
    remote = LogRemote(store)
    log = remote.log("sql2", line.known)
    assert log is not None
    told = remote.settle(log, tags=False, thorough=thorough)
    assert told == [f"{3 + thorough} damaged log entries of sql2 were put right there"]
    assert remote.settle(log, tags=False, thorough=True) == ([] if thorough else [told[0].replace("3", "1")])
    assert {key: data for key, (data, _) in store.keys.items()} == {key: data for key, (data, _) in whole.items()}
    assert read(store, "sql2").entries == tuple(line.entries)


def test_a_log_that_is_being_deleted_is_not_mended(line: Line) -> None:
    store = MemoryStore(swaps=False)
    line.publish({"weights": b"second"})
    line.publish({"weights": b"third"})
    line.push(LogRemote(store))
    remote = LogRemote(store)
    log = remote.log("sql", line.known)
    assert log is not None
    for entry in line.entries[1:]:
        store.delete(entry_key("sql", entry.digest))
    before = dict(store.keys)
    assert remote.settle(log, tags=False, thorough=True) == []
    assert store.keys == before


@pytest.mark.parametrize("swaps", [True, False])
def test_a_damaged_log_may_be_deleted_and_pushed(line: Line, swaps: bool) -> None:
    store = MemoryStore(swaps=swaps)
    line.publish({"weights": b"second"})
    line.push(LogRemote(store))
    store.delete(entry_key("sql", line.entries[0].digest))
    key = entry_key("sql", line.entries[1].digest)
    store.keys[key] = (b"damaged", store.keys[key][1])
    with pytest.raises(IntegrityError) as caught:
        read(store)
    assert caught.value.hint == "where a home has it: loramgr push --repair sql --to memory:"
    LogRemote(store).delete("sql")
    line.pushed = None
    line.push(LogRemote(store))
    assert read(store).entries == tuple(line.entries)


def test_gc_leaves_alone_what_is_not_its_own(line: Line) -> None:
    store = MemoryStore()
    line.push(LogRemote(store))
    foreign = (
        "README.md",
        "blobs/readme",
        "blobs/aa/bb",
        "logs/sql/notes.txt",
        "logs/UPPER/" + "a" * 64,
        "heads/UPPER",
    )
    for key in foreign:
        store.put_if_absent(key, b"of somebody")
    age(store)
    assert LogRemote(store).collect(timedelta(0), dry_run=False).removed == ()
    assert LogRemote(store).names() == ["sql"]
    assert read(store).entries == tuple(line.entries)
    assert store.keys.keys() >= {*foreign}


def test_what_others_replaced_after_a_fork_is_no_branch(line: Line) -> None:
    store = MemoryStore(swaps=False)
    line.push(LogRemote(store))
    other = line.copy("other")
    line.publish({"weights": b"here"})
    line.push(LogRemote(store))
    other.publish({"weights": b"there"})
    assert len(other.push(LogRemote(store)).heads) == 2
    line.add("rebase", {"replaces": [other.entries[-1].digest]})
    line.push(LogRemote(store), read(store))
    assert read(store).entries == tuple(line.entries)
    late = other.copy("late")  # somebody goes on from what was replaced: a fork again, and nothing is lost
    late.publish({"weights": b"late"})
    late.push(LogRemote(store))
    assert set(read(store).heads) == {line.entries[-1].digest, late.entries[-1].digest}


def test_what_nobody_could_read_again_is_not_brought(line: Line) -> None:
    store = MemoryStore()
    line.add("metric", {"number": 1, "metrics": {"x" * (5 << 20): 1.0}})
    with pytest.raises(IntegrityError, match="larger"):
        line.push(LogRemote(store))
    assert LogRemote(store).names() == []


def test_a_remote_of_a_newer_layout_is_refused(line: Line) -> None:
    store = MemoryStore()
    store.put_if_absent("loramgr.json", b'{"heads":"swapped","layout":2}')
    for use in (lambda: LogRemote(store).names(), lambda: line.push(LogRemote(store))):
        with pytest.raises(IncompatibleError, match="newer"):
            use()


def test_a_remote_with_heads_is_not_written_without_conditional_writes(line: Line) -> None:
    store = MemoryStore()
    line.push(LogRemote(store))
    store.swaps = False
    line.publish({"weights": b"second"})
    with pytest.raises(IncompatibleError, match="conditional writes"):
        line.push(LogRemote(store))
    assert read(store).entries == tuple(line.entries[:1])


def test_keys_are_read_back_as_they_were_written() -> None:
    digest = digest_bytes(b"some")
    assert parse_content_key(content_key("blobs/", digest)) == digest
    assert parse_entry_key(entry_key("a.b", digest)) == ("a.b", digest)
    for key in (
        "blobs/aa",
        "blobs/../" + "a" * 62,
        "logs/a/../" + "a" * 64,
        "logs/../" + "a" * 64,
        "heads/",
        "heads/..",
    ):
        assert (parse_content_key(key), parse_entry_key(key), parse_head_key(key)) == (None, None, None)
    for head in (Head(digest), Head(digest, gone=True), Head(digest, gone=True, moved="b")):
        assert Head.decode("here", head.encode()) == head
    assert Description.decode("here", Description("branches").encode()) == Description("branches")


def test_things_are_done_in_order_and_the_first_error_ends_it() -> None:
    done: list[int] = []

    def work(item: int) -> int:
        if item == 7:
            raise ValueError("seven")
        done.append(item)
        return item

    assert list(each(3, work, iter(range(7)))) == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="seven"):
        list(each(3, work, range(1000)))
    assert max(done) < 7 + 2 * 3 + 1


def test_a_url_that_names_no_remote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_remote("ftp://example.org/a")
