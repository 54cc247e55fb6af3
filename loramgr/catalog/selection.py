"""Turns a query into SQL: the filters, the order and the limit."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, and_, exists, func, or_, select
from sqlalchemy.orm import aliased

from loramgr.catalog.fold import reversed_name
from loramgr.catalog.query import SORT_KEYS, VersionQuery
from loramgr.catalog.tables import Label, Log, Metric, Tag, Version, VersionModule
from loramgr.catalog.versions import NEWEST_FIRST
from loramgr.errors import UsageError

if TYPE_CHECKING:
    from loramgr.catalog.versions import Keys, Order

__all__ = ["ordering", "selection"]

_METRIC = re.compile(r"(?P<key>[^<>=!]+)(?P<comparison>>=|<=|!=|=|>|<)(?P<number>[^<>=!]+)")
_COMPARISONS: dict[str, Callable[[Any, float], Any]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "!=": operator.ne,
}


def selection(query: VersionQuery) -> Keys:
    """Return the statement that selects root and number of the versions; UsageError for a malformed filter."""
    conditions = [~Version.removed, *_plain_filters(query), *_related_filters(query)]
    if query.latest_only:
        newer = aliased(Version)
        newest = select(func.max(newer.number)).where(newer.root == Version.root, ~newer.removed)
        conditions.append(Version.number == newest.scalar_subquery())
    every = select(Version.root, Version.number).join(Log, Log.root == Version.root).where(*conditions)
    if query.all_versions or query.latest_only:
        keys = every
    else:
        match = every.subquery()
        keys = select(match.c.root, func.max(match.c.number).label("number")).group_by(match.c.root)
    return _limited(keys, query)


def ordering(sort: str) -> Order:
    """Return what to order by; equal ones follow by name, newest first. UsageError for an unknown key."""
    column = _sort_column(sort.removeprefix("-"))
    return ((column.desc() if sort.startswith("-") else column.asc()).nulls_last(), *NEWEST_FIRST)


def _limited(keys: Keys, query: VersionQuery) -> Keys:
    if query.limit is None:
        return keys
    if query.limit < 0:
        raise UsageError(f"the limit {query.limit} is negative")
    chosen = keys.subquery()
    return (
        select(Version.root, Version.number)
        .join(chosen, and_(chosen.c.root == Version.root, chosen.c.number == Version.number))
        .join(Log, Log.root == Version.root)
        .order_by(*ordering(query.sort))
        .limit(query.limit)
    )


def _sort_column(key: str) -> ColumnElement[Any]:
    columns: dict[str, Any] = {
        "name": Log.name,
        "created": Version.created_at,
        "rank": Version.rank,
        "bytes": Version.bytes,
        "parameters": Version.parameters,
    }
    prefix, _, metric = key.partition("metric:")
    if not prefix and metric:
        of_version = and_(Metric.root == Version.root, Metric.number == Version.number)
        return select(Metric.value).where(of_version, Metric.key == metric).scalar_subquery()
    if key not in columns:
        raise UsageError(f"cannot sort by {key!r}", f"sort by {', '.join(SORT_KEYS)} or metric:KEY")
    column: ColumnElement[Any] = columns[key]
    return column


def _plain_filters(query: VersionQuery) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if query.name is not None:
        conditions.append(Log.name.op("GLOB", is_comparison=True)(query.name.replace("[!", "[^")))
    for column, value in (
        (Version.base_digest, query.base),
        (Version.method, query.method),
        (Version.rank, query.rank),
    ):
        if value is not None:
            conditions.append(column == value)
    return conditions


def _related_filters(query: VersionQuery) -> list[ColumnElement[bool]]:
    conditions = [_has(Label, Label.key == key, Label.value == value) for key, value in query.labels]
    conditions += [_metric_condition(text) for text in query.metrics]
    if query.tag is not None:
        conditions.append(_has(Tag, Tag.tag == query.tag))
    if query.target is not None:
        conditions.append(_has(VersionModule, _ends_with(query.target)))
    return conditions


def _has(table: Any, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists().where(table.root == Version.root, table.number == Version.number, *conditions)


def _ends_with(target: str) -> ColumnElement[bool]:
    """Match modules whose last dotted parts are the target: a range of the index, as `/` follows `.` in ASCII."""
    name = VersionModule.reversed_name
    start = reversed_name(target)
    return or_(name == start, and_(name > f"{start}.", name < f"{start}/"))


def _metric_condition(text: str) -> ColumnElement[bool]:
    match = _METRIC.fullmatch(text)
    try:
        number = float(match["number"]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or math.isnan(number):
        raise UsageError(f"{text!r} is not a comparison of a metric", "--metric 'acc>0.9', with > >= < <= = or !=")
    return _has(Metric, Metric.key == match["key"].strip(), _COMPARISONS[match["comparison"]](Metric.value, number))
