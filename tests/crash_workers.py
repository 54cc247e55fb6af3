"""What processes of the concurrency tests do, in a forked process each."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from peft_files import write_adapter

from loramgr import AddOptions, VersionQuery, Workspace
from loramgr.catalog.catalog import Catalog
from loramgr.errors import ConflictError
from loramgr.store.store import Store
from loramgr.workspace.adding import add_adapter
from loramgr.workspace.home import Home


def make_home(home: str) -> None:
    """Make an empty home, so that no process has to."""
    Workspace(home).list()


def add(home: str, worker: int, count: int, names: int, scratch: str) -> list[list[Any]]:
    """Add versions, each of other content, to the shared names in turn; return name, number and digest of each."""
    workspace = Workspace(home, jobs=1)
    made = []
    for at in range(count):
        folder = write_adapter(Path(scratch) / f"{worker}-{at}")
        (folder / "README.md").write_text(f"version {at} of process {worker}")
        version = workspace.add(folder, AddOptions(name=f"shared{(worker + at) % names}"))
        assert version.created
        made.append([version.name, version.version, version.digest])
    return made


def read(home: str, until: str, seed: int) -> list[int]:
    """Read until a file appears; return how often, and how many versions were seen in all."""
    rounds = seen = 0
    while not Path(until).exists():
        versions = Workspace(home, jobs=1).list()
        for version in versions[seed % (len(versions) or 1) :][:2]:
            log = Workspace(home, jobs=1).log(version.name)
            assert [each.version for each in log] == list(range(len(log), 0, -1))
        seen += len(versions)
        rounds += 1
    return [rounds, seen]


def hold(home: str, ready: str, seconds: float) -> None:
    """Hold the catalog's write lock for a while."""
    store = Store.open(Path(home) / "store")
    with Catalog.open(Path(home) / "catalog.sqlite3", store.uuid).writing():
        Path(ready).touch()
        time.sleep(seconds)


def add_with_patience(home: str, folder: str, seconds: float) -> list[Any]:
    """Add a version, waiting so long for others; return the exit code and how long it took."""
    opened = Home.open(Path(home), jobs=1, progress=False)
    impatient = replace(opened, catalog=Catalog.open(opened.catalog.path, opened.store.uuid, busy_seconds=seconds))
    started = time.monotonic()
    try:
        add_adapter(impatient, Path(folder), AddOptions(name="patient"))
    except ConflictError as error:
        return [error.exit_code, time.monotonic() - started]
    return [0, time.monotonic() - started]


def listed(home: str) -> list[list[Any]]:
    """Return the versions: name, number, labels, tags."""
    versions = Workspace(home, jobs=1).list(VersionQuery(all_versions=True))
    return [[each.name, each.version, each.labels, each.tags] for each in versions]


def proved(home: str, copy: str) -> dict[str, Any]:
    """Verify a home, export every version, and do it again in a copy whose catalog is made from the logs.

    What killed commands left is collected before, else a rebuild may take an entry for the newest that never counted.
    """
    problems: list[Any] = []
    readmes = []
    before = listed(home)
    shutil.copytree(home, copy)
    for place in (home, copy):
        if place == copy:
            Workspace(copy).gc(timedelta())
            (Path(copy) / "catalog.sqlite3").unlink()
            Workspace(copy).db_rebuild()
        check = Workspace(place).verify()
        problems += [*check.corrupt, *check.missing, *check.unchecked]
    for name, number, _, _ in listed(copy):
        Workspace(copy).export(f"{name}@v{number}", f"{copy}/export")
        readmes.append([name, number, Path(copy, "export", "README.md").read_text()])
        shutil.rmtree(f"{copy}/export")
    if listed(copy) != before:
        problems.append([before, listed(copy)])
    return {"problems": problems, "readmes": readmes}
