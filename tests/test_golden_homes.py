"""Homes that released versions wrote open, keep their rows, and go on; what does not belong to us is refused."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from peft_files import write_adapter

from loramgr import AddOptions, IncompatibleError, IntegrityError, VersionQuery, Workspace, to_json
from loramgr.catalog import schema
from loramgr.cli.main import run

GOLDEN = Path(__file__).parent / "golden"
REVISIONS = sorted(path.stem.removeprefix("home-") for path in GOLDEN.glob("home-*.json"))
EVERY = VersionQuery(all_versions=True)


@pytest.fixture(params=REVISIONS)
def revision(request: pytest.FixtureRequest) -> str:
    """Return the revision of a schema that was released."""
    return str(request.param)


@pytest.fixture
def home(revision: str, tmp_path: Path) -> Path:
    """Return a home with that schema, as it was written then and brought to ours."""
    with tarfile.open(GOLDEN / f"home-{revision}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert run(["--home", str(tmp_path / "home"), "--quiet", "db", "upgrade"]) == 0
    return tmp_path / "home"


@pytest.fixture
def expected(revision: str) -> object:
    """Return what `list --all-versions --json` printed of it then."""
    return json.loads((GOLDEN / f"home-{revision}.json").read_text(encoding="utf-8"))


def change(home: Path, statement: str) -> None:
    """Change the catalog behind loramgr's back."""
    with closing(sqlite3.connect(home / "catalog.sqlite3")) as connection:
        connection.execute(statement)
        connection.commit()


def describe(home: Path, **changes: object) -> None:
    """Change the description of the store."""
    path = home / "store" / "workspace.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(home: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code and the words of a command on that home."""
    capsys.readouterr()
    code = run(["--home", str(home), "list"])
    output = capsys.readouterr()
    assert output.out == ""
    return code, output.err


def test_every_released_schema_has_its_golden_home() -> None:
    assert sorted(path.stem.removeprefix("schema-") for path in GOLDEN.glob("schema-*.sql")) == REVISIONS


def test_a_golden_home_keeps_its_rows_and_verifies(home: Path, expected: list[dict[str, object]]) -> None:
    workspace = Workspace(home)
    assert to_json(workspace.list(EVERY)) == expected
    found = workspace.verify()
    assert (found.corrupt, found.missing) == ([], [])
    assert found.checked > len(expected)
    assert {entry.author for entry in workspace.history()} == {"tester@golden"}
    assert [base.name for base in workspace.base_list()] == ["tiny"]


def test_a_golden_home_rebuilds_to_the_same_rows(home: Path, expected: object) -> None:
    (home / "catalog.sqlite3").unlink()
    workspace = Workspace(home)
    assert workspace.db_rebuild().forks == []
    assert to_json(workspace.list(EVERY)) == expected


def test_a_golden_home_goes_on_and_moves_on(home: Path, expected: list[object], tmp_path: Path) -> None:
    workspace = Workspace(home)
    added = workspace.add(write_adapter(tmp_path / "x", lora_alpha=16), AddOptions(base="sha256:" + base(expected)))
    assert (added.version, added.parents) == (4, ["x@v3"])
    workspace.home_export(tmp_path / "home.tar")
    other = Workspace(tmp_path / "other")
    other.home_import(tmp_path / "home.tar")
    assert other.list(EVERY) == workspace.list(EVERY)


def base(expected: list[object]) -> str:
    return next(str(each["base"]["digest"]) for each in expected if each["base"]).removeprefix("sha256:")  # type: ignore[index]


def test_a_newer_schema_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(home, "UPDATE alembic_version SET version_num = '9999'")
    before = (home / "catalog.sqlite3").read_bytes()
    with pytest.raises(IncompatibleError, match="schema 9999, written by a newer loramgr"):
        Workspace(home).db_upgrade()
    code, said = refusal(home, capsys)
    assert code == 6
    assert "hint: upgrade loramgr" in said
    assert (home / "catalog.sqlite3").read_bytes() == before


def test_a_newer_store_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe(home, layout=2)
    code, said = refusal(home, capsys)
    assert code == 6
    assert "layout 2, written by a newer loramgr\nhint: upgrade loramgr" in said
    with pytest.raises(IncompatibleError, match="newer loramgr"):
        Workspace(home).db_rebuild()


def test_a_store_and_a_catalog_that_do_not_belong_together_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(home, uuid="00000000-0000-0000-0000-000000000000")
    code, said = refusal(home, capsys)
    assert code == 5
    assert "belongs to another store" in said


def test_a_catalog_that_is_gone_is_named_and_made_again(
    home: Path, expected: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "catalog.sqlite3").unlink()
    code, said = refusal(home, capsys)
    assert code == 5
    assert "is missing\nhint: loramgr db rebuild" in said
    assert not (home / "catalog.sqlite3").exists()
    with pytest.raises(IntegrityError, match="is missing"):
        Workspace(home).list()
    Workspace(home).db_rebuild()
    assert to_json(Workspace(home).list(EVERY)) == expected


def test_our_schema_is_that_of_the_newest_golden_home() -> None:
    assert REVISIONS[-1] == schema.HEAD_REVISION
