"""Where commands are broken: a fork server, and a copy of the world that is made anew for every run."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crash_world
from forkserver import ForkServer

SOAK = bool(os.environ.get("LORAMGR_SOAK"))
SEED = 20260101
_SHARED_MEMORY = Path("/dev/shm")


def chosen(names: Iterable[str], count: int) -> list[str]:
    """Return all names for a soak, else a seeded sample of them."""
    names = list(names)
    return names if SOAK else sorted(random.Random(SEED).sample(names, min(count, len(names))))


@dataclass
class Stage:
    """Where one process at a time plays: its own fork server and its own copy of the world, always at one path."""

    server: ForkServer
    template: Path
    world: Path

    def reset(self) -> None:
        shutil.rmtree(self.world, ignore_errors=True)
        crash_world.copy(self.template, self.world)

    def argv(self, command: str) -> list[str]:
        return crash_world.argv(command, self.template, self.world)

    def snapshot(self, command: str) -> dict[str, Any]:
        return dict(self.server.call("crash_world:snapshot", str(self.world), crash_world.home_of(command)))

    def expect(self, command: str) -> dict[str, Any]:
        """Run the command twice, without a fault."""
        self.reset()
        before = self.snapshot(command)
        pid = self.server.start(*self.argv(command))
        assert self.server.wait(pid) == 0, self.server.errors(pid)
        after = self.snapshot(command)
        return {"before": before, "after": after, "again": self.server.run(*self.argv(command))}

    def problems(self, command: str, expected: dict[str, Any], code: int) -> list[str]:
        return list(self.server.call("crash_world:judge", str(self.template), str(self.world), command, expected, code))


def make_stages(folder: Path) -> list[Stage]:
    """Make the template, and one stage per core for a soak, else one.

    They are in memory where the system offers that: what a fault leaves behind is the same there, and syncs are free.
    """
    if os.access(_SHARED_MEMORY, os.W_OK):
        folder = _SHARED_MEMORY / f"loramgr-crash-{os.getpid()}"
    numbers = range((os.cpu_count() or 1) if SOAK else 1)
    stages = [Stage(ForkServer(folder / f"io{at}"), folder / "template", folder / f"world{at}") for at in numbers]
    stages[0].template.mkdir()
    stages[0].server.call("crash_world:build", str(stages[0].template))
    return stages
