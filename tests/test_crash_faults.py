"""Every command that writes, with a fault at every system call that changes something: nothing is lost or half there.

`LORAMGR_SOAK=1` tries every fault of every command; otherwise a seeded sample is tried.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import crash_world
import pytest
from crash_stage import SEED, SOAK, Stage, chosen
from faults import EFFECTS, KILLED, Fault, count, inject, needs_strace, traced

SAMPLE = 2
MOST = 150

pytestmark = needs_strace()


def faults_of(stage: Stage, command: str, log: Path) -> list[Fault]:
    """Return every fault that the command can meet."""
    stage.reset()
    numbers = count(stage.server, stage.argv(command), log)
    steps = {name: max(1, numbers[name] // MOST) for name in numbers}  # a new store is 771 folders
    points = [(name, at) for name in sorted(numbers) for at in range(1, numbers[name] + 1, steps[name])]
    return [Fault(name, effect, number) for (name, number), effect in product(points, EFFECTS)]


def suffer(stage: Stage, command: str, expected: dict[str, Any], faults: list[Fault], log: Path) -> list[str]:
    """Try faults one by one and return what was wrong after them."""
    problems, judged = [], set()
    for fault in faults:
        stage.reset()
        pid, code, happened = inject(stage.server, stage.argv(command), fault, log)
        errors = stage.server.errors(pid)
        if not happened and code:
            problems.append(f"{fault}: did not happen, and exit {code}: {errors}")
        if code not in (0, KILLED) and ("error" not in errors or "this is a bug" in errors):
            problems.append(f"{fault}: exit {code} and these words: {errors}")
        imprint = (crash_world.imprint(stage.world), code == 0)
        if imprint not in judged:
            problems += [f"{fault}: exit {code}: {problem}" for problem in stage.problems(command, expected, code)]
        judged.add(imprint)
    return problems


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", chosen(crash_world.COMMANDS, 12))
def test_a_fault_at_any_call_leaves_the_old_state_or_the_new_one(
    stages: list[Stage], command: str, tmp_path: Path
) -> None:
    expected = stages[0].expect(command)
    faults = faults_of(stages[0], command, tmp_path / "count")
    assert any(fault.syscall == "fsync" for fault in faults) or command == "db upgrade"
    if not SOAK:
        faults = random.Random(f"{SEED} {command}").sample(faults, min(SAMPLE, len(faults)))
    parts = [(stage, faults[at :: len(stages)], tmp_path / f"log{at}") for at, stage in enumerate(stages)]
    with ThreadPoolExecutor(len(stages)) as pool:
        found = pool.map(lambda part: suffer(part[0], command, expected, *part[1:]), parts)
    problems = [problem for part in found for problem in part]
    assert not problems, f"{len(problems)} of {len(faults)} faults:\n" + "\n".join(problems)


def test_a_new_file_of_the_store_costs_two_syncs_at_most(stages: list[Stage], tmp_path: Path) -> None:
    stage, home, log = stages[0], tmp_path / "home", tmp_path / "log"
    stage.server.call("crash_workers:make_home", str(home))
    before = {*(home / "store").rglob("*")}
    argv = ["--home", str(home), "add", str(stage.template / "a")]
    _, code = traced(stage.server, argv, ["-y", "-e", "trace=fsync,fdatasync,sync,syncfs"], log)
    assert code == 0
    made = [path for path in {*(home / "store").rglob("*")} - before if path.is_file() and path.name != "lock"]
    syncs = [line for line in log.read_text().splitlines() if f"{home}/store" in line]
    assert len(made) == 5  # three blobs, a manifest and a log entry
    assert 0 < len(syncs) <= 2 * len(made), "\n".join(syncs)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_where_folders_cannot_be_exchanged(stages: list[Stage], number: int, tmp_path: Path) -> None:
    stage, command = stages[0], "unmerge in place"
    expected = stage.expect(command)
    stage.reset()
    faults = ["-e", "inject=renameat2:error=EINVAL", "-e", f"inject=rename:signal=KILL:when={number}"]
    pid, code = traced(stage.server, stage.argv(command), ["-e", "trace=rename,renameat2", *faults], tmp_path / "log")
    assert code == KILLED, stage.server.errors(pid)
    again = stage.server.run(*stage.argv(command))
    assert again in (0, expected["again"])
    assert stage.snapshot(command) == expected["after"]
    assert [path.name for path in stage.world.iterdir() if path.name.startswith(".")] == []
