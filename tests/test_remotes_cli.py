"""The commands about remotes as a script sees them: exit codes, JSON keys, names, and what a person reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from peft_files import write_adapter

from loramgr.cli.main import run
from loramgr.cores import usable_cores
from loramgr.remotes.opening import open_remote

TRANSFER = ["remote", "transferred", "skipped", "bytes", "versions", "entries", "notes"]


class Said(NamedTuple):
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)["error"]


class Shell:
    """Runs command lines on one home."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Said:
        self._capsys.readouterr()
        code = run(["--home", str(self.home), *map(str, arguments)])
        return Said(code, *self._capsys.readouterr())

    def json(self, *arguments: str | Path) -> Any:
        said = self(*arguments, "--json")
        assert said.code == 0, said.err
        return said.json


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    (tmp_path / "remote").mkdir()
    return tmp_path / "remote"


@pytest.fixture
def ours(tmp_path: Path, remote: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Return a home with an adapter in two versions, and a remote."""
    shell = Shell(tmp_path / "ours", capsys)
    for alpha in (2, 4):
        assert shell("add", write_adapter(tmp_path / "x", lora_alpha=alpha), "--tag", f"a{alpha}").code == 0
    assert shell("remote", "add", "origin", f"file:{remote}").code == 0
    return shell


@pytest.fixture
def theirs(tmp_path: Path, ours: Shell, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Return an empty home, after a push of the other one."""
    assert ours("push", "x").code == 0
    return Shell(tmp_path / "theirs", capsys)


def test_remotes_are_registered_listed_and_forgotten(ours: Shell, remote: Path) -> None:
    assert list(ours.json("remote", "list")[0]) == ["name", "url", "created_at"]
    assert ours("remote", "list").out.splitlines() == ["NAME    URL", f"origin  file:{remote}"]
    assert ours("-q", "remote", "list").out == "origin\n"
    assert ours.json("remote", "add", "origin", remote)["url"] == f"file:{remote}"
    assert ours("remote", "add", "origin", "file:/elsewhere").code == 7
    assert ours("remote", "add", "Origin", "file:/elsewhere").code == 2
    assert ours("remote", "add", "odd", "gopher://x").code == 2
    assert ours("remote", "remove", "absent").code == 4
    assert "also called origin" in ours("remote", "add", "second", f"file:{remote}").err
    assert ours("remote", "remove", "second").code == 0
    assert ours.json("remote", "remove", "origin", "--dry-run") == {"removed": ["origin"]}
    assert ours.json("remote", "remove", "origin") == {"removed": ["origin"]}
    assert ours.json("remote", "list") == []
    kinds = [entry["kind"] for entry in ours.json("history") if entry["log"] == "remote"]
    assert kinds == ["remove", "remove", "add", "add"]


def test_a_secret_in_a_url_is_refused_and_never_repeated(ours: Shell) -> None:
    for url in ("s3://AKIA:topsecret@bucket/x", "hf:user:topsecret@org", "az://c/x?sas=topsecret"):
        for command in (
            ("remote", "add", "bad", url),
            ("push", "x", "--to", url),
            ("clone", url),
            ("pull", "x", "--from", url),
        ):
            said = ours(*command)
            assert said.code == 2, said
            assert "topsecret" not in said.out + said.err
    assert "topsecret" not in ours("history", "--json").out


def test_push_pull_and_clone_have_one_form(ours: Shell, theirs: Shell, remote: Path) -> None:
    again = ours.json("push", "x", "--tags")
    assert list(again) == TRANSFER
    assert (again["transferred"], again["skipped"], again["versions"]) == (0, 3, [])
    pulled = theirs.json("pull", "x", "--from", remote)
    assert list(pulled) == TRANSFER
    assert (pulled["transferred"], pulled["versions"], pulled["entries"]) == (2, ["x@v2"], 2)
    assert theirs("-q", "clone", remote).out == "x@v1\n"
    assert theirs.json("list", "--all-versions") == ours.json("list", "--all-versions")
    shown = theirs("pull", "--all").out.splitlines()
    assert [line.split()[0] for line in shown] == ["remote", "transferred", "skipped", "bytes", "entries"]


def test_names_or_all_but_not_both(ours: Shell) -> None:
    for command in (["push"], ["pull"], ["push", "x", "--all"], ["pull", "x", "--all"]):
        said = ours(*command)
        assert (said.code, "Name adapters, or give --all." in said.err) == (2, True)


def test_listings_of_a_remote(ours: Shell, theirs: Shell, remote: Path, tmp_path: Path) -> None:
    (row,) = theirs.json("remote", "list-adapters", remote)
    assert list(row) == [
        *("name", "version", "digest", "base", "method", "bytes", "versions", "tags", "message", "created_at", "here"),
    ]
    assert (row["name"], row["version"], row["versions"], row["tags"]) == ("x", 2, 2, ["a2@v1", "a4@v2"])
    assert not row["here"]
    assert ours.json("remote", "list-adapters")[0]["here"]
    assert theirs("-q", "remote", "list-adapters", remote).out == "x@v2\n"
    (state,) = theirs.json("remote", "status", remote)
    assert list(state) == ["name", "state", "ahead", "behind", "heads", "remote"]
    assert (state["state"], state["behind"]) == ("there", 2)
    ours("add", write_adapter(tmp_path / "y"))
    ours("label", "x", "k=v")
    assert {row["name"]: row["state"] for row in ours.json("remote", "status")} == {"x": "ahead", "y": "here"}
    assert [row["name"] for row in ours.json("remote", "status", "origin", "y")] == ["y"]
    assert ours("remote", "status", "origin", "absent").code == 4
    assert ours("remote", "status").out.splitlines()[0].split() == ["NAME", "STATE", "AHEAD", "BEHIND", "HEADS"]


def test_a_conflict_is_exit_code_7_with_the_next_command(
    ours: Shell, theirs: Shell, remote: Path, tmp_path: Path
) -> None:
    theirs("clone", remote)
    for shell in (ours, theirs):
        assert shell("add", write_adapter(tmp_path / "x", lora_alpha=len(str(shell.home)))).code == 0
    assert ours("push", "x").code == 0
    said = theirs("push", "x", "--json")
    assert (said.code, said.error["kind"], said.error["hint"]) == (7, "conflict", "loramgr push --rebase x")
    assert theirs("pull", "x").code == 7
    assert theirs.json("push", "--rebase", "x")["notes"] == ["x@v3 is v4 now: its number was given away at origin"]
    assert ours("pull", "--all").code == 0
    assert ours.json("log", "x") == theirs.json("log", "x")


def test_what_is_absent_is_exit_code_4(ours: Shell, theirs: Shell, remote: Path, tmp_path: Path) -> None:
    assert theirs("pull", "x").code == 2
    for command in (
        ("pull", "y"),
        ("push", "y"),
        ("pull", "x@v9"),
        ("pull", "x", "--from", "nowhere"),
        ("clone", tmp_path / "no"),
    ):
        assert ours(*command).code == 4, command
    assert [row["name"] for row in ours.json("remote", "list")] == ["origin"]


def test_a_remote_is_verified(ours: Shell, theirs: Shell, remote: Path) -> None:
    checked = ours.json("remote", "verify")
    assert checked == {"checked": 7, "corrupt": [], "missing": [], "notes": [], "unchecked": []}
    blob = next(path for path in (remote / "blobs").rglob("*") if path.is_file())
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    assert ours("remote", "verify", "--quick").code == 0
    said = ours("remote", "verify", "--json")
    assert (said.code, len(said.json["corrupt"])) == (5, 1)
    blob.unlink()
    said = ours("remote", "verify", "--quick", "--json")
    assert (said.code, len(said.json["missing"])) == (5, 1)


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("short", [True, False])
def test_a_damaged_log_is_named_and_mended_by_a_push(ours: Shell, theirs: Shell, remote: Path, short: bool) -> None:
    entries = sorted((remote / "logs" / "x").iterdir())
    whole = [path.read_bytes() for path in entries]
    overwrite(entries[0], whole[0][:20] if short else whole[0][:-1] + b" ")
    assert ours("push", "x", "--dry-run").code == 0
    for shell in (ours, theirs):
        said = shell("remote", "verify", remote, "--json")
        assert said.code == 5
        assert f"sha256:{entries[0].name}" in said.json["corrupt"][0]
        assert said.json["notes"] == [f"x: where a home has it: loramgr push --repair x --to file:{remote}"]
    told = theirs("pull", "x", "--from", remote, "--json")
    assert (told.code, told.error["hint"]) == (5, f"where a home has it: loramgr push --repair x --to file:{remote}")
    assert ours.json("push", "x")["notes"] == ["1 damaged log entries of x were put right there"]
    assert [path.read_bytes() for path in entries] == whole
    assert ours.json("push", "x")["notes"] == []
    assert theirs("pull", "x", "--from", remote).code == 0
    entries[1].unlink()
    ours.json("tag", "x@v1", "later")
    assert ours.json("push", "x")["notes"] == ["1 damaged log entries of x were put right there"]
    assert ours("remote", "verify").code == 0


def test_a_clone_of_another_place_is_given_a_name(ours: Shell, theirs: Shell, remote: Path, tmp_path: Path) -> None:
    assert theirs("clone", remote).code == 0
    (tmp_path / "other").mkdir()
    said = theirs("clone", tmp_path / "other", "--json")
    assert (said.code, said.error["hint"]) == (7, f"loramgr clone file:{tmp_path / 'other'} --name NAME")
    assert theirs("clone", tmp_path / "other", "--name", "second").code == 0


def test_a_repair_takes_from_remotes_what_is_lost_here(
    ours: Shell, theirs: Shell, remote: Path, tmp_path: Path
) -> None:
    assert theirs("clone", remote).code == 0
    assert theirs("remote", "add", "away", tmp_path / "unmounted").code == 0
    store = theirs.home / "store"
    lost = {
        kind: sorted(path for path in (store / kind).rglob("*") if path.is_file())[0] for kind in ("blobs", "manifests")
    }
    lost["entries"] = next(
        path for path in (store / "entries").rglob("*") if path.is_file() and b"publish" in path.read_bytes()
    )
    whole = {kind: path.read_bytes() for kind, path in lost.items()}
    lost["blobs"].unlink()
    overwrite(lost["entries"], b"{}")
    overwrite(lost["manifests"], whole["manifests"][:-1])
    assert theirs("verify").code == 5
    said = theirs("verify", "--repair", "--json")
    assert said.code == 0, said
    kinds = {line.split()[0]: line for line in said.json["repaired"]}
    assert kinds["blob"].endswith("had again from origin")
    assert {kind: path.read_bytes() for kind, path in lost.items()} == whole
    assert [path for path in (theirs.home / "cache" / "partial").rglob("*") if path.is_file()] == []
    assert theirs.json("verify", "--repair")["repaired"] == []


def test_a_repair_believes_no_remote(ours: Shell, theirs: Shell, remote: Path) -> None:
    assert theirs("clone", remote).code == 0
    blob = next(path for path in (theirs.home / "store" / "blobs").rglob("*") if path.is_file())
    there = remote / "blobs" / blob.parent.name / blob.name
    overwrite(there, blob.read_bytes()[:-1] + b"!")
    blob.unlink()
    said = theirs("verify", "--repair", "--json")
    assert (said.code, said.json["repaired"], len(said.json["missing"])) == (5, [], 1)
    assert any(line.startswith("origin was asked in vain for sha256:") for line in said.json["notes"])
    there.unlink()
    remote.rename(remote.with_name("unmounted"))
    said = theirs("verify", "--repair", "--json")
    assert said.code == 5
    assert any(line.startswith("origin was asked in vain for sha256:") for line in said.json["notes"])


@pytest.mark.parametrize("kind", ["folder", "rclone", "hub"])
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pull_by_a_former_name_says_the_new_one(
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    url = f"file:{tmp_path / 'there'}"
    (tmp_path / "there").mkdir()
    if kind == "rclone":
        server = request.getfixturevalue("object_servers").get("rclone")
        server.enter(monkeypatch)
        url = server.url(tmp_path.name)
    elif kind == "hub":
        request.getfixturevalue("hub")
        url = "hf:org"
    ours, theirs = Shell(tmp_path / "ours", capsys), Shell(tmp_path / "theirs", capsys)
    for shell in (ours, theirs):
        assert shell("remote", "add", "origin", url).code == 0
    ours.json("add", write_adapter(tmp_path / "x"))
    ours.json("push", "x")
    theirs.json("pull", "x")
    ours.json("rename", "x", "y")
    ours.json("add", write_adapter(tmp_path / "y", lora_alpha=9))
    ours.json("push", "y")
    told = theirs.json("pull", "x")
    assert told["notes"] == ["x is called y at origin"]
    assert told["versions"] == ["y@v2"]
    assert [(row["name"], row["version"]) for row in theirs.json("list")] == [("y", 2)]
    assert theirs("pull", "x").code == 4
    fresh = Shell(tmp_path / "fresh", capsys)
    said = fresh("pull", "x", "--from", url)
    assert (said.code, "no adapter 'x'" in said.err) == (4, True)
    assert fresh("pull", "y", "--from", url).code == 0


def test_transfers_are_eight_at_once_unless_told(ours: Shell, remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(
        "loramgr.remotes.opening.open_remote", lambda url, jobs: opened.append(jobs) or open_remote(url, jobs)
    )
    for command in (("push", "x"), ("push", "x", "--jobs", "3"), ("remote", "verify"), ("pull", "x", "--jobs", "1")):
        assert ours(*command).code == 0
    cores = max(8, usable_cores())
    assert opened == [cores, 3, cores, 1]


def test_what_is_deleted_at_a_remote_asks_first(ours: Shell, theirs: Shell, remote: Path) -> None:
    assert ours("remote", "delete", "origin", "y", "--yes").code == 4
    assert ours.json("remote", "delete", "origin", "x", "--dry-run") == {"removed": ["x"]}
    assert ours("remote", "delete", "origin", "x").code == 2
    assert ours.json("remote", "list-adapters")[0]["name"] == "x"
    assert ours.json("remote", "delete", "origin", "x", "--yes") == {"removed": ["x"]}
    assert ours.json("remote", "list-adapters") == []
    told = ours.json("remote", "gc", "--grace", "0", "--dry-run")
    assert told["removed"]
    assert ours("remote", "gc", "--grace", "0").code == 2
    assert ours.json("remote", "gc", "--grace", "0", "--yes")["removed"] == told["removed"]
    assert not [path for path in (remote / "blobs").rglob("*") if path.is_file()]
    assert ours.json("push", "x")["transferred"] == 3


def test_a_remote_with_the_only_copy_is_not_forgotten_by_the_way(theirs: Shell, remote: Path) -> None:
    theirs("remote", "add", "there", remote)
    theirs("pull", "x@v2")
    said = theirs("remote", "remove", "there")
    assert said.code == 2
    assert "the only place with the files of 1 versions" in said.err
    assert theirs("remote", "remove", "there", "--yes").code == 0
    said = theirs("export", "x@v1", remote / "out")
    assert (said.code, "loramgr pull x@v1" in said.err) == (4, True)


def test_help_costs_no_library(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["remote"], ["push"], ["pull"], ["clone"], ["remote", "verify"]):
        assert run([*command, "--help"]) == 0
        assert "Usage: loramgr" in capsys.readouterr().out
