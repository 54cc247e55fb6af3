"""The cores that a process may use are those it is bound to, not all of the machine's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loramgr import Workspace


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
def test_a_bound_process_uses_its_own_cores_alone() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from loramgr.cores import usable_cores\nprint(usable_cores())"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_workspace_works_with_that_many_threads() -> None:
    assert Workspace("home")._jobs == len(os.sched_getaffinity(0))
    assert Workspace("home", jobs=3)._jobs == 3
