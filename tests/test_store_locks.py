"""The store's lock between real processes: writers together, gc alone, nothing left by the dead."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peft_files import write_adapter

from loramgr import ConflictError, Workspace
from loramgr.cli.main import run
from loramgr.store import locks
from loramgr.store.locks import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from loramgr.store.locks import locked
with locked(Path(sys.argv[1]), exclusive=sys.argv[2] == "alone"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(root: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold the lock."""
    command = [sys.executable, "-c", HOLD, str(root), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_writers_share_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path, "shared"), locked(tmp_path, seconds=0), locked(tmp_path, seconds=0):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize(("theirs", "ours"), [("shared", True), ("alone", False), ("alone", True)])
def test_gc_is_alone(tmp_path: Path, theirs: str, ours: bool) -> None:
    with holder(tmp_path, theirs):
        started = time.monotonic()
        with pytest.raises(ConflictError, match="locked") as refused, locked(tmp_path, exclusive=ours, seconds=0.2):
            pytest.fail("two hold what only one can")
        assert 0.2 <= time.monotonic() - started < 5
        assert refused.value.exit_code == 7
    with locked(tmp_path, exclusive=ours, seconds=0):
        pass


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    with holder(tmp_path, "alone") as process:
        with pytest.raises(ConflictError), locked(tmp_path, exclusive=True, seconds=0):
            pytest.fail("two hold what only one can")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with locked(tmp_path, exclusive=True, seconds=0):
            pass


def test_a_waiting_writer_goes_on_when_the_lock_comes_free(tmp_path: Path) -> None:
    with holder(tmp_path, "alone") as process:
        assert process.stdin is not None
        process.stdin.close()
        with locked(tmp_path, seconds=30):
            pass


def test_a_failed_block_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path, exclusive=True):
        raise KeyError
    with locked(tmp_path, exclusive=True, seconds=0):
        pass


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home with one version, and no lock file, as on a medium that it was copied to."""
    home = tmp_path / "home"
    Workspace(home).add(write_adapter(tmp_path / "sql"))
    (home / "store" / LOCK).unlink()
    return home


def test_readers_take_no_lock_and_make_none(home: Path, tmp_path: Path) -> None:
    with locked(home / "store", exclusive=True):
        for command in (
            ["list"],
            ["log", "sql"],
            ["export", "sql", str(tmp_path / "out")],
            ["verify"],
            ["inspect", "sql"],
        ):
            assert run(["--home", str(home), *command]) == 0
    (home / "store" / LOCK).unlink()
    assert run(["--home", str(home), "verify"]) == 0
    assert not (home / "store" / LOCK).exists()


@pytest.mark.parametrize(
    "command",
    [
        ["add", "SQL", "--name", "other"],
        ["tag", "sql", "prod"],
        ["label", "sql", "a=b"],
        ["rename", "sql", "other"],
        ["remove", "sql", "--yes"],
        ["restore", "sql"],
        ["prune", "--keep-last", "1", "--yes"],
        ["db", "rebuild"],
        ["gc", "--yes"],
    ],
)
def test_whoever_writes_waits_for_gc_and_then_gives_up_with_7(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    arguments = [str(tmp_path / "sql") if word == "SQL" else word for word in command]
    with holder(home / "store", "alone"):
        assert run(["--home", str(home), *arguments]) == 7
    assert [version.name for version in Workspace(home).list()] == ["sql"]


def test_gc_waits_for_writers_and_then_gives_up_with_7(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    with holder(home / "store", "shared"):
        assert run(["--home", str(home), "gc", "--yes"]) == 7
        assert run(["--home", str(home), "tag", "sql", "prod"]) == 0
