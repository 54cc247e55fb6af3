"""Which versions have children in other adapters."""

from __future__ import annotations

from collections import defaultdict

from sqlalchemy import Connection, String, and_, cast, exists, literal, select
from sqlalchemy.orm import aliased

from loramgr.catalog.tables import EntryRow, Log, Parent, Version
from loramgr.catalog.versions import reference

__all__ = ["children_elsewhere"]


def children_elsewhere(connection: Connection) -> dict[str, list[str]]:
    """Return the versions that versions of other adapters have as a parent, each with these, all as `name@vN`.

    A parent recorded under an earlier name of its adapter counts; removed versions do not, on either side.
    """
    parent, child = aliased(Version), aliased(Version)
    parent_log, child_log = aliased(Log), aliased(Log)
    recorded = EntryRow.name + literal("@v") + cast(parent.number, String)
    statement = (
        select(parent_log.name, parent.number, child_log.name, child.number)
        .select_from(Parent)
        .join(child, and_(child.root == Parent.root, child.number == Parent.number, ~child.removed))
        .join(parent, and_(parent.digest == Parent.digest, parent.root != child.root, ~parent.removed))
        .join(child_log, child_log.root == child.root)
        .join(parent_log, parent_log.root == parent.root)
        .where(exists().where(EntryRow.root == parent.root, recorded == Parent.ref))
        .order_by(child_log.name, child.number)
    )
    found: dict[str, list[str]] = defaultdict(list)
    for name, number, child_name, child_number in connection.execute(statement):
        found[reference(str(name), number)].append(reference(str(child_name), child_number))
    return found
