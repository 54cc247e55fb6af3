"""prune, restore, gc and verify as commands: JSON keys, exit codes, questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft_files import write_adapter

from loramgr import Workspace
from loramgr.cli.main import run
from loramgr.store.store import Store

Read = Callable[..., Any]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return the home that the commands use, with three versions of `sql`."""
    for alpha in (1, 2, 3):
        assert run(["-q", "add", str(write_adapter(tmp_path / f"sql-{alpha}", lora_alpha=alpha)), "--name", "sql"]) == 0
    return tmp_path / "default-home"


@pytest.fixture
def read(home: Path, capsys: pytest.CaptureFixture[str]) -> Read:
    """Return a function that runs a command line with `--json` and returns what it printed."""

    def read(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        found = run([*arguments, "--json"])
        captured = capsys.readouterr()
        assert found == code, captured.err
        return json.loads(captured.out or captured.err)

    return read


def test_prune_and_restore(read: Read) -> None:
    gone = {"removed": ["sql@v2", "sql@v1"]}
    assert read("prune", "sql", "--keep-last", "1", "--dry-run") == gone
    assert read("prune", "--keep-last", "1", code=2)["error"]["kind"] == "usage"
    assert read("prune", "--keep-last", "1", "--yes") == gone
    assert read("prune", "--keep-last", "1") == {"removed": []}
    assert read("restore", "sql@v1")["version"] == 1
    assert read("restore", "sql")["version"] == 2
    assert [version["version"] for version in read("log", "sql")] == [3, 2, 1]


def test_prune_keeps_what_it_is_told_to(read: Read) -> None:
    assert run(["metric", "sql@v1", "loss=0.1"]) == 0
    assert run(["metric", "sql@v2", "loss=0.2"]) == 0
    keep = ["--keep-last", "1", "--keep-best", "-loss", "--dry-run"]
    assert read("prune", *keep) == {"removed": ["sql@v2"]}
    assert run(["tag", "sql@v2", "prod"]) == 0
    assert read("prune", *keep) == {"removed": []}
    assert read("prune", *keep, "--force", "--keep-tagged") == {"removed": []}
    assert read("prune", *keep, "--force") == {"removed": ["sql@v2"]}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["prune"], 2),
        (["prune", "--keep-last", "0"], 2),
        (["prune", "--keep-last", "1", "--keep-best", "loss"], 4),
        (["prune", "nobody", "--keep-last", "1"], 4),
        (["restore", "sql"], 4),
        (["restore", "sql@prod"], 2),
        (["gc", "--grace", "soon"], 2),
        (["gc", "--grace", "-1h"], 2),
        (["verify", "--sample", "2/1"], 2),
        (["verify", "--sample", "0/1"], 2),
        (["verify", "--sample", "half"], 2),
        (["verify", "--sample", "1/2", "--quick"], 2),
    ],
)
def test_what_cannot_be_done(read: Read, arguments: list[str], code: int) -> None:
    assert read(*arguments, code=code)["error"]["message"]


@pytest.mark.parametrize("grace", ["0", "30m", "24h", "7d", "10s"])
def test_gc_says_what_it_removed(read: Read, home: Path, grace: str) -> None:
    blob = Store.open(home / "store").blobs.put_bytes(b"nobody's")
    removed = [f"blob {blob}"] if grace == "0" else []
    report = read("gc", "--grace", grace, "--dry-run")
    assert (report["removed"], report["bytes"], report["purged"]) == (removed, 8 * len(removed), [])
    assert read("gc", "--grace", grace, "--yes") == report


def test_gc_asks_when_there_is_something(read: Read, home: Path) -> None:
    assert read("gc", "--grace", "0")["removed"] == []
    Store.open(home / "store").blobs.put_bytes(b"nobody's")
    assert "1 files (8 B) into the trash" in read("gc", "--grace", "0", code=2)["error"]["message"]
    read("gc", "--grace", "0", "--yes")
    assert "from the trash for good" in read("gc", "--grace", "0", code=2)["error"]["message"]
    assert read("gc", "--grace", "0", "--yes")["purged_bytes"] == 8


def test_what_gc_has_deleted_cannot_be_restored(read: Read) -> None:
    run(["remove", "sql@v3", "--yes"])
    read("gc", "--grace", "0", "--yes")
    assert read("restore", "sql@v3")["version"] == 3
    run(["remove", "sql@v3", "--yes"])
    for _ in range(2):
        read("gc", "--grace", "0", "--yes")
    assert read("restore", "sql@v3", code=5)["error"]["kind"] == "integrity"
    assert read("verify")["missing"] == []


def test_gc_refuses_while_a_blob_is_missing(read: Read, home: Path) -> None:
    digest = Workspace(home).log("sql")[0].files[0].digest
    Store.open(home / "store").blobs.discard(digest)
    error = read("gc", "--yes", code=5)["error"]
    assert digest in error["message"]
    assert error["hint"] == "loramgr verify --repair"


def test_verify_tells_damage_from_what_it_could_not_see(read: Read, home: Path) -> None:
    assert read("verify", "--sample", "1/1").keys() >= {"checked", "corrupt", "missing", "notes", "unchecked"}
    store = Store.open(home / "store")
    first, second = (
        next(file.digest for file in version.files if file.path == "adapter_config.json")
        for version in Workspace(home).log("sql")[:2]
    )
    store.blobs.path(first).unlink()
    (store.root / "blobs" / first[7:9] / first[9:]).mkdir()
    assert len(read("verify", code=3)["unchecked"]) == 1
    store.blobs.path(second).chmod(0o644)
    store.blobs.path(second).write_bytes(b"{}")
    assert read("verify", code=5)["unchecked"]
    report = read("verify", "--repair", code=5)
    assert [second in line for line in report["missing"]] == [True]
    assert report["repaired"]
