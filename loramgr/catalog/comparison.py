"""Compares the catalog's rows with those that its log entries give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy import Table as SqlTable

from loramgr.catalog.engine import open_engine
from loramgr.catalog.rebuild import fold
from loramgr.catalog.tables import Table, Workspace
from loramgr.log import Entry

__all__ = ["differences"]

Rows = dict[tuple[Any, ...], tuple[Any, ...]]


def differences(connection: Connection, entries: Iterable[Entry]) -> list[str]:
    """Return one line for every row that is missing, superfluous or different, empty when there is none.

    The entries are folded into a second catalog in memory, with the schema of the first.
    """
    uuid = connection.execute(Workspace.__table__.select()).scalar_one()
    with open_engine(None).connect() as fresh:
        for (statement,) in connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").all():
            fresh.exec_driver_sql(statement)
        fold(fresh, uuid, entries)
        return [line for table in Table.metadata.sorted_tables for line in _compare(table, connection, fresh)]


def _compare(table: SqlTable, connection: Connection, fresh: Connection) -> list[str]:
    found, expected = _rows(table, connection), _rows(table, fresh)
    lines = []
    for key in sorted(found.keys() | expected.keys()):
        row = f"{table.name} ({', '.join(map(str, key))})"
        if key not in expected:
            lines.append(f"{row}: not in the logs")
        elif key not in found:
            lines.append(f"{row}: missing from the catalog")
        elif found[key] != expected[key]:
            pairs = zip(table.columns, found[key], expected[key], strict=True)
            names = ", ".join(column.name for column, here, there in pairs if here != there)
            lines.append(f"{row}: differs from the logs in {names}")
    return lines


def _rows(table: SqlTable, connection: Connection) -> Rows:
    columns = list(table.columns)
    key = [columns.index(column) for column in table.primary_key]
    rows = [tuple(row) for row in connection.execute(table.select())]
    return {tuple(row[position] for position in key): row for row in rows}
