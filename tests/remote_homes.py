"""Homes that meet at a folder remote, with real adapters, and how they are compared."""

from __future__ import annotations

from pathlib import Path

from loramgr import AddOptions, VersionQuery, Workspace
from loramgr.records import VersionRecord

EVERY = VersionQuery(all_versions=True)


def make_remote(folder: Path) -> Path:
    """Make an empty folder and return it."""
    folder.mkdir()
    return folder


def filled(home: Path, remote: Path, trained: Path) -> Workspace:
    """Return a home with two adapters, in three versions that share a file, and the remote as `origin`."""
    workspace = Workspace(home)
    workspace.remote_add("origin", str(remote))
    options = AddOptions(name="sql", tags=["prod"], metrics={"acc": 0.5}, labels={"team": "red"}, message="first")
    workspace.add(trained / "lic-r8-qv", options)
    workspace.add(trained / "lic-r8-qv-bf16", AddOptions(name="sql", message="second"))
    workspace.add(trained / "lic-r8-qv", AddOptions(name="copy", parents=["sql@v2"]))
    return workspace


def joined(home: Path, remote: Path) -> Workspace:
    """Return an empty home that knows the remote as `origin`."""
    workspace = Workspace(home)
    workspace.remote_add("origin", str(remote))
    return workspace


def versions(workspace: Workspace) -> list[VersionRecord]:
    """Return every version of a home."""
    return workspace.list(EVERY)


def sound(workspace: Workspace) -> None:
    """Check that a home verifies, and that a catalog made again from its logs has the same rows."""
    found = workspace.verify()
    assert (found.corrupt, found.missing, found.unchecked) == ([], [], [])
    before = versions(workspace)
    assert workspace.db_rebuild().forks == []
    assert versions(workspace) == before
    found = workspace.verify()
    assert (found.corrupt, found.missing) == ([], [])


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, but for locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
