"""A small world to break commands in: a base, adapters, a home with history, a merged folder; and how it is judged.

`{T}` in a command is the folder of what is only read, `{W}` the copy of the world that the command works on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_files import write_safetensors
from peft_files import write_adapter

COMMANDS = {
    "first use": ["--home", "{W}/new", "base", "add", "{T}/base", "--name", "tiny"],
    "base add": ["base", "add", "{T}/other", "--name", "other"],
    "add": ["add", "{T}/c", "--name", "x", "--base", "tiny", "--tag", "fresh", "--label", "k=v", "--metric", "m=1"],
    "add known": ["add", "{T}/b", "--name", "x", "--tag", "again"],
    "tag": ["tag", "x@v1", "stable"],
    "untag": ["untag", "x@prod"],
    "label": ["label", "x@v1", "team=red"],
    "metric": ["metric", "x@v1", "loss=0.5"],
    "rename": ["rename", "y", "z"],
    "bind": ["bind", "loose", "tiny"],
    "remove version": ["remove", "x@v1", "--force", "--yes"],
    "remove": ["remove", "y", "--force", "--yes"],
    "base remove": ["base", "remove", "spare", "--force", "--yes"],
    "prune": ["prune", "x", "--keep-last", "1", "--yes"],
    "restore": ["restore", "gone"],
    "restore from trash": ["restore", "old"],
    "gc": ["gc", "--grace", "0", "--yes"],
    "verify repair": ["--home", "{W}/worn", "verify", "--repair"],
    "home export": ["home", "export", "{W}/out/home.tar"],
    "home import": ["--home", "{W}/new", "home", "import", "{T}/home.tar"],
    "merge": ["merge", "tiny", "x@v2", "y=0.5", "-o", "{W}/out/model"],
    "merge reversibly": ["merge", "tiny", "x@v2", "-o", "{W}/out/model", "--reversible", "--verify"],
    "merge in place": ["merge", "{W}/model", "x@v2", "--in-place"],
    "switch": ["switch", "{W}/switched", "x@v2", "y=0.5"],
    "unmerge": ["unmerge", "{W}/merged", "-o", "{W}/out/base"],
    "unmerge in place": ["unmerge", "{W}/merged", "--in-place"],
    "unmerge by residual": ["unmerge", "{W}/switched", "--in-place"],
    "merge with remainder": ["merge", "tiny", "kept", "-o", "{W}/out/model", "--with-remainder"],
    "compose": ["compose", "x@v2", "y=0.5", "--name", "mixed", "--tag", "new"],
    "resize": ["resize", "x@v2", "--rank", "1", "--name", "thin"],
    "extract": ["extract", "{W}/merged", "--base", "tiny", "--name", "drawn", "--exact"],
    "add all": ["add", "{T}/several", "--base", "tiny"],
    "export": ["export", "x@v2", "{W}/out/adapter"],
    "push": ["push", "x", "--to", "{W}/remote"],
    "push rebased": ["push", "split", "--rebase", "--to", "{W}/remote"],
    "pull": ["--home", "{W}/new", "pull", "--all", "--from", "{W}/remote"],
    "pull a part": ["--home", "{W}/new", "pull", "split@v1", "--from", "{W}/remote"],
    "pull the rest": ["--home", "{W}/partly", "pull", "split", "--from", "{W}/remote"],
    "clone": ["--home", "{W}/new", "clone", "{W}/remote"],
    "db rebuild": ["db", "rebuild"],
    "db upgrade": ["db", "upgrade"],
}
OUTPUTS = ("out", "merged", "model", "switched")
DAMAGED = ("verify repair",)
NEW_HOME = ("first use", "home import", "pull", "pull a part", "clone")
PARTLY = ("pull a part", "pull the rest")
STAGING = ("loramgr-partial", "loramgr-lock", "loramgr-replaced")
TEMPORARY = (".store-", ".catalog-", "/scratch/")
_RECORD = "loramgr-merge.json"
_OF_THE_RUN = {"seconds": 0, "output": "", "bytes_read": 0}  # a run that goes on with another's work reads less
_OF_NO_MATTER = re.compile(r"/cache/|/store/lock$")


def argv(command: str, template: Path | str, world: Path | str) -> list[str]:
    """Return the command line, with `--json`, in a copy of the world."""
    arguments = [part.format(T=template, W=world) for part in COMMANDS[command]]
    return ["--json", *(["--home", f"{world}/home"] if "--home" not in arguments else []), *arguments]


def home_of(command: str) -> str:
    """Return the name, in the world, of the home that a command works on."""
    if command == "pull the rest":
        return "partly"
    return "new" if command in NEW_HOME else "worn" if command in DAMAGED else "home"


def build(folder: str) -> None:
    """Make the template: `folder` with what is only read, `folder/world` with what is copied for every run."""
    root = Path(folder)
    for name, shape in (("base", (6, 4)), ("other", (8, 4)), ("spare", (2, 4))):
        write_safetensors(root / name / "model.safetensors", {"m.q.weight": shape, "m.k.weight": (2, 2)})
        (root / name / "config.json").write_text(json.dumps({"architectures": ["Tiny"], "model_type": "tiny"}))
    for at, name in enumerate("abcdef"):
        write_adapter(root / name, lora_alpha=4 + at)
        (root / name / "README.md").write_text(f"adapter {name}\n" * 40)
    for name in "ghi":
        (root / "several").mkdir(exist_ok=True)
        write_adapter(root / "several" / name, lora_alpha=ord(name))
    world = root / "world"
    for name in ("model", "switched"):
        shutil.copytree(root / "base", world / name)
        (world / name / "mine.txt").write_text("mine")
    for command in (
        ["base", "add", f"{root}/base", "--name", "tiny"],
        ["base", "add", f"{root}/spare", "--name", "spare"],
        ["add", f"{root}/a", "--name", "x", "--base", "tiny"],
        ["add", f"{root}/b", "--name", "x", "--base", "tiny", "--tag", "prod"],
        ["add", f"{root}/a", "--name", "y", "--base", "tiny", "--label", "team=blue"],
        ["add", f"{root}/d", "--name", "loose"],
        ["add", f"{root}/e", "--name", "old"],
        ["remove", "old", "--force", "--yes"],
        ["gc", "--grace", "0", "--yes"],
        ["add", f"{root}/f", "--name", "gone"],
        ["remove", "gone", "--force", "--yes"],
        ["merge", "tiny", "x", "-o", f"{world}/merged"],
        ["merge", f"{world}/switched", "x@v1", "--in-place"],
        ["extract", f"{world}/merged", "--base", "tiny", "--name", "kept", "--exact"],
        ["home", "export", f"{root}/home.tar"],
    ):
        code, out = command_line(["--home", f"{world}/home", *command])
        assert code == 0, (command, out)
    _share(root, world)
    _drop_empty_folders(world / "home")
    _wear(world / "home", world / "worn")


def _share(root: Path, world: Path) -> None:
    """Make a remote with an adapter whose log went on there and here, and a home with a part of it."""
    (world / "remote").mkdir()
    shutil.copytree(world / "home", world / "other")
    at_remote = ["split", "--to", f"{world}/remote"]
    for home, command in (
        ("home", ["add", f"{root}/a", "--name", "split", "--base", "tiny"]),
        ("home", ["push", *at_remote]),
        ("other", ["pull", "split", "--from", f"{world}/remote"]),
        ("other", ["add", f"{root}/b", "--name", "split", "--base", "tiny", "--tag", "theirs"]),
        ("other", ["push", *at_remote]),
        ("home", ["add", f"{root}/c", "--name", "split", "--base", "tiny", "--tag", "ours"]),
        ("partly", ["pull", "split@v1", "--from", f"{world}/remote"]),
    ):
        code, out = command_line(["--home", f"{world}/{home}", *command])
        assert code == 0, (command, out)
    shutil.rmtree(world / "other")


def _wear(home: Path, worn: Path) -> None:
    """Make a copy of a home with damage that can be mended: a manifest, which follows from the files of its version."""
    shutil.copytree(home, worn)
    _, listed = command_line(["--home", str(home), "--json", "list", "--name", "y"])
    hexadecimal = json.loads(listed)[0]["digest"].removeprefix("sha256:")
    manifest = worn / "store" / "manifests" / hexadecimal[:2] / hexadecimal[2:]
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes()[:-1])


def copy(template: Path | str, world: Path | str) -> None:
    """Copy the template's world, also into a folder that is there."""
    shutil.copytree(Path(template) / "world", world, dirs_exist_ok=True)
    (Path(world) / "out").mkdir()


def command_line(arguments: list[str]) -> tuple[int, str]:
    """Run a command line in this process and return its exit code and what it printed: its errors when it failed."""
    from loramgr.cli.main import run

    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = run(arguments)
    return code, errors.getvalue() or printed.getvalue() if code else printed.getvalue()


def snapshot(world: str, home: str = "home") -> dict[str, Any]:
    """Return what a person sees of a world: versions, bases, and the output folders, without times."""
    seen: dict[str, Any] = {}
    for key, listing in (("versions", ["list", "--all-versions"]), ("bases", ["base", "list"])):
        code, out = 0, "[]"
        if (Path(world) / home / "store").exists():
            code, out = command_line(["--home", f"{world}/{home}", "--json", *listing])
        seen[key] = [_timeless(row) for row in json.loads(out)] if code == 0 else f"exit {code}: {out}"
    seen["outputs"] = [[name, _files(Path(world) / name)] for name in OUTPUTS]
    return seen


def judge(template: str, world: str, command: str, expected: dict[str, Any], code: int) -> list[str]:
    """Return what is wrong in a world after a command ended with that exit code, empty when nothing is.

    `expected` has the snapshots `before` and `after` a whole run and the exit code of a run after that, `again`.
    """
    home = home_of(command)
    problems = []
    seen = snapshot(world, home)
    if code == 0 and seen != expected["after"]:
        problems.append(f"acknowledged, and now {_difference(seen, expected['after'])}")
    if seen not in (expected["before"], expected["after"]):
        problems.append(f"neither before nor after: {_difference(seen, expected['before'])}")
    if code == 0 or command not in DAMAGED:
        problems += _unsound(world, home, "as it was left")
        problems += [] if command in PARTLY else _unexportable(world, home, seen)
        problems += _rebuilt(world, home, [seen] if code == 0 else [seen, expected["after"]])
    again, out = command_line(argv(command, template, world))
    if again not in ({0} if seen == expected["before"] else {0, expected["again"]}):
        problems.append(f"run again: exit {again}: {out}")
    now = snapshot(world, home)
    if now != expected["after"]:
        problems.append(f"run again: {_difference(now, expected['after'])}")
    left = [path for path in _walk(Path(world)) if any(mark in path.name for mark in STAGING)]
    if left:
        problems.append(f"run again: left {left}")
    problems += _apart(world, home, command)
    return problems + _unsound(world, home, "run again") + _uncollected(world, home, now)


def _apart(world: str, home: str, command: str) -> list[str]:
    """Look at the remote after a push: it has to be whole, and to have what the home has."""
    if not command.startswith("push"):
        return []
    place = ["--home", f"{world}/{home}", "--json", "remote"]
    code, out = command_line([*place, "verify", f"{world}/remote"])
    problems = [f"remote verify: exit {code}: {out}"] if code else []
    name = argv(command, "", world)[4]
    code, out = command_line([*place, "status", f"{world}/remote", name])
    states = [row["state"] for row in json.loads(out)] if code == 0 else out
    return problems if states == ["same"] else [*problems, f"remote status: {states}"]


def _uncollected(world: str, home: str, seen: dict[str, Any]) -> list[str]:
    """Collect garbage, which has to take all that is temporary and nothing that anybody sees."""
    for _ in range(2):
        code, out = command_line(["--home", f"{world}/{home}", "--json", "gc", "--grace", "0", "--yes"])
        if code:
            return [f"gc: exit {code}: {out}"]
    left = [path for path in _walk(Path(world)) if any(mark in str(path) for mark in TEMPORARY)]
    problems = [f"gc: left {left}"] if left else []
    now = snapshot(world, home)
    if now != seen:
        problems.append(f"gc: {_difference(now, seen)}")
    return problems + _unsound(world, home, "after gc")


def _unsound(world: str, home: str, when: str) -> list[str]:
    if not (Path(world) / home / "store").exists():
        return []
    code, out = command_line(["--home", f"{world}/{home}", "--json", "verify"])
    return [f"{when}: verify: exit {code}: {out}"] if code else []


def _unexportable(world: str, home: str, seen: dict[str, Any]) -> list[str]:
    problems = []
    for version in seen["versions"] if isinstance(seen["versions"], list) else []:
        ref, target = f"{version['name']}@v{version['version']}", Path(world) / "check"
        code, out = command_line(["--home", f"{world}/{home}", "--json", "export", ref, str(target)])
        if code or _files(target) != {
            file["path"]: file["digest"].removeprefix("sha256:") for file in version["files"]
        }:
            problems.append(f"export {ref}: exit {code}: {out}")
        shutil.rmtree(target, ignore_errors=True)
    return problems


def _rebuilt(world: str, home: str, allowed: list[dict[str, Any]]) -> list[str]:
    """Look at a copy of the home whose catalog was made anew from the logs."""
    if not (Path(world) / home / "store").exists():
        return []
    shutil.copytree(Path(world) / home, Path(world) / "copy")
    for name in ("catalog.sqlite3", "catalog.sqlite3-journal"):
        (Path(world) / "copy" / name).unlink(missing_ok=True)
    code, out = command_line(["--home", f"{world}/copy", "--json", "db", "rebuild"])
    problems = [f"rebuild: exit {code}: {out}"] if code else []
    seen = snapshot(world, "copy")
    if [seen["versions"], seen["bases"]] not in [[state["versions"], state["bases"]] for state in allowed]:
        problems.append(f"rebuilt: {_difference(seen, allowed[-1])}")
    problems += _unsound(world, "copy", "rebuilt")
    shutil.rmtree(Path(world) / "copy")
    return problems


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "created_at"}


def _files(folder: Path) -> dict[str, str] | None:
    """Return the digests of the files below a folder but for staging folders; None when it is not there."""
    if not folder.exists():
        return None
    shown = [path for path in _walk(folder) if path.is_file() and not any(mark in str(path) for mark in STAGING)]
    return {path.relative_to(folder).as_posix(): _digest(path) for path in shown}


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.name == _RECORD:
        with contextlib.suppress(ValueError):  # one that a kill cut short
            data = json.dumps({**json.loads(data), **_OF_THE_RUN}).encode()
    return hashlib.sha256(data).hexdigest()


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in sorted(folders + names))


def _drop_empty_folders(home: Path) -> None:
    for collection in ("blobs", "manifests", "entries"):
        for folder in (home / "store" / collection).iterdir():
            if not any(folder.iterdir()):
                folder.rmdir()


def imprint(world: Path) -> str:
    """Return one digest of every path and byte of a world, but for caches and locks; equal ones are judged once."""
    there = [path for path in _walk(world) if path.is_file() and not _OF_NO_MATTER.search(str(path))]
    lines = [f"{path.relative_to(world)} {_digest(path)}" for path in there]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _difference(seen: Any, expected: Any, where: str = "") -> str:
    """Return the first place where two JSON values differ."""
    if isinstance(seen, dict) and isinstance(expected, dict):
        for key in sorted(seen.keys() | expected.keys()):
            if seen.get(key) != expected.get(key):
                return _difference(seen.get(key), expected.get(key), f"{where}.{key}")
    if isinstance(seen, list) and isinstance(expected, list) and len(seen) == len(expected):
        for at, pair in enumerate(zip(seen, expected, strict=True)):
            if pair[0] != pair[1]:
                return _difference(*pair, f"{where}[{at}]")
    return f"{where} is {seen!r:.1500} and not {expected!r:.1500}"
