"""What each log entry does to the rows of the catalog.

Live commands and rebuilds both come through `apply`, so their rows cannot differ. An entry is strict about what it
refers to: one that names a version, tag or number that its log does not have is damage, not a wish.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, exc, exists, func, insert, select, update

from loramgr.catalog import statements
from loramgr.catalog.tables import (
    Base,
    Label,
    Log,
    Metric,
    Parent,
    Remote,
    Table,
    Tag,
    Version,
    VersionFile,
    VersionModule,
)
from loramgr.errors import ConflictError, IntegrityError
from loramgr.log import Entry

__all__ = ["apply", "name_log", "reversed_name"]

_FROM_SUMMARY = (
    *("weights_digest", "method", "format", "rank", "ranks", "alpha", "scaling", "target_modules"),
    *("parameters", "bytes", "dtype"),
)
_REFUSED_VALUES = (exc.IntegrityError, exc.InterfaceError, exc.ProgrammingError)
_OF_BASE = ("digest", "source", "revision", "tensors", "parameters", "bytes", "dtype", "architecture")


def apply(connection: Connection, entry: Entry) -> str:
    """Bring the rows to the state after the entry, but for the log's name, and return the root of its log.

    The entry's predecessor has to be applied already. Raises IntegrityError when the entry does not make sense there.
    """
    try:
        root = _append_row(connection, entry)
        _EFFECTS[entry.log, entry.kind](connection, root, entry)
    except KeyError as error:
        raise _senseless(entry, f"lacks {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise _senseless(entry, f"has a value of the wrong type ({error})") from error
    except exc.StatementError as error:
        if isinstance(error, exc.DBAPIError) and not isinstance(error, _REFUSED_VALUES):
            raise
        raise _senseless(entry, f"contradicts its log or has a value of the wrong type ({error.orig})") from error
    return root


def name_log(connection: Connection, root: str, name: str) -> None:
    """Give a log its name; ConflictError when another log of the same kind has it, removed ones included."""
    kind = connection.scalar(statements.KIND_OF_LOG, {"log": root})
    same_name = {"log": root, "log_kind": kind, "log_name": name}
    holder = connection.execute(statements.HOLDER_OF_NAME, same_name).one_or_none()
    if holder is not None:
        owner = f"a removed {kind}" if holder.removed else f"another {kind}"
        raise ConflictError(f"the name {name!r} is taken by {owner}", "choose another name")
    connection.execute(statements.NAME_LOG, {"log": root, "log_name": name})


def reversed_name(module: str) -> str:
    """Return a dotted name with its parts last first, as the catalog keeps module names."""
    return ".".join(reversed(module.split(".")))


def _append_row(connection: Connection, entry: Entry) -> str:
    root, sequence = entry.digest, 1
    if entry.predecessor is None:
        new = {"root": root, "kind": entry.log, "name": None, "head": root, "next_number": 1, "removed": False}
        connection.execute(statements.INSERT_LOG, new)
    else:
        root, sequence = _follow(connection, entry)
        connection.execute(statements.MOVE_HEAD, {"log": root, "digest": entry.digest})
    columns = ("digest", "kind", "name", "time", "author", "predecessor")
    row = {column: getattr(entry, column) for column in columns}
    connection.execute(statements.INSERT_ENTRY, {"root": root, "sequence": sequence, **row})
    return root


def _follow(connection: Connection, entry: Entry) -> tuple[str, int]:
    before = connection.execute(statements.ENTRY_OF_DIGEST, {"digest": entry.predecessor}).one_or_none()
    if before is None or before.kind != entry.log:
        raise _senseless(entry, f"follows {entry.predecessor}, which is not in a log of its kind")
    return before.root, before.sequence + 1


def _publish(connection: Connection, root: str, entry: Entry) -> None:
    content, summary = entry.content, entry.content["summary"]
    number = content["number"]
    next_number = connection.scalar(statements.NEXT_NUMBER, {"log": root})
    if next_number is None or number < next_number:
        raise _senseless(entry, f"uses the version number {number} again")
    connection.execute(statements.TAKE_NUMBER, {"log": root, "following": number + 1})
    key = {"root": root, "number": number}
    version = {column: summary[column] for column in _FROM_SUMMARY}
    version |= {"digest": content["version"], "base_digest": summary["base"], "message": content["message"]}
    version |= {"created_at": entry.time, "entry": entry.digest, "removed": False}
    connection.execute(statements.INSERT_VERSION, {**key, **version})
    modules = sorted(set(summary["modules"]))
    _insert(connection, VersionModule, [{**key, "reversed_name": reversed_name(module)} for module in modules])
    _insert(connection, VersionFile, [{**key, **_picked(file, "path", "digest", "bytes")} for file in summary["files"]])
    parents = enumerate(content["parents"])
    _insert(connection, Parent, [{**key, "position": at, **_picked(parent, "ref", "digest")} for at, parent in parents])
    for tag in content["tags"]:
        _set_tag(connection, root, number, tag)
    _insert_values(connection, Label, key, content["labels"])
    _insert_values(connection, Metric, key, content["metrics"])


def _tag(connection: Connection, root: str, entry: Entry) -> None:
    number = _live_number(connection, root, entry)
    _set_tag(connection, root, number, entry.content["tag"])


def _untag(connection: Connection, root: str, entry: Entry) -> None:
    tag = entry.content["tag"]
    if connection.execute(statements.DELETE_TAG, {"log": root, "log_tag": tag}).rowcount == 0:
        raise _senseless(entry, f"takes away the tag {tag!r}, which is not there")


def _label(connection: Connection, root: str, entry: Entry) -> None:
    key = {"root": root, "number": _live_number(connection, root, entry)}
    _set_values(connection, Label, key, entry.content["labels"])


def _metric(connection: Connection, root: str, entry: Entry) -> None:
    key = {"root": root, "number": _live_number(connection, root, entry)}
    _set_values(connection, Metric, key, entry.content["metrics"])


def _leave(connection: Connection, root: str, entry: Entry) -> None:
    """Leave the rows alone: the name follows from the log's newest entry, what was replaced from the others."""


def _remove_versions(connection: Connection, root: str, entry: Entry) -> None:
    whole, numbers = entry.content["whole"], entry.content["numbers"]
    live = and_(Version.root == root, ~Version.removed)
    if not whole:
        live = and_(live, Version.number.in_(numbers))
        if connection.scalar(select(func.count()).where(live)) != len(numbers):
            raise _senseless(entry, f"removes versions {numbers}, not all of which are there")
    connection.execute(update(Version).where(live).values(removed=True))
    gone = exists().where(Version.root == Tag.root, Version.number == Tag.number, Version.removed)
    connection.execute(delete(Tag).where(Tag.root == root, gone))
    if whole:
        connection.execute(update(Log).where(Log.root == root).values(removed=True))


def _restore_versions(connection: Connection, root: str, entry: Entry) -> None:
    whole, numbers = entry.content["whole"], entry.content["numbers"]
    gone = and_(Version.root == root, Version.number.in_(numbers), Version.removed)
    if not numbers or connection.scalar(select(func.count()).where(gone)) != len(numbers):
        raise _senseless(entry, f"restores versions {numbers}, not all of which were removed")
    if whole != connection.scalar(select(Log.removed).where(Log.root == root)):
        raise _senseless(entry, "is wrong about whether the adapter was removed")
    connection.execute(update(Version).where(gone).values(removed=False))
    connection.execute(update(Log).where(Log.root == root).values(removed=False))


def _add_base(connection: Connection, root: str, entry: Entry) -> None:
    base = {column: entry.content[column] for column in _OF_BASE}
    connection.execute(delete(Base).where(Base.root == root))
    connection.execute(insert(Base).values(root=root, created_at=entry.time, **base))
    connection.execute(update(Log).where(Log.root == root).values(removed=False))


def _add_remote(connection: Connection, root: str, entry: Entry) -> None:
    connection.execute(delete(Remote).where(Remote.root == root))
    connection.execute(insert(Remote).values(root=root, url=entry.content["url"], created_at=entry.time))
    connection.execute(update(Log).where(Log.root == root).values(removed=False))


def _remove_whole(connection: Connection, root: str, entry: Entry) -> None:
    if connection.scalar(select(Log.removed).where(Log.root == root)):
        raise _senseless(entry, f"removes a {entry.log} that is not there")
    connection.execute(update(Log).where(Log.root == root).values(removed=True))


_EFFECTS: dict[tuple[str, str], Callable[[Connection, str, Entry], None]] = {
    ("adapter", "publish"): _publish,
    ("adapter", "tag"): _tag,
    ("adapter", "untag"): _untag,
    ("adapter", "label"): _label,
    ("adapter", "metric"): _metric,
    ("adapter", "rename"): _leave,
    ("adapter", "remove"): _remove_versions,
    ("adapter", "restore"): _restore_versions,
    ("adapter", "rebase"): _leave,
    ("base", "add"): _add_base,
    ("base", "remove"): _remove_whole,
    ("remote", "add"): _add_remote,
    ("remote", "remove"): _remove_whole,
}


def _live_number(connection: Connection, root: str, entry: Entry) -> int:
    number: int = entry.content["number"]
    live = select(exists().where(Version.root == root, Version.number == number, ~Version.removed))
    if not connection.scalar(live):
        raise _senseless(entry, f"is about version {number}, which is not there")
    return number


def _set_tag(connection: Connection, root: str, number: int, tag: str) -> None:
    connection.execute(statements.DELETE_TAG, {"log": root, "log_tag": tag})
    connection.execute(statements.INSERT_TAG, {"root": root, "tag": tag, "number": number})


def _set_values(
    connection: Connection, table: type[Label | Metric], key: dict[str, Any], values: dict[str, Any]
) -> None:
    """Set each key's value, or drop it where the value is None."""
    if not values:
        return
    of_version: ColumnElement[bool] = and_(table.root == key["root"], table.number == key["number"])
    connection.execute(delete(table).where(of_version, table.key.in_(list(values))))
    _insert_values(connection, table, key, values)


def _insert_values(
    connection: Connection, table: type[Label | Metric], key: dict[str, Any], values: dict[str, Any]
) -> None:
    _insert(connection, table, [{**key, "key": k, "value": v} for k, v in values.items() if v is not None])


def _insert(connection: Connection, table: type[Table], rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(table), rows)


def _picked(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys}


def _senseless(entry: Entry, what: str) -> IntegrityError:
    return IntegrityError(f"log entry {entry.digest} of {entry.log} {entry.name!r} {what}", "loramgr verify")
