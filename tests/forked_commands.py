"""A `loramgr` for shells, each command of which is a forked process, so that none of them imports torch again.

    with serving(folder, environment) as programs:
        subprocess.run(["bash", "-c", line], env=environment | {"PATH": f"{programs}:{environment['PATH']}"})

The program in `bin` hands its arguments, folder, environment and open files over; the process that is forked for them
runs `loramgr.__main__` there. Only packages that loramgr uses are imported before: loramgr's own modules are imported
by each command, as in a process that is started.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

IMPORTS = (
    "torch",
    "sqlalchemy.orm",
    "sqlalchemy.dialects.sqlite",
    "alembic.command",
    "alembic.script",
    "click",
    "tqdm",
)
# What `loramgr` sets before it imports torch, which is too late in a forked process.
SETTINGS = {"THP_MEM_ALLOC_ENABLE": "1", "OPENBLAS_NUM_THREADS": "1"}
ASK = """#!{python} -IS
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps({{"argv": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
    files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    server.sendmsg([len(asked).to_bytes(4, "big")], files)
    server.sendall(asked)
    code = server.recv(1)
sys.exit(code[0] if code else 70)
"""


@contextmanager
def serving(folder: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """Serve until the block ends; yields the folder with `loramgr`, which is made inside the given one.

    What an interpreter reads of its environment when it starts is that of `environment` for every command.
    """
    address = folder / "commands"
    program = folder / "bin" / "loramgr"
    program.parent.mkdir()
    program.write_text(ASK.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, __file__, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environment, **SETTINGS},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        yield program.parent


def serve(address: str) -> None:
    """Fork a process for each connection until stdin ends."""
    for module in IMPORTS:
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            with connection:
                _answer(connection)


def _answer(connection: socket.socket) -> None:
    files = array.array("i")
    size, ((_, _, sent), *_), _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * files.itemsize))
    files.frombytes(sent)
    with connection.makefile("rb") as reader:
        asked = json.loads(reader.read(int.from_bytes(size, "big")))
    pid = os.fork()
    if pid == 0:
        for descriptor, file in enumerate(files):
            os.dup2(file, descriptor)
        _run(asked["argv"], asked["folder"], asked["environment"])
    for file in files:
        os.close(file)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.send(bytes([code if code >= 0 else 128 - code]))


def _run(argv: list[str], folder: str, environment: dict[str, str]) -> None:
    code: object = 70
    try:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = argv
        sys.path[0] = folder
        runpy.run_module("loramgr", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
