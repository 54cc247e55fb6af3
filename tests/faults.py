"""Injects faults into the system calls of a real process with strace: an error, or a kill, at the Nth call."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from forkserver import ForkServer

SYSCALLS = (
    *(
        "write",
        "pwrite64",
        "sendfile",
        "copy_file_range",
        "fsync",
        "fdatasync",
        "ftruncate",
        "fchmod",
        "chmod",
        "mkdir",
        "rmdir",
    ),
    *("rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat"),
)
EFFECTS = ("error=EIO", "error=ENOSPC", "signal=KILL")
KILLED = -9

_CALL = re.compile(rf"^(\d+) +({'|'.join(SYSCALLS)})\(", re.MULTILINE)


class Fault(NamedTuple):
    """What happens at the `number`th call, counted from 1, of a system call by any one thread."""

    syscall: str
    effect: str
    number: int

    def __str__(self) -> str:
        return f"{self.syscall}:{self.effect}:when={self.number}"


def needs_strace() -> pytest.MarkDecorator:
    """Return the mark of tests that trace processes."""
    return pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")


def traced(server: ForkServer, argv: list[str], options: list[str], log: Path) -> tuple[int, int]:
    """Run a command line under strace, which writes to `log`, and return its process id and exit code."""
    pid = server.start(*argv, held=True)
    command = ["strace", "-f", "-o", str(log), *options, "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        server.release(pid)
        code = server.wait(pid)
        tracer.stderr.read()
    if "attached" not in attached:
        pytest.skip(f"strace cannot trace here: {attached.strip()}")
    return pid, code


def count(server: ForkServer, argv: list[str], log: Path) -> dict[str, int]:
    """Run a command line and return how often its busiest thread makes each of the system calls."""
    traced(server, argv, ["-e", f"trace={','.join(SYSCALLS)}"], log)
    calls = Counter(_CALL.findall(log.read_text()))
    return {name: max(n for (_, other), n in calls.items() if other == name) for name in {name for _, name in calls}}


def inject(server: ForkServer, argv: list[str], fault: Fault, log: Path) -> tuple[int, int, bool]:
    """Run a command line with a fault and return its process id, its exit code, and whether the fault happened."""
    options = ["-e", f"trace={fault.syscall}", "-e", f"inject={fault.syscall}:{fault.effect}:when={fault.number}"]
    pid, code = traced(server, argv, options, log)
    return pid, code, code == KILLED or "(INJECTED)" in log.read_text()
