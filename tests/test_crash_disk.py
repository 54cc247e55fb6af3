"""Disks that are full, broken or not writable: clear words, an exit code, nothing left behind."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import crash_world
import pytest
from crash_stage import SEED, SOAK, Stage, chosen
from faults import needs_strace, traced

READING = {
    "list": ["list", "--all-versions"],
    "log": ["log", "x"],
    "inspect": ["inspect", "x@prod"],
    "base list": ["base", "list"],
    "base show": ["base", "show", "tiny"],
    "base verify": ["base", "verify", "tiny"],
    "status": ["status", "{W}/merged"],
    "verify-merge": ["verify-merge", "{W}/merged"],
    "verify": ["verify"],
    "db current": ["db", "current"],
}
NEEDS_ROOM = [
    "first use",
    "base add",
    "add",
    "tag",
    "bind",
    "remove",
    "merge",
    "merge in place",
    "switch",
    "unmerge in place",
    "export",
    "db rebuild",
]
BESIDE = [name for name in crash_world.COMMANDS if name.split()[0] in ("merge", "switch", "unmerge", "export")]
TO_CATALOG = [name for name in crash_world.COMMANDS if name not in BESIDE]
CHANGES_NOTHING_HERE = ("first use", "home import", "home export", "verify repair", "db upgrade", "push")
PAGE = 4096
SAMPLE = 2
LIMITS = [0, 1, 7, 100, 200, 300, 479, 500, 1000, PAGE, 3 * PAGE, 100_000, 118_783, 118_784, 130_000]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    """Mount for the duration of the block; the last argument is where."""
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount here: {getattr(error, 'stderr', error)}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(arguments[-1])], check=True)


def run(stage: Stage, argv: list[str], limit: int | None = None) -> tuple[int, str, str]:
    """Run a command line, with a limit on the size of files, and return exit code, output and errors."""
    pid = stage.server.start(*argv, held=True)
    if limit is not None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
    stage.server.release(pid)
    code = stage.server.wait(pid)
    return code, stage.server.output(pid), stage.server.errors(pid)


def failed_in_words(code: int, out: str, errors: str) -> bool:
    return code in (1, 3, 5) and out == "" and "error" in errors and "bug" not in errors


@as_root
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", chosen(NEEDS_ROOM, 4))
def test_a_full_disk(stages: list[Stage], command: str) -> None:
    stage = stages[0]
    expected = stage.expect(command)
    shutil.rmtree(stage.world)
    pages = iter(range(400) if SOAK else sorted(random.Random(f"{SEED} {command}").sample(range(60), SAMPLE)))
    code = 1
    while code and (page := next(pages, None)) is not None:
        stage.world.mkdir()
        with mounted("-t", "tmpfs", "-o", "size=32m", "none", stage.world):
            crash_world.copy(stage.template, stage.world)
            before = crash_world.imprint(stage.world)
            _fill(stage.world / "filler", leave=page * PAGE)
            code, out, errors = run(stage, stage.argv(command))
            (stage.world / "filler").unlink()
            if code:
                assert failed_in_words(code, out, errors), (page, code, out, errors)
                assert crash_world.imprint(stage.world) == before, (page, code)
            assert stage.problems(command, expected, code) == [], (page, code)
        stage.world.rmdir()
    assert code == 0 or command.startswith("merge") or not SOAK  # a merge wants 16 MiB more than it may need


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", chosen(NEEDS_ROOM, 4))
def test_writes_that_end_short(stages: list[Stage], command: str) -> None:
    stage = stages[0]
    expected = stage.expect(command)
    limits = LIMITS if SOAK else random.Random(f"{SEED} {command}").sample(LIMITS, SAMPLE)
    for limit in limits:
        stage.reset()
        code, out, errors = run(stage, stage.argv(command), limit)
        if limit >= PAGE:  # else not even the error can be written
            assert code == 0 or failed_in_words(code, out, errors), (limit, code, out, errors)
        assert stage.problems(command, expected, code) == [], (limit, code)


@needs_strace()
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "command", chosen([*READING, "merge", "switch", "export", "add", "bind", "unmerge in place"], 6)
)
def test_a_read_that_fails(stages: list[Stage], command: str, tmp_path: Path) -> None:
    stage = stages[0]
    stage.reset()
    argv = _reading(stage, command) if command in READING else stage.argv(command)
    log = tmp_path / "log"
    pid, code = traced(stage.server, argv, ["-y", "-e", "trace=read,pread64"], log)
    assert code == 0, stage.server.errors(pid)
    whole = _answer(stage.server.output(pid))
    points = _reads_below(stage, log.read_text())
    assert points
    for syscall, number in points if SOAK else random.Random(f"{SEED} {command}").sample(points, SAMPLE):
        stage.reset()
        before = crash_world.imprint(stage.world)
        inject = ["-e", f"trace={syscall}", "-e", f"inject={syscall}:error=EIO:when={number}"]
        pid, code = traced(stage.server, argv, inject, log)
        out, errors = stage.server.output(pid), stage.server.errors(pid)
        what = f"{syscall} {number}: exit {code}: {out[:500]} {errors}"
        if code == 0:
            assert _answer(out) == whole, what
        elif command == "verify" and out:
            assert code in (3, 5), what
        else:
            assert failed_in_words(code, out, errors), what
            assert crash_world.imprint(stage.world) == before, what


@as_root
@pytest.mark.timeout(600)
def test_a_read_only_home(stages: list[Stage]) -> None:
    stage = stages[0]
    stage.reset()
    answers = {name: run(stage, _reading(stage, name)) for name in READING}
    assert {code for code, _, _ in answers.values()} == {0}, answers
    with mounted("--bind", stage.world / "home", stage.world / "home"):
        subprocess.run(["mount", "-o", "remount,bind,ro", stage.world / "home"], check=True)
        for name, (_, out, _) in answers.items():
            code, now, errors = run(stage, _reading(stage, name))
            assert (code, _answer(now)) == (0, _answer(out)), (name, errors)
        for name in TO_CATALOG:
            shutil.rmtree(stage.world / "new", ignore_errors=True)
            code, out, errors = run(stage, stage.argv(name))
            if name in CHANGES_NOTHING_HERE or crash_world.home_of(name) != "home":
                assert code == 0, (name, errors)
            else:
                assert failed_in_words(code, out, errors), (name, code, out, errors)
                assert "read-only" in errors, (name, errors)
        for name in BESIDE:
            shutil.rmtree(stage.world / "out")
            (stage.world / "out").mkdir()
            code, _, errors = run(stage, stage.argv(name))
            assert code == 0, (name, errors)


def _reading(stage: Stage, name: str) -> list[str]:
    return ["--json", "--home", f"{stage.world}/home", *(part.format(W=stage.world) for part in READING[name])]


def _answer(out: str) -> Any:
    """Return what a command printed, without what differs from run to run."""
    return re.sub(r'"(seconds|created_at|version_at)": [^\n]*', "", out)


def _reads_below(stage: Stage, text: str) -> list[tuple[str, int]]:
    """Return which of the calls, counted for each thread as strace does, read a file of the world or the template."""
    counts: dict[tuple[str, str], int] = {}
    found = set()
    for match in re.finditer(r"^(\d+) +(read|pread64)\(\d+<([^>]*)>", text, re.MULTILINE):
        thread, syscall, path = match.groups()
        counts[thread, syscall] = counts.get((thread, syscall), 0) + 1
        if path.startswith((str(stage.world), str(stage.template))):
            found.add((syscall, counts[thread, syscall]))
    return sorted(found)


def _fill(path: Path, leave: int) -> None:
    """Fill the file system up to a number of bytes."""
    free = os.statvfs(path.parent)
    with path.open("wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
