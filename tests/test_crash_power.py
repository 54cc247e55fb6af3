"""A power cut at any moment of every command: what was not synced is gone, and nothing acknowledged is lost.

`LORAMGR_SOAK=1` cuts after every step; otherwise a seeded sample is tried.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import crash_world
import pytest
from crash_stage import SEED, SOAK, Stage, chosen
from faults import needs_strace, traced
from power import NOTHING, OPTIONS, Journal, fates

SAMPLE = 1
ROUNDS = 4 if SOAK else 1

pytestmark = needs_strace()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", chosen(crash_world.COMMANDS, 8))
def test_a_power_cut_leaves_the_old_state_or_the_new_one(stages: list[Stage], command: str, tmp_path: Path) -> None:
    stage = stages[0]
    expected = stage.expect(command)
    stage.reset()
    shutil.copytree(stage.world, tmp_path / "before")
    _, code = traced(stage.server, stage.argv(command), OPTIONS, tmp_path / "log")
    assert code == 0
    journal = Journal.read(tmp_path / "log", stage.world, tmp_path / "before")
    whole = crash_world.imprint(stage.world)
    cut(journal, stage, len(journal.steps), lambda step: len(getattr(step, "data", None) or b"") + 1)
    assert crash_world.imprint(stage.world) == whole, "the journal does not lead to what the command left"
    end = len(journal.steps)
    cuts = [(at, name) for at in range(end + 1) for name, _ in fates(command, ROUNDS)]
    if not SOAK:
        sample = random.Random(f"{SEED} {command}").sample(cuts, SAMPLE)
        cuts = [*sample, (end, NOTHING)]
    problems, judged = [], set()
    for at, name in cuts:
        cut(journal, stage, at, dict(fates(f"{command} {at}", ROUNDS))[name])
        imprint = (crash_world.imprint(stage.world), at == end)
        if imprint not in judged:
            found = stage.problems(command, expected, 0 if at == end else -9)
            problems += [f"after step {at} of {end}, {name}: {problem}" for problem in found]
        judged.add(imprint)
    assert not problems, f"{len(problems)} problems in {len(cuts)} cuts:\n" + "\n".join(problems)


def cut(journal: Journal, stage: Stage, at: int, keeps: object) -> None:
    shutil.rmtree(stage.world)
    journal.restore(at, keeps, stage.world)  # type: ignore[arg-type]
