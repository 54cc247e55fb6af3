"""Imports loramgr once and forks a process for every command that is asked for, so that a run costs milliseconds.

Run as a script it serves requests, one JSON line each, on stdin and stdout; `ForkServer` is the other end. A forked
process is as real as a started one: it has its own memory, descriptors and locks, and can be traced and killed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)
IMPORTS = (
    *("loramgr.cli.main", "loramgr.workspace", "loramgr.workspace.merging", "loramgr.workspace.restoring", "torch"),
    *("loramgr.catalog.rebuild", "loramgr.catalog.comparison", "loramgr.checkpoints.output", "alembic.command"),
    *(
        "loramgr.algebra.exact",
        "loramgr.algebra.casting",
        "loramgr.tensors",
        "alembic.script",
        "tqdm",
        "logging.config",
    ),
    *("loramgr.cli.adapters", "loramgr.cli.bases", "loramgr.cli.database", "loramgr.cli.edits", "loramgr.cli.merging"),
    *("loramgr.cli.remotes", "loramgr.workspace.pushing", "loramgr.workspace.pulling", "loramgr.remotes.opening"),
)


class ForkServer:
    """Starts, releases and waits for forked processes; not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAMGR_")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *argv: str | Path, held: bool = False) -> int:
        """Fork a process that runs a command line, when released if it is held, and return its id."""
        return self._start({"argv": [str(argument) for argument in argv], "held": held})

    def start_call(self, function: str, *arguments: Any) -> int:
        """Fork a process that calls `module:function` and writes what it returns, as JSON, to its output."""
        return self._start({"call": function, "arguments": arguments, "held": False})

    def release(self, pid: int) -> None:
        self._ask({"release": pid})

    def wait(self, pid: int) -> int:
        """Return the exit code, negative for a signal."""
        return int(self._ask({"wait": pid})["code"])

    def kill(self, pid: int) -> None:
        """Kill a process that was not waited for yet."""
        os.kill(pid, signal.SIGKILL)

    def output(self, pid: int) -> str:
        return (self.folder / f"{pid}.out").read_text()

    def errors(self, pid: int) -> str:
        return (self.folder / f"{pid}.err").read_text()

    def run(self, *argv: str | Path) -> int:
        return self.wait(self.start(*argv))

    def call(self, function: str, *arguments: Any) -> Any:
        """Call `module:function` in a process of its own and return what it returns."""
        pid = self.start_call(function, *arguments)
        code = self.wait(pid)
        assert code == 0, f"{function}: exit {code}: {self.errors(pid)}"
        return json.loads(self.output(pid))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _start(self, request: dict[str, Any]) -> int:
        return int(self._ask({"start": {**request, "folder": str(self.folder)}})["pid"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def serve() -> None:
    """Answer requests until stdin ends."""
    for module in IMPORTS:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    gates: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(writing)
                _run(request["start"], reading)
            os.close(reading)
            gates[pid] = writing
            if not request["start"]["held"]:
                os.close(gates.pop(pid))
            answer = {"pid": pid}
        elif "release" in request:
            os.close(gates.pop(request["release"]))
            answer = {}
        else:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        print(json.dumps(answer), file=answers, flush=True)


def _run(request: dict[str, Any], gate: int) -> None:
    code = 70
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # else only an ancestor may trace it
        _redirect(Path(request["folder"]))
        os.read(gate, 1)
        if "argv" in request:
            from loramgr.cli.main import run

            code = run(request["argv"])
        else:
            module, _, name = request["call"].partition(":")
            print(json.dumps(getattr(importlib.import_module(module), name)(*request["arguments"])))
            code = 0
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _redirect(folder: Path) -> None:
    for descriptor, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, folder / f"{os.getpid()}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, folder / f"{os.getpid()}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    serve()
