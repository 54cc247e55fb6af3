"""Compares the catalog with what its log entries give: the schema, every row, and what SQLite says of itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy import Table as SqlTable

from loramgr.catalog import schema
from loramgr.catalog.engine import open_engine
from loramgr.catalog.rebuild import fold
from loramgr.catalog.tables import Table, Workspace
from loramgr.log import Entry

__all__ = ["differences"]

Rows = dict[tuple[Any, ...], tuple[Any, ...]]


def differences(connection: Connection, entries: Iterable[Entry]) -> list[str]:
    """Return one line for everything that is missing, superfluous or different, empty when there is nothing.

    The entries are folded into a second catalog in memory, which the migrations make.
    """
    uuid = connection.execute(Workspace.__table__.select()).scalar_one()
    with open_engine(None, foreign_keys=False).connect() as fresh:
        with fresh.begin():
            schema.migrate(fresh)
        lines = [*_compare_schema(connection, fresh), *_own_words(connection)]
        fold(fresh, uuid, entries)
        for table in Table.metadata.sorted_tables:
            lines += _compare(table, connection, fresh)
    return lines


def _own_words(connection: Connection) -> list[str]:
    """Return what SQLite finds wrong, above all in the indexes, which no row tells of."""
    found = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
    return [f"SQLite: {line}" for line in found if line != "ok"]


def _compare_schema(connection: Connection, fresh: Connection) -> list[str]:
    found, expected = ({tuple(row) for row in each.exec_driver_sql(_SCHEMA)} for each in (connection, fresh))
    return [f"schema of {name}: not that of this loramgr" for name in sorted({row[1] for row in found ^ expected})]


_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master"


def _compare(table: SqlTable, connection: Connection, fresh: Connection) -> list[str]:
    found, expected = _rows(table, connection), _rows(table, fresh)
    lines = []
    for key in sorted(found.keys() | expected.keys(), key=repr):
        row = f"{table.name} ({', '.join(map(str, key))})"
        if key not in expected:
            lines.append(f"{row}: not in the logs")
        elif key not in found:
            lines.append(f"{row}: missing from the catalog")
        elif repr(found[key]) != repr(expected[key]):  # which tells 1 from 1.0, and 0.0 from -0.0
            pairs = zip(table.columns, found[key], expected[key], strict=True)
            names = ", ".join(column.name for column, here, there in pairs if repr(here) != repr(there))
            lines.append(f"{row}: differs from the logs in {names}")
    return lines


def _rows(table: SqlTable, connection: Connection) -> Rows:
    """Return the rows by their keys, as SQLite has them, so that nothing damaged is interpreted."""
    columns = list(table.columns)
    key = [columns.index(column) for column in table.primary_key]
    names = ", ".join(column.name for column in columns)
    rows = [tuple(row) for row in connection.exec_driver_sql(f"SELECT {names} FROM {table.name}")]
    return {tuple(row[position] for position in key): row for row in rows}
