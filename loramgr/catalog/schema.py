"""The schema of the catalog: which revision a file has, and how it is brought to the newest one.

Migrations are the only way to the schema. Everyday commands compare one row with a constant; Alembic is imported only
to migrate.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, inspect

from loramgr.catalog.engine import WRITE, explained, open_engine, transaction
from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError
from loramgr.temporary import temporary_folder

__all__ = ["HEAD_REVISION", "TEMPORARY", "check", "current", "migrate", "revision_of", "upgrade"]

HEAD_REVISION = "0002"
TEMPORARY = ".catalog-"


def scripts_folder() -> Path:
    """Return the folder of the migrations: inside the package when installed from a wheel, else beside it."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def revision_of(connection: Connection) -> str | None:
    """Return the schema revision of an open catalog, None when it has no schema yet."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return revision


def current(path: Path) -> str | None:
    """Return the schema revision of a catalog file, None when there is no file yet."""
    if not path.exists():
        return None
    with explained(path), open_engine(path).connect() as connection:
        return revision_of(connection)


def check(revision: str | None, path: Path) -> None:
    """Refuse any revision but the newest: IntegrityError for none, IncompatibleError for an older or newer one."""
    if revision is None:
        raise IntegrityError(f"{path}: the catalog has no schema", "loramgr db rebuild")
    if revision < HEAD_REVISION:
        raise IncompatibleError(
            f"{path}: the catalog has schema {revision}, this loramgr needs {HEAD_REVISION}", "loramgr db upgrade"
        )
    if revision != HEAD_REVISION:
        raise IncompatibleError(
            f"{path}: the catalog has schema {revision}, written by a newer loramgr", "upgrade loramgr"
        )


def upgrade(path: Path, scripts: Path | None = None) -> str:
    """Bring an existing catalog to the newest schema in one transaction and return its revision.

    A copy of the catalog as it was stays beside it as `catalog.sqlite3.REVISION.bak`. `scripts` is the folder of the
    migrations, None for the shipped ones. Raises NotFoundError when there is no catalog, IncompatibleError when it
    comes from a newer loramgr, IntegrityError when rows would lose what they refer to; then nothing has changed.
    """
    from alembic.script import ScriptDirectory

    before = current(path)
    if before is None:
        raise NotFoundError(f"{path}: there is no catalog to upgrade", "loramgr db rebuild")
    directory = ScriptDirectory(str(scripts or scripts_folder()))
    known = {script.revision for script in directory.walk_revisions()}
    if before not in known:
        check(before, path)
    if before == directory.get_current_head():
        return before
    with transaction(open_engine(path, foreign_keys=False), WRITE, path) as connection:
        _back_up(path, before)
        migrate(connection, scripts)
        return revision_of(connection) or before


def migrate(connection: Connection, scripts: Path | None = None) -> None:
    """Run the missing migrations in the connection's transaction; IntegrityError when a foreign key ends up dangling.

    `scripts` as in `upgrade`.
    """
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(scripts or scripts_folder()).replace("%", "%%"))
    command.upgrade(config, "head")
    if dangling := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
        raise IntegrityError(f"the migration left {len(dangling)} rows that refer to nothing; nothing was changed")


def _back_up(path: Path, revision: str) -> None:
    """Copy through SQLite, not by reading the file: closing it would drop this process's locks on it (POSIX)."""
    with temporary_folder(path.parent, TEMPORARY) as folder:
        copy = folder / path.name
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        copy.replace(path.with_name(f"{path.name}.{revision}.bak"))
