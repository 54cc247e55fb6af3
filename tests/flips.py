"""Flips single bits in the files of a home, looks what commands say, and puts the bits back."""

from __future__ import annotations

import json
import random
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from crash_world import command_line

READING = (
    *(["list"], ["list", "--all-versions"], ["list", "--base", "tiny"], ["list", "--tag", "prod", "--all-versions"]),
    *(
        ["list", "--label", "team=blue"],
        ["list", "--method", "lora"],
        ["list", "--rank", "2"],
        ["list", "--target", "q"],
    ),
    *(["list", "--sort", "-rank"], ["list", "--metric", "loss<1"], ["log", "x"], ["log", "y"], ["inspect", "x@prod"]),
    *(["base", "list"], ["base", "show", "tiny"], ["base", "verify", "tiny"], ["history"], ["history", "x"], ["du"]),
    *(["remove", "x@v1", "--dry-run"], ["base", "remove", "tiny", "--force", "--dry-run"], ["gc", "--dry-run"]),
    *(["db", "current"], ["log", "gone"], ["base", "remove", "tiny", "--dry-run"]),
)
WRITING = (["label", "x@v1", "probe=1"], ["tag", "loose", "probe"], ["remove", "y", "--force", "--yes"])
HEADER = 100  # bytes, of SQLite's file
SHARE = 0.1  # of the flips that SQLite reads over
COLLECTIONS = ("blobs", "manifests", "entries")


def flip(home: str, scratch: str, seed: str, count: int) -> dict[str, Any]:
    """Try bits at random; return what was wrong, and how many flips ended in which way."""
    trial = _Trial(Path(home), Path(scratch))
    generator = random.Random(seed)
    for _ in range(count):
        kind = generator.choice([*COLLECTIONS, "catalog", "catalog"])
        trial.run(kind, generator)
    return {"problems": trial.problems, "ends": dict(trial.ends)}


class _Trial:
    def __init__(self, home: Path, scratch: Path) -> None:
        self.home = home
        self.scratch = scratch
        self.problems: list[str] = []
        self.ends: Counter[str] = Counter()
        self._answers = [self._answer(command) for command in READING]
        code, _ = self._command("verify")
        assert code == 0
        self._contents = self._logical("catalog")
        self._parts = self._parts_of("x@v2")

    def run(self, kind: str, generator: random.Random) -> None:
        path = self._choose(kind, generator)
        at, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
        what = f"{path.relative_to(self.home)} byte {at} bit {bit}"
        with flipped(path, at, bit):
            code, out = self._command("verify")
            end = {0: "unseen", 5: "found"}.get(code, f"exit {code}")
            if code not in (0, 5):
                self.problems.append(f"{what}: verify: exit {code}: {out}")
            if code == 0 and (at < HEADER or self._logical(kind) != self._contents or generator.random() < SHARE):
                self._compare(what)
            if path.name in self._parts and path.parent.parent.name != "entries":
                self._use(what)
        self.ends[f"{kind}: {end}"] += 1

    def _logical(self, kind: str) -> list[str]:
        """Return what the catalog holds, as SQLite reads it; where it is what it was, few flips need a closer look."""
        if kind != "catalog":
            return []
        with closing(sqlite3.connect(self.home / "catalog.sqlite3")) as connection:
            check = [str(row) for row in connection.execute("PRAGMA integrity_check")]
            return [*check, *connection.iterdump()]

    def _compare(self, what: str) -> None:
        for command, expected in zip(READING, self._answers, strict=True):
            found = self._answer(command)
            if found != expected:
                self.problems.append(f"{what}: verify is clean, and {command}: {found!s:.600}")
                return
        for command in WRITING:
            with kept(self.home):
                code, out = self._command(*command)
                if code == 0:
                    code, out = self._command("verify")
            if code:
                self.problems.append(f"{what}: verify is clean, and {command}: exit {code}: {out}")
                return

    def _use(self, what: str) -> None:
        """Export and merge the adapter that is damaged."""
        target = self.scratch / "damaged"
        for command in (["export", "x@v2", str(target)], ["merge", "tiny", "x@v2", "-o", str(target)]):
            code, out = self._command(*command)
            if code != 5 or target.exists():
                self.problems.append(f"{what}: {command}: exit {code}: {out}")
                shutil.rmtree(target, ignore_errors=True)

    def _choose(self, kind: str, generator: random.Random) -> Path:
        if kind == "catalog":
            return self.home / "catalog.sqlite3"
        return generator.choice(sorted(path for path in (self.home / "store" / kind).rglob("*") if path.is_file()))

    def _parts_of(self, ref: str) -> set[str]:
        version = json.loads(self._command("inspect", ref)[1])
        return {digest.removeprefix("sha256:")[2:] for digest in (version["digest"], *_digests(version["files"]))}

    def _answer(self, command: list[str]) -> tuple[int, str]:
        code, out = self._command(*command)
        return code, re.sub(r'"seconds": [^\n]*', "", out)

    def _command(self, *command: str) -> tuple[int, str]:
        return command_line(["--home", str(self.home), "--json", *command])


def _digests(files: list[dict[str, Any]]) -> list[str]:
    return [str(file["digest"]) for file in files]


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """Flip one bit of a file for the duration of the block, and put all its bytes back after it."""
    whole = path.read_bytes()
    mode = path.stat().st_mode
    path.chmod(0o600)
    try:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        path.chmod(mode)
        yield
    finally:
        path.chmod(0o600)
        path.write_bytes(whole)
        path.chmod(mode)
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)


@contextmanager
def kept(home: Path) -> Iterator[None]:
    """Put a home back after the block: the catalog's bytes, and no new files in the store."""
    catalog = home / "catalog.sqlite3"
    whole, before = catalog.read_bytes(), {*(home / "store").rglob("*")}
    try:
        yield
    finally:
        catalog.write_bytes(whole)
        for path in sorted({*(home / "store").rglob("*")} - before, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
