"""The catalog's tables.

Every key is natural and no value depends on the order in which logs are read, so that a rebuild from the log entries
gives the same rows, column for column. The schema itself is made by the migrations; a test compares the two.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, ForeignKeyConstraint, Index, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = [
    "Base",
    "EntryRow",
    "Label",
    "Log",
    "Metric",
    "Parent",
    "Remote",
    "Table",
    "Tag",
    "Version",
    "VersionFile",
    "VersionModule",
    "Workspace",
]

NAMING = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(referred_table_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
}
WITHOUT_ROWID = {"sqlite_with_rowid": False}


def _of_version() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["root", "number"], ["versions.root", "versions.number"])


class Table(DeclarativeBase):
    """The tables' common registry: named constraints, 64-bit numbers, rows kept in the order of their key."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        int: BigInteger,
        float: Double,
        dict[str, int]: JSON,
        list[str]: JSON,
    }
    __table_args__: Any = WITHOUT_ROWID


class Workspace(Table):
    """The one row that names the store this catalog belongs to."""

    __tablename__ = "workspace"

    uuid: Mapped[str] = mapped_column(primary_key=True)


class Log(Table):
    """A log; `root` is the digest of its first entry, `head` that of its last one, `kind` adapter, base or remote.

    `name` is None only while a rebuild has not come to the names yet. `removed` hides it until the next publish or
    add; its name stays taken and `next_number`, the number of the next version, never decreases.
    """

    __tablename__ = "logs"
    __table_args__ = (UniqueConstraint("kind", "name"), WITHOUT_ROWID)

    root: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    head: Mapped[str]
    next_number: Mapped[int]
    removed: Mapped[bool]


class EntryRow(Table):
    """A log entry without its content; `sequence` counts from 1 in its log, `name` is the log's as of then."""

    __tablename__ = "entries"
    __table_args__ = (UniqueConstraint("root", "sequence"), WITHOUT_ROWID)

    digest: Mapped[str] = mapped_column(primary_key=True)
    root: Mapped[str] = mapped_column(ForeignKey("logs.root"))
    sequence: Mapped[int]
    kind: Mapped[str]
    name: Mapped[str]
    time: Mapped[str]
    author: Mapped[str]
    predecessor: Mapped[str | None]


class Version(Table):
    """A version; the columns from `weights_digest` to `dtype` are the publish entry's `summary`.

    The summary has weights_digest, base (digest or None), method, format, rank, ranks {module: rank}, alpha, scaling,
    target_modules [], modules [names of all updated modules], parameters, bytes, dtype and files [{path, digest,
    bytes}]. `created_at` is the time of `entry`, the digest of the publish entry. A removed version keeps its row.
    """

    __tablename__ = "versions"

    root: Mapped[str] = mapped_column(ForeignKey("logs.root"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(index=True)
    weights_digest: Mapped[str]
    base_digest: Mapped[str | None] = mapped_column(index=True)
    method: Mapped[str] = mapped_column(index=True)
    format: Mapped[str]
    rank: Mapped[int | None] = mapped_column(index=True)
    ranks: Mapped[dict[str, int]]
    alpha: Mapped[float | None]
    scaling: Mapped[float | None]
    target_modules: Mapped[list[str]]
    parameters: Mapped[int]
    bytes: Mapped[int]
    dtype: Mapped[str]
    message: Mapped[str]
    created_at: Mapped[str]
    entry: Mapped[str] = mapped_column(ForeignKey("entries.digest"))
    removed: Mapped[bool]


class VersionModule(Table):
    """A module that a version updates; `reversed_name` has the dotted parts last first: `q_proj.self_attn.0.layers`.

    A match of the last parts is then a range of the index.
    """

    __tablename__ = "version_modules"
    __table_args__ = (_of_version(), WITHOUT_ROWID)

    root: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    reversed_name: Mapped[str] = mapped_column(primary_key=True, index=True)


class VersionFile(Table):
    """A file of a version: path inside the adapter's folder, digest of its blob, size in bytes."""

    __tablename__ = "version_files"
    __table_args__ = (_of_version(), WITHOUT_ROWID)

    root: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int]


class Parent(Table):
    """A parent of a version, in the order given: reference `name@vN` and version digest at the time of publishing."""

    __tablename__ = "parents"
    __table_args__ = (_of_version(), WITHOUT_ROWID)

    root: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    ref: Mapped[str]
    digest: Mapped[str] = mapped_column(index=True)


class Tag(Table):
    """A tag of an adapter and the version it names now."""

    __tablename__ = "tags"
    __table_args__ = (_of_version(), WITHOUT_ROWID)

    root: Mapped[str] = mapped_column(primary_key=True)
    tag: Mapped[str] = mapped_column(primary_key=True, index=True)
    number: Mapped[int]


class Label(Table):
    """A label of a version."""

    __tablename__ = "labels"
    __table_args__ = (_of_version(), Index(None, "key", "value"), WITHOUT_ROWID)

    root: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Metric(Table):
    """A metric of a version."""

    __tablename__ = "metrics"
    __table_args__ = (_of_version(), Index(None, "key", "value"), WITHOUT_ROWID)

    root: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


class Base(Table):
    """A base as its newest `add` entry describes it; `created_at` is that entry's time. Removal is the log's."""

    __tablename__ = "bases"

    root: Mapped[str] = mapped_column(ForeignKey("logs.root"), primary_key=True)
    digest: Mapped[str] = mapped_column(index=True)
    source: Mapped[str]
    revision: Mapped[str | None]
    tensors: Mapped[int]
    parameters: Mapped[int]
    bytes: Mapped[int]
    dtype: Mapped[str]
    architecture: Mapped[str | None]
    created_at: Mapped[str]


class Remote(Table):
    """A remote as its newest `add` entry describes it; `created_at` is that entry's time. Removal is the log's."""

    __tablename__ = "remotes"

    root: Mapped[str] = mapped_column(ForeignKey("logs.root"), primary_key=True)
    url: Mapped[str]
    created_at: Mapped[str]
