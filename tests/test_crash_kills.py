"""Processes killed at random times on one home, against a model of what has to be there.

`LORAMGR_SOAK=1` kills 2,000; otherwise it is a seeded sample. A process that came to its end with exit code 0 has
changed what its command says; of one that was killed either all is there or nothing, and the model takes that over.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash_stage import SEED, SOAK, Stage
from faults import KILLED
from peft_files import write_adapter

KILLS, EVERY = (2000, 50) if SOAK else (20, 10)
LATEST = 1.3  # of the time that a command takes
UPKEEP = [["gc", "--grace", "0", "--yes"], ["gc", "--yes"], ["verify"], ["list"]]
NAMES = ("one", "two", "three", "four")

State = dict[tuple[str, int], dict[str, Any]]
Action = Callable[["Model", tuple[str, int]], tuple[list[str], State]]


class Model:
    """What a person knows of the home: the versions, what is said about each, and the numbers that were given."""

    def __init__(self) -> None:
        self.versions: State = {}
        self.highest: dict[str, int] = {}

    def agree(self, seen: State, expected: list[State]) -> None:
        assert seen in expected, difference(seen, expected[-1])
        self.versions = seen
        for name, number in seen:
            self.highest[name] = max(number, self.highest.get(name, 0))


def difference(seen: State, expected: State) -> str:
    lines = [f"{key}: {seen.get(key)} and not {expected.get(key)}" for key in sorted(seen.keys() | expected.keys())]
    return "\n".join(line for line, key in zip(lines, sorted(seen.keys() | expected.keys()), strict=True)
                     if seen.get(key) != expected.get(key))  # fmt: skip


class Player:
    """Chooses commands at random and says what each would change."""

    def __init__(self, generator: random.Random, scratch: Path) -> None:
        self._random = generator
        self._scratch = scratch
        self._count = 0

    def choose(self, model: Model) -> tuple[list[str], State]:
        """Return a command and the versions as they are after it."""
        actions: list[Action] = [self._tag, self._label, self._remove]
        if not model.versions or self._random.random() < 0.4:
            return self._add(model)
        if self._random.random() < 0.15:
            return self._random.choice(UPKEEP), model.versions
        return self._random.choice(actions)(model, self._random.choice(sorted(model.versions)))

    def _add(self, model: Model) -> tuple[list[str], State]:
        self._count += 1
        name, folder = self._random.choice(NAMES), write_adapter(self._scratch / str(self._count))
        (folder / "README.md").write_text(f"number {self._count}")
        label = str(self._count)
        after = {**model.versions}
        number = model.highest.get(name, 0) + 1
        after[name, number] = {"labels": {"count": label}, "tags": [], "readme": folder / "README.md"}
        return ["add", str(folder), "--name", name, "--label", f"count={label}"], after

    def _tag(self, model: Model, key: tuple[str, int]) -> tuple[list[str], State]:
        tag = self._random.choice(["prod", "test"])
        after = {
            each: {**said, "tags": sorted({*said["tags"], tag} if each == key else {*said["tags"]} - {tag})}
            if each[0] == key[0]
            else said
            for each, said in model.versions.items()
        }
        return ["tag", f"{key[0]}@v{key[1]}", tag, "--move"], after

    def _label(self, model: Model, key: tuple[str, int]) -> tuple[list[str], State]:
        value = str(self._random.randrange(100))
        said = model.versions[key]
        after = {**model.versions, key: {**said, "labels": {**said["labels"], "mark": value}}}
        return ["label", f"{key[0]}@v{key[1]}", f"mark={value}"], after

    def _remove(self, model: Model, key: tuple[str, int]) -> tuple[list[str], State]:
        after = {each: said for each, said in model.versions.items() if each != key}
        return ["remove", f"{key[0]}@v{key[1]}", "--force", "--yes"], after


@pytest.mark.timeout(7200)
def test_random_kills(stages: list[Stage], tmp_path: Path) -> None:
    stage, generator, model = stages[0], random.Random(SEED), Model()
    server, home = stage.server, stage.world / "home"
    stage.reset()
    shutil.rmtree(home)
    assert server.run("--home", home, "list") == 0
    started = time.monotonic()
    assert server.run("--home", home, "add", write_adapter(tmp_path / "first"), "--name", "first") == 0
    latest = LATEST * (time.monotonic() - started)
    assert server.run("--home", home, "remove", "first", "--yes") == 0
    player, readmes, kills, survivors = Player(generator, tmp_path), dict[tuple[str, int], Path](), 0, 0
    while kills < KILLS:
        command, after = player.choose(model)
        code = killed(stage, home, command, generator.random() * latest)
        kills, survivors = kills + (code == KILLED), survivors + (code == 0)
        assert code in (0, KILLED), (command, code)
        readmes |= {key: said["readme"] for key, said in after.items()}
        seen = look(stage, home, readmes, deep=kills % EVERY == 0 and code == KILLED)
        model.agree(seen, [after] if code == 0 else [model.versions, after])
    look(stage, home, readmes, deep=True)
    print(f"{kills} killed, {survivors} came to their end")


def killed(stage: Stage, home: Path, command: list[str], after: float) -> int:
    """Kill a command after so many seconds and return its exit code, 0 when it was faster."""
    pid = stage.server.start("--home", home, *command)
    time.sleep(after)
    stage.server.kill(pid)
    code = stage.server.wait(pid)
    assert code in (0, KILLED), stage.server.errors(pid)
    return code


def look(stage: Stage, home: Path, readmes: dict[tuple[str, int], Path], *, deep: bool) -> State:
    """Return what is there; when it goes deep, also verify, export, and compare with what the logs alone give."""
    listed = stage.server.call("crash_workers:listed", str(home))
    if deep:
        shutil.rmtree(stage.world / "copy", ignore_errors=True)
        found = stage.server.call("crash_workers:proved", str(home), str(stage.world / "copy"))
        assert found["problems"] == []
        for name, number, readme in found["readmes"]:
            assert readme == readmes[name, number].read_text(), (name, number)
    return {
        (name, number): {"labels": labels, "tags": tags, "readme": readmes[name, number]}
        for name, number, labels, tags in listed
    }
