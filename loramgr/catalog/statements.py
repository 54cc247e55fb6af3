"""The statements that every new entry runs, built once: building one costs four times what running it does."""

from __future__ import annotations

from sqlalchemy import bindparam, delete, insert, select, update

from loramgr.catalog.tables import EntryRow, Log, Tag, Version

__all__ = [
    "DELETE_TAG",
    "ENTRY_OF_DIGEST",
    "HOLDER_OF_NAME",
    "INSERT_ENTRY",
    "INSERT_LOG",
    "INSERT_TAG",
    "INSERT_VERSION",
    "KIND_OF_LOG",
    "LOG_OF_HEAD",
    "MOVE_HEAD",
    "NAME_LOG",
    "NEWEST_VERSION",
    "NEXT_NUMBER",
    "STATE_OF_LOG",
    "TAKE_NUMBER",
]

_OF_LOG = Log.root == bindparam("log")
_NAMED = (Log.kind == bindparam("log_kind"), Log.name == bindparam("log_name"))

INSERT_LOG = insert(Log)
INSERT_ENTRY = insert(EntryRow)
INSERT_VERSION = insert(Version)
INSERT_TAG = insert(Tag)
DELETE_TAG = delete(Tag).where(Tag.root == bindparam("log"), Tag.tag == bindparam("log_tag"))
MOVE_HEAD = update(Log).where(_OF_LOG).values(head=bindparam("digest"))
NAME_LOG = update(Log).where(_OF_LOG).values(name=bindparam("log_name"))
TAKE_NUMBER = update(Log).where(_OF_LOG).values(next_number=bindparam("following"), removed=False)
NEXT_NUMBER = select(Log.next_number).where(_OF_LOG)
KIND_OF_LOG = select(Log.kind).where(_OF_LOG)
HOLDER_OF_NAME = select(Log.removed).where(*_NAMED, Log.root != bindparam("log"))
LOG_OF_HEAD = (
    select(Log.root)
    .join(EntryRow, EntryRow.root == Log.root)  # the way to a log that has an index
    .where(EntryRow.digest == bindparam("digest"), Log.head == bindparam("digest"))
)
STATE_OF_LOG = select(Log.root, Log.head, Log.next_number, Log.removed).where(*_NAMED)
ENTRY_OF_DIGEST = (
    select(EntryRow.root, EntryRow.sequence, Log.kind)
    .join(Log, Log.root == EntryRow.root)
    .where(EntryRow.digest == bindparam("digest"))
)
NEWEST_VERSION = (
    select(Version.number, Version.digest)
    .join(Log, Log.root == Version.root)
    .where(*_NAMED, ~Version.removed)
    .order_by(Version.number.desc())
    .limit(1)
)
