"""What every key store has to do, checked against a folder and the servers that can be installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import object_servers as servers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramgr.errors import ConflictError, IncompatibleError, IntegrityError, NotFoundError
from loramgr.remotes.opening_store import open_keystore
from loramgr.remotes.protocol import KeyStore

SOAK = bool(os.environ.get("LORAMGR_SOAK"))
ROUNDS = 200 if SOAK else 50
SLOW = {"seaweedfs": ROUNDS if SOAK else 6}  # who waits for another there waits for whole seconds
WRITERS = 8
SWAPPING = ("folder", "seaweedfs", "azurite", "gcs")
Opener = Callable[[str], KeyStore]


@pytest.fixture
def opened(
    request: pytest.FixtureRequest,
    object_servers: servers.ObjectServers,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Opener:
    """Return how to open the store of the kind, empty but for what the test puts there; each call is a new client."""
    kind = request.param
    if kind == "folder":
        (tmp_path / "remote").mkdir()
        return lambda prefix: open_keystore(f"file:{_made(tmp_path / 'remote' / prefix)}")
    server = object_servers.get(kind)
    server.enter(monkeypatch)
    own = f"{request.node.originalname}/{tmp_path.name}"
    return lambda prefix: open_keystore(server.url(f"{own}/{prefix}"))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


everywhere = pytest.mark.parametrize("opened", ["folder", *servers.KINDS], indirect=True)
where_it_swaps = pytest.mark.parametrize("opened", ["folder", "moto", *SWAPPING[1:]], indirect=True)
in_races = pytest.mark.parametrize(
    ("opened", "rounds"), [(kind, SLOW.get(kind, ROUNDS)) for kind in SWAPPING], indirect=["opened"], ids=SWAPPING
)


def read(store: KeyStore, key: str, offset: int = 0) -> bytes:
    return b"".join(store.get(key, offset))


@everywhere
def test_a_key_is_put_read_listed_and_deleted(opened: Opener) -> None:
    store = opened("x")
    assert store.put_if_absent("logs/a-1.b/0f", b"content")
    assert read(store, "logs/a-1.b/0f") == b"content"
    found = store.head("logs/a-1.b/0f")
    assert found is not None
    assert (found.key, found.size) == ("logs/a-1.b/0f", 7)
    assert abs(datetime.now(UTC) - found.modified) < timedelta(minutes=2)
    listed = list(store.list(""))
    assert [(one.key, one.size) for one in listed] == [("logs/a-1.b/0f", 7)]
    assert abs(listed[0].modified - found.modified) < timedelta(seconds=2)
    store.delete("logs/a-1.b/0f")
    store.delete("logs/a-1.b/0f")
    assert store.head("logs/a-1.b/0f") is None
    assert list(store.list("")) == []


@everywhere
def test_what_is_absent_is_not_found(opened: Opener) -> None:
    store = opened("x")
    assert store.head("absent/key") is None
    with pytest.raises(NotFoundError, match="absent/key"):
        read(store, "absent/key")
    with pytest.raises(NotFoundError, match="absent/key"):
        read(store, "absent/key", 5)
    store.delete("absent/key")
    assert list(store.list("absent/")) == []


@everywhere
def test_an_empty_key_is_a_key(opened: Opener) -> None:
    store = opened("x")
    assert store.put_if_absent("empty", b"")
    assert read(store, "empty") == b""
    found = store.head("empty")
    assert found is not None
    assert found.size == 0


@everywhere
def test_bytes_are_read_from_an_offset_on(opened: Opener) -> None:
    store = opened("x")
    data = Random(1).randbytes(1_000_003)
    store.put_if_absent("some", data)
    for offset in (0, 1, 999_999, 1_000_002, 1_000_003):
        assert read(store, "some", offset) == data[offset:]
    assert list(store.get("some", 1_000_003)) == []


@everywhere
def test_pieces_are_of_bounded_size(opened: Opener) -> None:
    store = opened("x")
    store.put_if_absent("some", bytes(6_000_000))
    assert max(map(len, store.get("some"))) < 4_000_000


@everywhere
def test_a_file_larger_than_one_request_goes_in_parts(opened: Opener, tmp_path: Path) -> None:
    store, source = opened("x"), tmp_path / "source"
    source.write_bytes(Random(2).randbytes(20_000_001))
    assert store.put_if_absent("large", source)
    assert hashlib.sha256(read(store, "large")).digest() == hashlib.sha256(source.read_bytes()).digest()
    assert not store.put_if_absent("large", source)
    found = store.head("large")
    assert found is not None
    assert found.size == 20_000_001


@everywhere
def test_a_prefix_is_a_part_of_the_name(opened: Opener) -> None:
    store = opened("x")
    for key in ("logs/a/1", "logs/ab/2", "logs/b/3", "other"):
        store.put_if_absent(key, b"")
    assert sorted(one.key for one in store.list("logs/a")) == ["logs/a/1", "logs/ab/2"]
    assert [one.key for one in store.list("logs/a/")] == ["logs/a/1"]
    assert [one.key for one in store.list("logs/a/1")] == ["logs/a/1"]
    assert {one.key for one in store.list("")} == {"logs/a/1", "logs/ab/2", "logs/b/3", "other"}


@everywhere
def test_lists_go_over_pages(opened: Opener) -> None:
    store = opened("x")
    keys = {f"many/{number:04d}" for number in range(1100)}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: store.put_if_absent(key, b"x"), keys))
    assert [*sorted(one.key for one in store.list("many/"))] == sorted(keys)


@everywhere
def test_remotes_beside_each_other_do_not_mix(opened: Opener) -> None:
    first, second = opened("one"), opened("one-two")
    first.put_if_absent("key", b"1")
    assert second.head("key") is None
    assert list(second.list("")) == []


@everywhere
def test_probing_leaves_nothing_behind(opened: Opener) -> None:
    store = opened("x")
    swaps = store.capabilities().compare_and_swap
    assert swaps == ("rclone" not in os.environ["PYTEST_CURRENT_TEST"])
    assert list(store.list("")) == []


@everywhere
@pytest.mark.parametrize(
    "key",
    ["", "/absolute", "../above", "a/../../b", "a//b", "a/", ".hidden", "a/.", "back\\slash", "nul\0", "a" * 2000],
)
def test_keys_stay_in_their_place(opened: Opener, key: str) -> None:
    store = opened("x")
    for call in (store.head, store.delete, lambda key: store.put_if_absent(key, b""), lambda key: read(store, key)):
        with pytest.raises(IntegrityError, match="is not a key"):
            call(key)


@where_it_swaps
def test_what_is_there_stays(opened: Opener) -> None:
    store = opened("x")
    assert store.put_if_absent("key", b"first")
    assert not store.put_if_absent("key", b"second")
    assert read(store, "key") == b"first"


@where_it_swaps
def test_a_key_is_replaced_only_in_the_state_that_is_named(opened: Opener) -> None:
    store, other = opened("x"), opened("x")
    first = store.put_if_match("head", b"1", None)
    assert store.head("head").token == first
    with pytest.raises(ConflictError, match="head"):
        other.put_if_match("head", b"2", None)
    second = other.put_if_match("head", b"2", first)
    assert second != first
    with pytest.raises(ConflictError, match="head"):
        store.put_if_match("head", b"3", first)
    assert read(store, "head") == b"2"
    store.delete("head")
    with pytest.raises(ConflictError, match="head"):
        store.put_if_match("head", b"3", second)
    assert store.head("head") is None


@pytest.mark.parametrize("opened", ["rclone"], indirect=True)
def test_a_store_without_conditional_writes_swaps_nothing(opened: Opener) -> None:
    store = opened("x")
    with pytest.raises(IncompatibleError, match="conditional writes"):
        store.put_if_match("head", b"1", None)
    assert store.head("head") is None


@in_races
def test_of_clients_that_put_a_key_at_once_one_has_put_it(opened: Opener, rounds: int) -> None:
    clients = [opened("x") for _ in range(WRITERS)]
    with ThreadPoolExecutor(WRITERS) as threads:
        for number in range(rounds):
            key = f"race/{number}"
            won = list(threads.map(lambda one, key=key: one[1].put_if_absent(key, b"%d" % one[0]), enumerate(clients)))
            assert won.count(True) == 1, won
            assert read(clients[0], key) == b"%d" % won.index(True)


def _swap(store: KeyStore, key: str, data: bytes, token: str | None) -> str:
    try:
        return store.put_if_match(key, data, token)
    except ConflictError:
        return ""


@in_races
def test_of_clients_that_swap_a_key_at_once_one_has_swapped_it(opened: Opener, rounds: int) -> None:
    clients = [opened("x") for _ in range(WRITERS)]
    token: str | None = None
    with ThreadPoolExecutor(WRITERS) as threads:
        for number in range(rounds):
            swap = threads.map(
                lambda one, number=number, token=token: _swap(one[1], "head", b"%d-%d" % (number, one[0]), token),
                enumerate(clients),
            )
            won = list(swap)
            assert sum(map(bool, won)) == 1, won
            token = max(won)
            assert read(clients[0], "head") == b"%d-%d" % (number, won.index(token))


COUNTING = """
import sys
from loramgr.errors import ConflictError
from loramgr.remotes.opening_store import open_keystore
store = open_keystore(sys.argv[1])
for _ in range(int(sys.argv[2])):
    while True:
        token = store.head("count").token
        number = int(b"".join(store.get("count")))
        try:
            store.put_if_match("count", b"%d" % (number + 1), token)
        except ConflictError:
            continue
        break
"""


@pytest.mark.parametrize("opened", ["folder", "seaweedfs"], indirect=True)
def test_processes_that_count_together_lose_nothing(opened: Opener) -> None:
    store = opened("x")
    store.put_if_match("count", b"0", None)
    command = [sys.executable, "-c", COUNTING, store.url, str(ROUNDS // 5)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert int(read(store, "count")) == 4 * (ROUNDS // 5)


@pytest.mark.parametrize("opened", ["folder", "gcs"], indirect=True)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_store_is_a_mapping(opened: Opener, data: st.DataObject) -> None:
    store, model = opened("x"), dict[str, bytes]()
    for key in [one.key for one in store.list("")]:
        store.delete(key)
    keys = st.sampled_from(["a", "b/c", "b/cd", "b/e/f"])
    for _ in range(data.draw(st.integers(1, 12))):
        key, content = data.draw(keys), data.draw(st.binary(max_size=5))
        match data.draw(st.sampled_from(["put", "swap", "delete", "list"])):
            case "put":
                assert store.put_if_absent(key, content) == (key not in model)
                model.setdefault(key, content)
            case "swap":
                there = store.head(key)
                store.put_if_match(key, content, there.token if there else None)
                model[key] = content
            case "delete":
                store.delete(key)
                model.pop(key, None)
            case _:
                expected = sorted(one for one in model if one.startswith(key))
                assert sorted(one.key for one in store.list(key)) == expected
    assert {one.key: read(store, one.key) for one in store.list("")} == model
