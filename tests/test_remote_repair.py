"""What is lost or damaged at a remote is seen by every command, told apart, and put right by a push that has it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft_files import write_adapter
from remote_world import CountingStore
from test_remotes_cli import Shell

from loramgr.remotes.log_remote import LogRemote
from loramgr.remotes.opening_store import open_keystore

Damage = Callable[[Path], None]


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    (tmp_path / "remote").mkdir()
    return tmp_path / "remote"


@pytest.fixture
def ours(tmp_path: Path, remote: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Return a home with x in three versions and y in one, all of them pushed."""
    shell = Shell(tmp_path / "ours", capsys)
    for alpha in (2, 4, 8):
        shell.json("add", write_adapter(tmp_path / "x", lora_alpha=alpha))
    shell.json("add", write_adapter(tmp_path / "y", lora_alpha=16))
    shell.json("remote", "add", "origin", f"file:{remote}")
    shell.json("push", "--all")
    return shell


@pytest.fixture
def theirs(tmp_path: Path, ours: Shell, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path / "theirs", capsys)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def content(remote: Path) -> dict[str, bytes]:
    return {str(path.relative_to(remote)): path.read_bytes() for path in files(remote) if path.name != ".lock"}


def written(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def instead(path: Path, make: Damage) -> None:
    path.unlink()
    make(path)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    written(path, bytes(data))


def cut(path: Path) -> None:
    written(path, path.read_bytes()[:-1])


def longer(path: Path) -> None:
    written(path, path.read_bytes() + b"!")


SHOWN: dict[str, Damage] = {
    "gone": Path.unlink,
    "cut": cut,
    "longer": longer,
    "link": lambda path: instead(path, lambda there: there.symlink_to("/etc/passwd")),
    "folder": lambda path: instead(path, Path.mkdir),
    "pipe": lambda path: instead(path, os.mkfifo),
}


@pytest.mark.parametrize("kind", ["blobs", "manifests"])
@pytest.mark.parametrize("how", SHOWN)
def test_a_push_with_nothing_new_puts_what_is_missing_or_of_another_length(
    ours: Shell, remote: Path, how: str, kind: str
) -> None:
    whole = content(remote)
    SHOWN[how](files(remote / kind)[0])
    assert ours("remote", "verify").code == 5
    told = ours.json("push", "--all", "--dry-run")
    assert any("missing or damaged at origin" in note for note in told["notes"])
    told = ours.json("push", "--all")
    assert any("missing or damaged at origin" in note for note in told["notes"])
    assert content(remote) == whole
    assert ours("remote", "verify").code == 0
    assert ours.json("push", "--all")["notes"] == []


def test_many_are_looked_after_too(ours: Shell, remote: Path, tmp_path: Path) -> None:
    for number in range(4):
        ours.json("add", write_adapter(tmp_path / f"z{number}", lora_alpha=32 + number))
    ours.json("push", "--all")
    whole = content(remote)
    files(remote / "blobs")[0].unlink()
    files(remote / "manifests")[1].unlink()
    files(remote / "logs" / "z1")[0].unlink()
    cut(files(remote / "logs" / "z2")[0])
    (remote / "heads" / "z3").unlink()
    ours.json("push", "--all")
    assert content(remote) == whole


def test_looking_after_many_costs_a_few_listings(ours: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 20
    for number in range(count):
        ours.json("add", write_adapter(tmp_path / f"z{number}", lora_alpha=32 + number))
    made: list[CountingStore] = []

    def opened(url: str, jobs: int) -> LogRemote:
        made.append(CountingStore(open_keystore(url)))
        return LogRemote(made[-1], jobs)

    monkeypatch.setattr("loramgr.remotes.opening.open_remote", opened)
    ours.json("push", "--all")
    assert made[0].counts.pop("put_if_absent blobs") >= count
    assert sum(made[0].counts.values()) <= 3 * count + 20
    ours.json("push", "--all")
    assert sum(made[1].counts.values()) <= 2 * (count + 2) + 20  # each head is asked for and read


@pytest.mark.parametrize("kind", ["blobs", "manifests", "logs/x", "heads", "loramgr.json"])
def test_a_repair_puts_flipped_bytes_right(ours: Shell, remote: Path, kind: str) -> None:
    whole = content(remote)
    for path in files(remote / kind) or [remote / kind]:
        flipped(path)
    said = ours("remote", "verify", "--json")
    assert said.code == 5
    told = said.error["hint"] if kind == "loramgr.json" else said.json["notes"][0]
    assert "loramgr push --repair" in told
    if kind in ("blobs", "manifests"):
        assert said.json["missing"] == []
    ours.json("push", "--all", "--repair")
    assert content(remote) == whole
    assert ours("remote", "verify").code == 0


def test_the_hint_of_a_verification_works_as_typed(ours: Shell, remote: Path) -> None:
    for path in files(remote / "blobs"):
        flipped(path)
    hints = ours("remote", "verify", f"file:{remote}", "--json").json["notes"]
    assert [hint.split(":")[0] for hint in hints] == ["x", "y"]
    for hint in hints:
        assert ours(*hint.partition("loramgr ")[2].split()).code == 0
    assert ours("remote", "verify").code == 0


def test_what_is_missing_is_told_apart_from_what_is_damaged(ours: Shell, remote: Path) -> None:
    first, second = files(remote / "blobs")[:2]
    first.unlink()
    flipped(second)
    (remote / "heads" / "y").unlink()
    files(remote / "manifests")[0].unlink()
    found = ours("remote", "verify", "--json").json
    assert len(found["corrupt"]) == 1
    assert second.name in found["corrupt"][0]
    assert len(found["missing"]) in (2, 3)  # a manifest of y is not asked for
    assert "head of 'y' is missing" in found["missing"][-1]
    assert ours("remote", "verify", "--quick").code == 5


HEADS: dict[str, Damage] = {
    "garbage": lambda head: written(head, b"zz"),
    "a path": lambda head: written(head, b'{"head":"sha256:../../../../etc/passwd"}'),
    "nothing": lambda head: written(head, b""),
    "elsewhere": lambda head: written(head, b'{"head":"sha256:' + 64 * b"a" + b'"}'),
    "gone": Path.unlink,
    "a link": lambda head: instead(head, lambda there: there.symlink_to("/etc/passwd")),
    "large": lambda head: written(head, bytes(1 << 17)),
}


@pytest.mark.parametrize("how", HEADS)
def test_a_damaged_head_is_told_and_only_its_adapter_suffers(
    ours: Shell, theirs: Shell, remote: Path, how: str
) -> None:
    whole = content(remote)
    HEADS[how](remote / "heads" / "x")
    listed = "gone" not in how and "link" not in how  # a name without a head is no log that a listing tells of
    said = ours("remote", "verify", "--json")
    assert said.code == 5
    assert any("loramgr push --repair x --to origin" in note for note in said.json["notes"])
    assert ours("remote", "gc", "--grace", "0", "--yes").code == 5
    for command in (("status",), ("list-adapters",)):
        said = ours("remote", *command, "--json")
        assert said.code == (5 if listed else 0), said
        assert "y" in [row["name"] for row in said.json]
    said = theirs("clone", remote)
    assert said.code == (5 if listed else 0)
    assert [row["name"] for row in theirs.json("list")] == ["y"]
    assert ours("push", "x").code == (0 if how == "gone" else 5)
    ours.json("push", "x", "--repair")
    assert content(remote) == whole
    assert ours("remote", "verify").code == 0


@pytest.mark.parametrize("how", HEADS)
def test_what_is_damaged_can_be_deleted(ours: Shell, remote: Path, how: str) -> None:
    HEADS[how](remote / "heads" / "x")
    assert ours.json("remote", "delete", "origin", "x", "--yes") == {"removed": ["x"]}
    assert [row["name"] for row in ours.json("remote", "list-adapters")] == ["y"]
    assert ours("remote", "verify").code == 0
    ours.json("push", "x")
    assert ours("remote", "verify").code == 0


def test_a_lost_head_is_not_set_back_by_a_home_that_is_behind(ours: Shell, theirs: Shell, remote: Path) -> None:
    theirs.json("clone", remote)
    ours.json("label", "x", "k=v")
    ours.json("push", "x")
    (remote / "heads" / "x").unlink()
    told = theirs.json("push", "x")
    assert "1 log entries of x that are not here" in told["notes"][0]
    assert ours.json("remote", "status", "origin", "x")[0]["state"] == "same"


def test_a_lost_head_with_two_ends_is_a_fork_until_it_is_rebased(ours: Shell, theirs: Shell, remote: Path) -> None:
    theirs.json("clone", remote)
    ours.json("label", "x", "k=v")
    theirs.json("label", "x", "other=w")
    ours.json("push", "x")
    (remote / "heads" / "x").unlink()
    assert theirs("push", "x").code == 7
    theirs.json("push", "x", "--rebase")
    ours.json("pull", "x")
    assert ours.json("list")[0]["labels"] == {"k": "v", "other": "w"}


def test_a_remote_that_lost_what_it_says_of_itself_is_not_taken_for_empty(
    ours: Shell, theirs: Shell, remote: Path
) -> None:
    whole = content(remote)
    (remote / "loramgr.json").unlink()
    for command in (["remote", "verify"], ["remote", "gc"], ["push", "x"], ["pull", "x"], ["remote", "status"]):
        said = ours(*command, "--json")
        assert (said.code, "loramgr.json is missing" in said.error["message"]) == (5, True), command
    assert ours(*said.error["hint"].partition("loramgr ")[2].split()).code == 0
    assert content(remote) == whole
    assert theirs("clone", remote).code == 0


def test_one_bad_version_does_not_hold_back_the_others(ours: Shell, theirs: Shell, remote: Path) -> None:
    third = next(row for row in ours.json("log", "x") if row["version"] == 3)
    others = {each["digest"] for row in ours.json("log", "x") if row["version"] != 3 for each in row["files"]}
    digest = next(each["digest"] for each in third["files"] if each["digest"] not in others)
    flipped(remote / "blobs" / digest[7:9] / digest[9:])
    said = theirs("pull", "x", "--all-versions", "--from", remote, "--json")
    assert (said.code, "x@v3" in said.error["message"]) == (5, True)
    assert len(theirs.json("log", "x")) == 3
    assert theirs("export", "x@v2", remote.parent / "out").code == 0
    said = theirs("export", "x@v3", remote.parent / "bad", "--json")
    assert (said.code, said.error["hint"]) == (4, "loramgr pull x@v3")
    ours.json("push", "x", "--repair")
    assert theirs.json("pull", "x", "--from", remote)["versions"] == ["x@v3"]
    assert theirs("verify").code == 0


def test_what_no_home_at_hand_has_is_an_error_and_says_who_can(ours: Shell, theirs: Shell, remote: Path) -> None:
    theirs.json("remote", "add", "origin", remote)
    theirs.json("pull", "x")
    shutil.rmtree(remote / "blobs")
    said = theirs("push", "x", "--json")
    assert said.code == 5
    assert "x@v1, x@v2 are missing or damaged at origin, and not here" in said.error["message"]
    assert ours("push", "--all").code == 0
    assert ours("remote", "verify").code == 0


def test_a_reference_to_a_version_is_told_to_mean_the_whole_log(ours: Shell) -> None:
    assert ours.json("push", "x@v2")["notes"] == ["x@v2: the log of an adapter goes as a whole, with all its versions"]


def test_a_removed_adapter_is_removed_there(ours: Shell, theirs: Shell, remote: Path) -> None:
    theirs.json("clone", remote)
    ours.json("remove", "y", "--yes", "--force")
    assert ours.json("push", "--all")["entries"] == 1
    assert ours.json("push", "y")["entries"] == 0
    theirs.json("pull", "--all")
    assert [row["name"] for row in theirs.json("list")] == ["x"]


def test_what_a_store_without_conditional_writes_lost_is_put_there_again(
    ours: Shell,
    object_servers: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = object_servers.get("rclone")  # type: ignore[attr-defined]
    server.enter(monkeypatch)
    url = server.url(tmp_path.name)
    ours.json("push", "--all", "--to", url)
    store = open_keystore(url)
    keys = {kind: min(stored.key for stored in store.list(f"{kind}/")) for kind in ("blobs", "manifests")}
    for key in keys.values():
        store.delete(key)
    damaged = max(stored.key for stored in store.list("blobs/"))
    data = b"".join(store.get(damaged))
    store.delete(damaged)
    store.put_if_absent(damaged, data[:-1] + bytes([data[-1] ^ 1]))
    found = ours("remote", "verify", url, "--json").json
    assert (len(found["missing"]), len(found["corrupt"])) == (2, 1)
    ours.json("push", "--all", "--to", url)
    found = ours("remote", "verify", url, "--json").json
    assert (len(found["missing"]), len(found["corrupt"])) == (0, 1)
    ours.json("push", "--all", "--repair", "--to", url)
    assert ours("remote", "verify", url).code == 0
