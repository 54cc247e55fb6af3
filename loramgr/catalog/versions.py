"""Reads versions: a selection of keys in, whole records out, in a fixed number of statements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, Row, ScalarSelect, Select, Subquery, and_, func, select

from loramgr.catalog.tables import Base, Label, Log, Metric, Parent, Tag, Version, VersionFile
from loramgr.records import BaseReference, FileRecord, VersionRecord

if TYPE_CHECKING:
    Key = tuple[str, int]
    Keys = Select[str, int]
    Order = Sequence[ColumnElement[Any]]

__all__ = ["NEWEST_FIRST", "base_name", "load_versions", "reference"]

NEWEST_FIRST: Order = (Log.name.asc(), Version.number.desc())
_COLUMNS = (
    *("number", "digest", "weights_digest", "method", "format", "rank", "ranks", "alpha", "scaling"),
    *("target_modules", "parameters", "bytes", "dtype", "message", "created_at"),
)


def reference(name: str, number: int) -> str:
    """Return how a version is written: `name@vN`."""
    return f"{name}@v{number}"


def load_versions(connection: Connection, keys: Keys, order: Order = NEWEST_FIRST) -> list[VersionRecord]:
    """Return the versions whose `root` and `number` the statement selects, in the given order."""
    selected = keys.subquery()
    rows = connection.execute(_versions(selected, order)).all()
    if not rows:
        return []
    parts = [
        _grouped(connection, selected, VersionFile, (VersionFile.path, VersionFile.digest, VersionFile.bytes)),
        _grouped(connection, selected, Parent, (Parent.position, Parent.ref)),
        _grouped(connection, selected, Tag, (Tag.tag,)),
        _grouped(connection, selected, Label, (Label.key, Label.value)),
        _grouped(connection, selected, Metric, (Metric.key, Metric.value)),
    ]
    return [_record(row, *(part[row.root, row.number] for part in parts)) for row in rows]


def base_name() -> ScalarSelect[Any]:
    """Return the name of a version's base as a subquery: the first by name of those registered with its digest."""
    base_log = Log.__table__.alias("base_logs")
    return (
        select(func.min(base_log.c.name))
        .join(Base, Base.root == base_log.c.root)
        .where(Base.digest == Version.base_digest, ~base_log.c.removed)
        .scalar_subquery()
    )


def _versions(selected: Subquery, order: Order) -> Select[*tuple[Any, ...]]:
    columns = [getattr(Version, column) for column in _COLUMNS]
    return (
        select(Log.name, Version.root, Version.base_digest, base_name().label("base_name"), *columns)
        .join(Log, Log.root == Version.root)
        .join(selected, and_(selected.c.root == Version.root, selected.c.number == Version.number))
        .order_by(*order)
    )


def _grouped(
    connection: Connection, selected: Subquery, table: Any, columns: tuple[Any, ...]
) -> dict[Key, list[tuple[Any, ...]]]:
    """Return the table's rows of each selected version, in the order of their first column."""
    matches = and_(table.root == selected.c.root, table.number == selected.c.number)
    statement = select(table.root, table.number, *columns).join(selected, matches).order_by(columns[0])
    groups: dict[Key, list[tuple[Any, ...]]] = defaultdict(list)
    for root, number, *values in connection.execute(statement):
        groups[root, number].append(tuple(values))
    return groups


def _record(row: Row[*tuple[Any, ...]], *parts: list[tuple[Any, ...]]) -> VersionRecord:
    files, parents, tags, labels, metrics = parts
    values = {column: getattr(row, column) for column in _COLUMNS if column != "number"}
    return VersionRecord(
        name=row.name,
        version=row.number,
        base=None if row.base_digest is None else BaseReference(row.base_name, row.base_digest),
        files=[FileRecord(*file) for file in files],
        parents=[ref for _, ref in parents],
        tags=[tag for (tag,) in tags],
        labels=dict(labels),
        metrics=dict(metrics),
        **values,
    )
