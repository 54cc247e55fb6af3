"""One way to the schema: a single line of migrations, each pinned, run whole or not at all."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from loramgr.catalog import schema
from loramgr.catalog.engine import open_engine
from loramgr.catalog.tables import Table
from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError

GOLDEN = Path(__file__).parent / "golden"
SCHEMA = (
    "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND tbl_name != 'alembic_version' ORDER BY type DESC, name"
)

SECOND = """
import sqlalchemy as sa
from alembic import op

revision = "9000"
down_revision = "{head}"


def upgrade() -> None:
    op.add_column("logs", sa.Column("note", sa.String()))
    {rest}
"""


def lines(statements: list[str]) -> str:
    return ";\n".join("\n".join(line.strip() for line in text.strip().splitlines()) for text in statements) + ";\n"


def schema_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return lines([sql for (sql,) in connection.execute(SCHEMA)])


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """Return a catalog with the newest schema and a log, in a folder whose name needs quoting."""
    folder = tmp_path / "a home 100%"
    folder.mkdir()
    path = folder / "catalog.sqlite3"
    with open_engine(path, create=True, foreign_keys=False).connect() as connection, connection.begin():
        schema.migrate(connection)
        connection.exec_driver_sql("INSERT INTO logs VALUES ('r', 'adapter', 'a', 'h', 1, 0)")
        connection.exec_driver_sql("INSERT INTO entries VALUES ('r', 'r', 1, 'publish', 'a', 't', 'me', NULL)")
    return path


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """Return a copy of the migrations that more can be put into."""
    folder = tmp_path / "more migrations 100%"
    shutil.copytree(schema.scripts_folder(), folder)
    return folder


def second(scripts: Path, rest: str) -> None:
    (scripts / "versions" / "9000_second.py").write_text(SECOND.format(rest=rest, head=schema.HEAD_REVISION))


def test_single_head_is_the_constant() -> None:
    assert ScriptDirectory(str(schema.scripts_folder())).get_heads() == [schema.HEAD_REVISION]


def test_migrated_schema_is_the_golden_one_and_that_of_the_tables(catalog: Path) -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        Table.metadata.create_all(connection)
        tables = lines([sql for (sql,) in connection.exec_driver_sql(SCHEMA)])
    engine.dispose()
    golden = (GOLDEN / f"schema-{schema.HEAD_REVISION}.sql").read_text()
    assert schema_of(catalog) == golden
    assert tables == golden


def test_every_revision_has_its_golden_schema() -> None:
    revisions = {script.revision for script in ScriptDirectory(str(schema.scripts_folder())).walk_revisions()}
    assert {path.stem.removeprefix("schema-") for path in GOLDEN.glob("schema-*.sql")} == revisions


def test_migrations_import_nothing_of_ours() -> None:
    for script in schema.scripts_folder().rglob("*.py"):
        assert "loramgr" not in script.read_text()


def test_current(catalog: Path, tmp_path: Path) -> None:
    assert schema.current(catalog) == schema.HEAD_REVISION
    assert schema.current(tmp_path / "absent") is None


def test_upgrade_at_the_head_changes_nothing(catalog: Path) -> None:
    before = catalog.read_bytes()
    assert schema.upgrade(catalog) == schema.HEAD_REVISION
    assert catalog.read_bytes() == before
    assert list(catalog.parent.iterdir()) == [catalog]


def test_upgrade_keeps_the_rows_and_a_backup(catalog: Path, scripts: Path) -> None:
    before = schema_of(catalog)
    second(scripts, "with op.batch_alter_table('logs') as batch: batch.alter_column('note', nullable=True)")
    assert schema.upgrade(catalog, scripts) == "9000"
    with closing(sqlite3.connect(catalog)) as connection:
        assert connection.execute("SELECT name, note FROM logs").fetchall() == [("a", None)]
        assert connection.execute("SELECT digest FROM entries").fetchall() == [("r",)]
    backup = catalog.with_name(f"catalog.sqlite3.{schema.HEAD_REVISION}.bak")
    assert schema_of(backup) == before
    assert sorted(catalog.parent.iterdir()) == [catalog, backup]


def test_failing_migration_rolls_back(catalog: Path, scripts: Path) -> None:
    before = schema_of(catalog)
    second(scripts, "raise KeyError('a bug in the second step')")
    with pytest.raises(KeyError, match="second step"):
        schema.upgrade(catalog, scripts)
    assert schema.current(catalog) == schema.HEAD_REVISION
    assert schema_of(catalog) == before


def test_migration_that_leaves_dangling_rows_rolls_back(catalog: Path, scripts: Path) -> None:
    second(scripts, "op.execute(\"DELETE FROM logs WHERE root = 'r'\")")
    with pytest.raises(IntegrityError, match="refer to nothing"):
        schema.upgrade(catalog, scripts)
    assert schema.current(catalog) == schema.HEAD_REVISION
    with closing(sqlite3.connect(catalog)) as connection:
        assert connection.execute("SELECT count(*) FROM logs").fetchone() == (1,)


def test_catalog_of_a_newer_loramgr_is_refused(catalog: Path, scripts: Path) -> None:
    second(scripts, "")
    schema.upgrade(catalog, scripts)
    with pytest.raises(IncompatibleError, match="newer loramgr"):
        schema.upgrade(catalog)
    assert schema.current(catalog) == "9000"


def test_no_catalog_to_upgrade(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        schema.upgrade(tmp_path / "catalog.sqlite3")
    assert list(tmp_path.iterdir()) == []


def test_everyday_use_imports_no_alembic(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); from logbook import Logbook\n"
        "book = Logbook(Path(sys.argv[1])); book.publish('a')\n"
        "with book.catalog.reading() as reader: reader.versions()\n"
        "print('alembic' in sys.modules, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, tmp_path, Path(__file__).parent]
    said = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(2)]
    assert said == [["True", "False"], ["False", "False"]]  # the first one makes the catalog
