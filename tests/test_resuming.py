"""A large file whose pull was killed in the middle: the next pull fetches only the rest, from a hub and from S3."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import gate_proxy
import object_servers
import pytest
from fake_hub import FakeHub
from peft_files import write_adapter

from loramgr import AddOptions, PullOptions, PushOptions, Workspace

WIDE = 70_000
LARGE = 64 << 20
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub client's own


@dataclass(frozen=True)
class Place:
    """Where to push to and pull from, and the gate in front of it."""

    push: str
    pull: str
    gate: gate_proxy.Gate


@pytest.fixture(params=["hub", "moto", "seaweedfs"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        if request.param == "hub":
            hub: FakeHub = request.getfixturevalue("hub")
            gate = stack.enter_context(gate_proxy.serve(hub.files_url))
            hub.files_url = gate.address
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
            yield Place("hf:org", "hf:org", gate)
        else:
            servers: object_servers.ObjectServers = request.getfixturevalue("object_servers")
            server = servers.get(request.param)
            server.enter(monkeypatch)
            gate = stack.enter_context(gate_proxy.serve(server.endpoint))
            yield Place(server.url(tmp_path.name), server.at(gate.address).url(tmp_path.name), gate)


def test_a_large_file_whose_pull_was_killed_is_gone_on_with(place: Place, tmp_path: Path) -> None:
    shapes = {"m.q.lora_A.weight": (128, WIDE), "m.q.lora_B.weight": (WIDE, 128)}
    ours = Workspace(tmp_path / "ours")
    ours.add(write_adapter(tmp_path / "x", shapes, r=128), AddOptions(name="x"))
    ours.push(["x"], PushOptions(place.push))
    size = max(file.bytes for file in ours.log("x")[0].files)
    assert size > LARGE
    home = tmp_path / "theirs"
    place.gate.answers.clear()
    place.gate.hold_after = size // 2
    command = [sys.executable, "-m", "loramgr", "--home", str(home), "pull", "x", "--from", place.pull]
    with subprocess.Popen(command, env={**os.environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert place.gate.held.wait(60), process.communicate(timeout=5)
        process.kill()
    place.gate.hold_after = None
    place.gate.done.set()
    while len(place.gate.answers) < 1:  # the one that was held notes what it sent when it is let go
        time.sleep(0.01)
    (partial,) = [path for path in (home / "cache" / "partial").iterdir() if path.stat().st_size > gate_proxy.LARGE]
    there = partial.stat().st_size
    assert there > size // 4
    place.gate.answers.clear()
    theirs = Workspace(home)
    theirs.pull(["x"], PullOptions(place.pull))
    assert place.gate.answers == [(f"bytes={there}-", size - there)]
    assert theirs.log("x")[0].digest == ours.log("x")[0].digest
    found = theirs.verify()
    assert (found.corrupt, found.missing) == ([], [])
