"""Every request of a push and of a pull goes wrong once, or for good: it ends well or in words, and again ends well."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
from fault_proxy import Fault, Proxy, serve
from object_servers import ObjectServer, ObjectServers
from peft_files import PLAIN, write_adapter

from loramgr.errors import LoramgrError
from loramgr.remotes.opening import open_remote
from loramgr.workspace.home import Home
from loramgr.workspace.options import AddOptions, PullOptions, PushOptions
from loramgr.workspace.pulling import pull
from loramgr.workspace.pushing import push
from loramgr.workspace.workspace import Workspace

SOAK = bool(os.environ.get("LORAMGR_SOAK"))
TIMEOUT = 0.5
SAMPLE = 6
LAST = 40  # no push or pull of these tests makes as many requests
FOR_GOOD = 1000
KINDS = ["seaweedfs", "rclone", *(["azurite", "gcs"] if SOAK else [])]
ONCE = [(fault, at, 1) for at in range(1, LAST + 1) for fault in Fault]
ALWAYS = [(fault, at, FOR_GOOD) for at in (1, 4) for fault in Fault]
NAMES = count()


@dataclass(frozen=True)
class World:
    """A server, its proxy, and a home with what is pushed; `pushed` is a place where all of it is already.

    `pushing` and `pulling` are how many requests each takes where nothing goes wrong.
    """

    server: ObjectServer
    proxy: Proxy
    home: Home
    pushed: str
    pushing: int = LAST
    pulling: int = LAST

    def proxied(self, prefix: str) -> str:
        return self.server.at(self.proxy.address).url(prefix, timeout=TIMEOUT)


@pytest.fixture(scope="module", params=KINDS)
def shared_world(
    request: pytest.FixtureRequest, object_servers: ObjectServers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    server = object_servers.get(request.param)
    folder = tmp_path_factory.mktemp("home")
    workspace = Workspace(folder / "home")
    for at, shape in enumerate(((6, 2), (7, 2), (2000, 2))):
        shapes = PLAIN | {"m.q.lora_B.weight": shape}
        workspace.add(write_adapter(folder / f"adapter-{at}", shapes), AddOptions(name="sql", tags=(f"tag-{at}",)))
    with serve(server.endpoint) as proxy:
        proxy.stall_seconds = 4 * TIMEOUT
        home = Home.open(folder / "home", 2, False)
        with pytest.MonkeyPatch.context() as patch:
            server.enter(patch)
            prefix = f"faults-{request.param}-{os.getpid()}"
            plain = World(server, proxy, home, prefix)
            push(home, ["sql"], PushOptions(plain.proxied(prefix)))
            pushing = proxy.requests
            proxy.plan(None)
            pull(Home.open(folder / "fresh", 2, False), ["sql"], PullOptions(plain.proxied(prefix), all_versions=True))
            yield replace(plain, pushing=pushing, pulling=proxy.requests)


@pytest.fixture
def world(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    shared_world.server.enter(monkeypatch)
    shared_world.proxy.plan(None)
    return shared_world


def chosen(points: list[tuple[Fault, int, int]], seed: int, many: int) -> list[tuple[Fault, int, int]]:
    """Return all points where there is time, else a few that a seed chooses, early ones most of all."""
    if SOAK:
        return points
    return random.Random(seed).sample([point for point in points if point[1] <= 16], many)


def named(point: tuple[Fault, int, int]) -> str:
    fault, at, times = point
    return f"{fault.name.lower()}-{at}{'' if times == 1 else '-and-on'}"


def read_back(url: str, folder: Path, world: World) -> None:
    """Pull everything into a fresh home and compare it with what was pushed."""
    home = Home.open(folder, 2, False)
    pull(home, ["sql"], PullOptions(url, all_versions=True))
    check_same(folder, world)


def check_same(folder: Path, world: World) -> None:
    there, here = Workspace(folder), Workspace(world.home.path)
    assert [(each.version, each.digest, each.tags) for each in there.log("sql")] == [
        (each.version, each.digest, each.tags) for each in here.log("sql")
    ]
    found = there.verify()
    assert (found.corrupt, found.missing) == ([], [])


def attempt(work: Callable[[], None], world: World, point: tuple[Fault, int, int]) -> LoramgrError | None:
    """Do it with that fault; return the error in words that it ends in, None where it ends well."""
    world.proxy.plan(*point)
    found: LoramgrError | None = None
    try:
        work()
    except LoramgrError as error:
        found = error
    assert found is not None or world.proxy.requests < LAST
    world.proxy.plan(None)
    assert found is None or found.exit_code in (3, 4, 5, 7)
    return found


@pytest.mark.parametrize("point", [*chosen(ONCE, 1, SAMPLE), *chosen(ALWAYS, 2, 1)], ids=named)
def test_a_push_ends_well_or_in_words_and_again_ends_well(
    world: World, tmp_path: Path, point: tuple[Fault, int, int]
) -> None:
    if point[1] > world.pushing:
        return  # there is no such request
    prefix = f"push-{os.getpid()}-{next(NAMES)}"

    def once() -> None:
        push(world.home, ["sql"], PushOptions(world.proxied(prefix)))

    attempt(once, world, point)
    direct = open_remote(world.server.url(prefix))
    for log in direct.logs(lambda _: None):  # what has a name is whole, whatever happened
        assert log.name == "sql"
    once()
    assert len(direct.log("sql", lambda _: None).heads) == 1  # type: ignore[union-attr]
    read_back(world.server.url(prefix), tmp_path / "fresh", world)


@pytest.mark.parametrize("point", [*chosen(ONCE, 3, SAMPLE), *chosen(ALWAYS, 4, 1)], ids=named)
def test_a_pull_ends_well_or_in_words_and_again_ends_well(
    world: World, tmp_path: Path, point: tuple[Fault, int, int]
) -> None:
    if point[1] > world.pulling:
        return  # there is no such request
    home = Home.open(tmp_path / "fresh", 2, False)

    def once() -> None:
        pull(home, ["sql"], PullOptions(world.proxied(world.pushed), all_versions=True))

    error = attempt(once, world, point)
    if error is None:
        check_same(tmp_path / "fresh", world)
    found = Workspace(tmp_path / "fresh").verify()
    assert (found.corrupt, found.missing) == ([], [])
    once()
    check_same(tmp_path / "fresh", world)
