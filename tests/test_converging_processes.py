"""Processes that add, push and rebase at once, on a folder and on a store without conditional writes."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from forkserver import ForkServer
from object_servers import ObjectServers
from peft_files import write_adapter
from remote_homes import make_remote, sound, versions

from loramgr import AddOptions, PullOptions, PushOptions, Workspace

SOAK = bool(os.environ.get("LORAMGR_SOAK"))
CLIENTS = 10 if SOAK else 6
ROUNDS = 50 if SOAK else 3


@pytest.mark.parametrize("kind", ["folder", "rclone"])
def test_pushes_at_once_come_to_one_log(
    kind: str, tmp_path: Path, object_servers: ObjectServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(make_remote(tmp_path / "remote"))
    if kind == "rclone":
        server = object_servers.get("rclone")
        server.enter(monkeypatch)
        url = server.url("converging")
    first = _registered(tmp_path / "home0", url)
    first.add(write_adapter(tmp_path / "first"), AddOptions(name="x"))
    first.push(["x"])
    for client in range(1, CLIENTS):
        shutil.copytree(first.home, tmp_path / f"home{client}")
    homes = [Workspace(tmp_path / f"home{client}") for client in range(CLIENTS)]
    with closing(ForkServer(tmp_path / "said")) as server:
        for turn in range(ROUNDS):
            for client, home in enumerate(homes):
                files = write_adapter(tmp_path / f"in{client}-{turn}", lora_alpha=100 + client + turn * CLIENTS)
                home.add(files, AddOptions(name="x", tags=[f"t{client}-{turn}"], metrics={f"m{client}": turn}))
            assert _pushed(server, homes) == [(0, "")] * CLIENTS
    fresh = _registered(tmp_path / "fresh", url)
    fresh.pull([], PullOptions(all_versions=True))
    told = versions(fresh)
    assert len(told) == 1 + CLIENTS * ROUNDS
    assert sorted(tag for each in told for tag in each.tags) == sorted(
        f"t{client}-{turn}" for client in range(CLIENTS) for turn in range(ROUNDS)
    )
    assert sum(len(each.metrics) for each in told) == CLIENTS * ROUNDS
    assert len(fresh.history("x")) <= 2 * len(told)
    for home in homes:
        home.push(["x"], PushOptions(rebase=True))
        home.pull(["x"], PullOptions(all_versions=True))
        assert versions(home) == told
    sound(fresh)
    sound(homes[0])
    found = fresh.remote_verify()
    assert (found.corrupt, found.missing) == ([], [])


def _registered(home: Path, url: str) -> Workspace:
    workspace = Workspace(home)
    workspace.remote_add("origin", url)
    return workspace


def _pushed(server: ForkServer, homes: list[Workspace]) -> list[tuple[int, str]]:
    """Push from all homes at once, each in a process of its own; return their exit codes and what failed."""
    pids = [server.start("--home", home.home, "push", "--rebase", "x", held=True) for home in homes]
    for pid in pids:
        server.release(pid)
    codes = [server.wait(pid) for pid in pids]
    return [(code, server.errors(pid) if code else "") for code, pid in zip(codes, pids, strict=True)]
