"""A home with two remotes whose logs went apart: rebases come to an end, and each remote keeps the numbers it gave."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft_files import write_adapter
from remote_homes import make_remote, sound, versions

from loramgr import AddOptions, NotFoundError, PullOptions, PushOptions, Workspace

REMOTES = ("one", "two")


@pytest.fixture
def homes(tmp_path: Path) -> dict[str, Workspace]:
    """Return `here`, with something new, and a home for each remote, which pushed two versions to that one alone."""
    homes = {name: Workspace(tmp_path / f"home-{name}") for name in ("here", *REMOTES)}
    for remote in REMOTES:
        place = make_remote(tmp_path / remote)
        for home in homes.values():
            home.remote_add(remote, str(place))
    added(homes["here"], tmp_path, "first")
    for remote in REMOTES:
        homes["here"].push(["x"], PushOptions(remote))
        homes[remote].pull(["x"], PullOptions(remote))
        for at in range(2):
            added(homes[remote], tmp_path, f"{remote}-{at}")
        homes[remote].push(["x"], PushOptions(remote))
    added(homes["here"], tmp_path, "here")
    return homes


def added(home: Workspace, folder: Path, tag: str) -> None:
    files = write_adapter(folder / tag, lora_alpha=1 + sum(tag.encode()))
    home.add(files, AddOptions(name="x", tags=[tag], metrics={tag: 1}))


def settled(home: Workspace) -> int:
    """Push to one remote and the other with rebases, as the hints have it, and return how often until nothing goes."""
    idle = 0
    for turn in range(20):
        remote = REMOTES[turn % 2]
        hint, entries = "", 0
        try:
            entries = home.push(["x"], PushOptions(remote, rebase=True)).entries
        except NotFoundError as error:
            hint = error.hint or "none"
        if hint:
            assert hint.endswith(f"--from {REMOTES[1 - turn % 2]}")
            home.pull(["x"], PullOptions(REMOTES[1 - turn % 2], all_versions=True))
        idle = 0 if entries or hint else idle + 1
        if idle == 2:
            return turn
    raise AssertionError("the two remotes trade rebases")


def told(home: Workspace) -> dict[str, str]:
    return {tag: version.digest for version in versions(home) for tag in version.tags}


def test_rebases_come_to_an_end_and_both_remotes_have_all(homes: dict[str, Workspace], tmp_path: Path) -> None:
    assert settled(homes["here"]) <= 7
    before = told(homes["here"])
    assert sorted(before) == ["first", "here", "one-0", "one-1", "two-0", "two-1"]
    for remote in REMOTES:
        fresh = Workspace(tmp_path / f"fresh-{remote}")
        fresh.clone(str(tmp_path / remote))
        assert told(fresh) == before
        assert fresh.inspect("x@v2").tags == [f"{remote}-0"]  # a number that was given stays
        assert len(fresh.history("x")) <= 9
        sound(fresh)
    sound(homes["here"])
    for remote in REMOTES:
        homes["here"].pull(["x"], PullOptions(remote, all_versions=True))
        assert homes["here"].push(["x"], PushOptions(remote)).entries == 0
        assert told(homes["here"]) == before


def test_what_comes_later_goes_to_both_once(homes: dict[str, Workspace], tmp_path: Path) -> None:
    settled(homes["here"])
    length = len(homes["here"].history("x"))
    added(homes["here"], tmp_path, "later")
    added(homes["one"], tmp_path, "other")
    homes["one"].push(["x"], PushOptions("one", rebase=True))
    settled(homes["here"])
    assert {"later", "other"} < told(homes["here"]).keys()
    assert len(homes["here"].history("x")) <= length + 4
