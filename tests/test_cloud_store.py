"""Object stores beyond what all key stores do: faults on the way, missing buckets, large files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from random import Random
from types import SimpleNamespace

import fault_proxy
import object_servers as servers
import pytest
from fault_proxy import Fault

from loramgr.errors import IntegrityError, LoramgrError, NotFoundError, UncheckedError
from loramgr.remotes import retrying
from loramgr.remotes.opening_store import open_keystore
from loramgr.remotes.protocol import KeyStore

SOAK = bool(os.environ.get("LORAMGR_SOAK"))
SAMPLE = 10**6 if SOAK else 12
DATA = Random(3).randbytes(1_000_001)
LARGE = Random(4).randbytes(17_000_000)
# What only a digest, or a length known from elsewhere, can tell from the right answer.
UNSEEN = (Fault.WRONG_BYTES, Fault.SHORT_LENGTH)


def read(store: KeyStore, key: str, offset: int = 0) -> bytes:
    return b"".join(store.get(key, offset))


@pytest.fixture
def proxy(
    object_servers: servers.ObjectServers, monkeypatch: pytest.MonkeyPatch, brief: None
) -> Iterator[fault_proxy.Proxy]:
    """Return a proxy in front of moto, which stalls for longer than the clients of these tests wait."""
    server = object_servers.get("moto")
    server.enter(monkeypatch)
    with fault_proxy.serve(server.endpoint) as proxy:
        proxy.stall_seconds = 0.8
        yield proxy


def through(proxy: fault_proxy.Proxy, servers_: servers.ObjectServers, prefix: str) -> KeyStore:
    return open_keystore(servers_.get("moto").at(proxy.address).url(prefix, timeout=0.3))


def test_a_listing_of_what_lies_elsewhere_is_asked_for_again(
    proxy: fault_proxy.Proxy, object_servers: servers.ObjectServers
) -> None:
    store = through(proxy, object_servers, "listed")
    store.put_if_absent("logs/a", b"1")
    store.put_if_absent("logs/b", b"2")
    proxy.wrong = (b"<Key>listed/logs/a", b"<Key>listed/lugs/a")
    proxy.plan(Fault.WRONG_BYTES, 1)
    assert sorted(found.key for found in store.list("logs/")) == ["logs/a", "logs/b"]
    proxy.plan(Fault.WRONG_BYTES, 1, 1000)
    with pytest.raises(IntegrityError, match="lists 'lugs/a' as a key in logs"):
        list(store.list("logs/"))


OPERATIONS: dict[str, Callable[[KeyStore], object]] = {
    "head": lambda store: store.head("there").size,
    "get": lambda store: read(store, "there"),
    "get from an offset": lambda store: read(store, "there", 500_000),
    "list": lambda store: sorted(one.key for one in store.list("")),
    "delete": lambda store: store.delete("there"),
    "put": lambda store: store.put_if_absent("new", DATA) in (True, False),  # False: the answer to the first was lost
    "put in parts": lambda store: store.put_if_absent("large", LARGE) in (True, False),
    "swap": lambda store: bool(store.put_if_match("there", b"swapped", store.head("there").token)),
    "make": lambda store: bool(store.put_if_match("made", b"made", None)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_on_the_way_is_passed_or_told(
    name: str, proxy: fault_proxy.Proxy, object_servers: servers.ObjectServers, tmp_path: Path
) -> None:
    operation = OPERATIONS[name]

    def fresh(number: int) -> KeyStore:
        store = through(proxy, object_servers, f"{tmp_path.name}/{number}")
        proxy.plan(None)
        store.capabilities()
        store.put_if_absent("there", DATA)
        return store

    store = fresh(0)
    proxy.plan(None)
    expected = operation(store)
    cases = [(at, fault) for at in range(1, proxy.requests + 1) for fault in Fault]
    for number, (at, fault) in enumerate(Random(name).sample(cases, min(len(cases), SAMPLE)), 1):
        store = fresh(number)
        proxy.plan(fault, at)
        try:
            found = operation(store)
        except UncheckedError:
            assert fault in UNSEEN, (at, fault)  # once is what it has to get over
        else:
            assert found == expected or fault in UNSEEN, (at, fault)
        assert len(proxy.faulted) <= 1  # an upload in parts takes one request more or less
        _is_whole(store, proxy)


def _is_whole(store: KeyStore, proxy: fault_proxy.Proxy) -> None:
    """Check that no key has half of its bytes."""
    proxy.plan(None)
    contents = {"there": (DATA, b"swapped"), "new": (DATA,), "large": (LARGE,), "made": (b"made",)}
    for found in store.list(""):
        assert read(store, found.key) in contents[found.key]


@pytest.mark.parametrize(
    "fault", [Fault.CUT_BEFORE, Fault.ERROR_503, Fault.ERROR_429, Fault.STALL_BEFORE, Fault.TRUNCATED, Fault.NO_LENGTH]
)
@pytest.mark.parametrize("name", ["get", "list", "put", "put in parts", "swap"])
def test_what_does_not_pass_is_told_after_some_attempts(
    fault: Fault, name: str, proxy: fault_proxy.Proxy, object_servers: servers.ObjectServers, tmp_path: Path
) -> None:
    store = through(proxy, object_servers, tmp_path.name)
    store.capabilities()
    store.put_if_absent("there", DATA)
    proxy.plan(fault, times=10**6)
    # these spoil answers, but not what was asked for
    harmless = fault in (Fault.TRUNCATED, Fault.NO_LENGTH) and name in ("put", "swap")
    with nullcontext() if harmless else pytest.raises(UncheckedError, match="s3://adapters") as caught:
        OPERATIONS[name](store)
    if caught is not None:
        assert servers.SECRET not in f"{caught.value.message}{caught.value.hint}"
    assert proxy.requests <= 2 * (retrying.RETRIES + 1) ** 2
    _is_whole(store, proxy)


def test_a_swap_whose_answer_is_lost_is_not_won_when_somebody_else_has_swapped(
    proxy: fault_proxy.Proxy, object_servers: servers.ObjectServers, tmp_path: Path
) -> None:
    store = through(proxy, object_servers, tmp_path.name)
    token = store.put_if_match("head", b"1", None)
    store.put_if_match("head", b"theirs", token)
    proxy.plan(Fault.CUT_BEFORE)
    with pytest.raises(LoramgrError) as caught:
        store.put_if_match("head", b"ours", token)
    assert caught.value.exit_code == 7
    assert read(store, "head") == b"theirs"


@pytest.mark.parametrize("kind", [kind for kind in servers.KINDS if kind != "seaweedfs"])  # it makes what is missing
def test_a_bucket_that_is_not_there_is_named(
    kind: str, object_servers: servers.ObjectServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = object_servers.get(kind)
    server.enter(monkeypatch)
    url = server.url("x").replace(f"//{servers.BUCKET}", "//absent-bucket")
    for call in (lambda store: list(store.list("")), lambda store: store.put_if_absent("a", b"x")):
        with pytest.raises(NotFoundError, match="absent-bucket") as caught:
            call(open_keystore(url))
        assert servers.SECRET not in str(caught.value)


STREAMING = """
import hashlib, re, sys
from pathlib import Path
from loramgr.remotes.opening_store import open_keystore
store = open_keystore(sys.argv[1])
assert store.head("large") is None
def peak():  # kilobytes; what getrusage tells begins with the peak of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
assert store.put_if_absent("large", Path(sys.argv[2]))
hasher = hashlib.sha256()
for piece in store.get("large"):
    hasher.update(piece)
print(hasher.hexdigest(), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_file_streams_in_bounded_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = 2 << 30 if SOAK else 200 << 20
    source = tmp_path / "large"
    with source.open("wb") as file:
        for number in range(size >> 20):
            file.write(Random(number).randbytes(64) * (1 << 14))
    expected = subprocess.run(["sha256sum", source], capture_output=True, text=True, check=True).stdout.split()[0]
    with servers.rclone(tmp_path / "remote") as server:
        server.enter(monkeypatch)
        command = [sys.executable, "-c", STREAMING, server.url("x"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    digest, kilobytes = done.stdout.split()
    assert digest == expected
    assert int(kilobytes) < 128 << 10


def test_two_large_files_go_at_once_at_most(
    object_servers: servers.ObjectServers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = object_servers.get("moto")
    server.enter(monkeypatch)
    store = open_keystore(server.url(tmp_path.name))
    patient, lock, running, most = store._clients.patient, threading.Lock(), [0], [0]

    def put(*arguments: object, **options: object) -> object:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return patient.put(*arguments, **options)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(
        store, "_clients", SimpleNamespace(single=store._clients.single, patient=SimpleNamespace(put=put))
    )
    (tmp_path / "large").write_bytes(LARGE)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda number: store.put_if_absent(f"large{number}", tmp_path / "large"), range(6)))
    assert most == [2]
