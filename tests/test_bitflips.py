"""Single bits flipped anywhere in a home: `verify` finds each, or it changes nothing that any command does.

`LORAMGR_SOAK=1` flips 10,000; otherwise it is a seeded sample. An adapter with a damaged file is never used.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from crash_stage import SEED, SOAK, Stage

TRIALS = 10_000 if SOAK else 100


@pytest.mark.timeout(14400)
def test_a_flipped_bit_is_found_or_changes_nothing(stages: list[Stage]) -> None:
    def play(at: int) -> dict[str, Any]:
        stage = stages[at]
        stage.reset()
        trials = TRIALS // len(stages)
        return dict(stage.server.call("flips:flip", f"{stage.world}/home", str(stage.world), f"{SEED} {at}", trials))

    with ThreadPoolExecutor(len(stages)) as pool:
        results = list(pool.map(play, range(len(stages))))
    ends: Counter[str] = sum((Counter(result["ends"]) for result in results), Counter())
    problems = [problem for result in results for problem in result["problems"]]
    print(dict(sorted(ends.items())))
    assert not problems, f"{len(problems)} of {TRIALS}:\n" + "\n".join(problems)
    assert ends["entries: found"] > 0
    assert ends["entries: unseen"] == 0
    assert ends["blobs: found"] > ends["blobs: unseen"]  # of versions that were removed
