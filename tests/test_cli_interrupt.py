"""Ctrl-C in the middle of a merge, in a process of its own: exit code 130 and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from loramgr import Workspace
from loramgr.cli.main import run

PATIENCE_S = 120


def test_an_interrupted_merge_leaves_nothing(minilm_base: Path, root: Path, tmp_path: Path) -> None:
    home, parent = tmp_path / "home", tmp_path / "outputs"
    parent.mkdir()
    assert run(["--home", str(home), "base", "add", str(minilm_base), "--name", "minilm"]) == 0
    assert run(["--home", str(home), "add", str(root / "examples" / "minilm" / "lic-r8-qv")]) == 0
    before = Workspace(home).list()
    command = [sys.executable, "-m", "loramgr", "--home", home, "merge", "minilm", "lic-r8-qv", "-o", parent / "merged"]
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as merge:
        deadline = time.monotonic() + PATIENCE_S
        # What is being written lies beside the output: its first sight is the middle of the merge.
        while not any(parent.iterdir()):
            assert merge.poll() is None, merge.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        merge.send_signal(signal.SIGINT)
        out, err = merge.communicate()
    assert (merge.returncode, out, err.strip()) == (130, "", "interrupted; nothing half done")
    assert list(parent.iterdir()) == []
    assert Workspace(home).list() == before
    assert Workspace(home).verify().corrupt == []
    assert list((home / "store" / "scratch").iterdir()) == []
