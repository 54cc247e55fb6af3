"""The first schema: logs and their entries, versions and what is said about them, bases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_logs()
    create_bases()
    create_versions()
    create_contents_of_versions()
    create_statements_about_versions()


def text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=nullable)


def integer(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=nullable)


def create(table: str, *parts: sa.schema.SchemaItem, key: tuple[str, ...]) -> None:
    primary_key = sa.PrimaryKeyConstraint(*key, name=op.f(f"pk_{table}"))
    op.create_table(table, *parts, primary_key, sqlite_with_rowid=False)


def index(table: str, *columns: str) -> None:
    op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, list(columns))


def refer(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    referred = target.partition(".")[0]
    return sa.ForeignKeyConstraint([column], [target], name=op.f(f"fk_{table}_{referred}"))


def refer_to_version(table: str) -> sa.ForeignKeyConstraint:
    columns = ["root", "number"]
    return sa.ForeignKeyConstraint(columns, ["versions.root", "versions.number"], name=op.f(f"fk_{table}_versions"))


def create_logs() -> None:
    create("workspace", text("uuid"), key=("uuid",))
    create(
        "logs",
        text("root"),
        text("kind"),
        text("name", nullable=True),
        text("head"),
        integer("next_number"),
        sa.Column("removed", sa.Boolean(), nullable=False),
        sa.UniqueConstraint("kind", "name", name=op.f("uq_logs_kind_name")),
        key=("root",),
    )
    create(
        "entries",
        text("digest"),
        text("root"),
        integer("sequence"),
        text("kind"),
        text("name"),
        text("time"),
        text("author"),
        text("predecessor", nullable=True),
        sa.UniqueConstraint("root", "sequence", name=op.f("uq_entries_root_sequence")),
        refer("entries", "root", "logs.root"),
        key=("digest",),
    )


def create_bases() -> None:
    create(
        "bases",
        text("root"),
        text("digest"),
        text("source"),
        text("revision", nullable=True),
        integer("tensors"),
        integer("parameters"),
        integer("bytes"),
        text("dtype"),
        text("architecture", nullable=True),
        text("created_at"),
        refer("bases", "root", "logs.root"),
        key=("root",),
    )
    index("bases", "digest")


def create_versions() -> None:
    create(
        "versions",
        text("root"),
        integer("number"),
        text("digest"),
        text("weights_digest"),
        text("base_digest", nullable=True),
        text("method"),
        text("format"),
        integer("rank", nullable=True),
        sa.Column("ranks", sa.JSON(), nullable=False),
        sa.Column("alpha", sa.Double(), nullable=True),
        sa.Column("scaling", sa.Double(), nullable=True),
        sa.Column("target_modules", sa.JSON(), nullable=False),
        integer("parameters"),
        integer("bytes"),
        text("dtype"),
        text("message"),
        text("created_at"),
        text("entry"),
        sa.Column("removed", sa.Boolean(), nullable=False),
        refer("versions", "root", "logs.root"),
        refer("versions", "entry", "entries.digest"),
        key=("root", "number"),
    )
    for column in ("digest", "base_digest", "method", "rank"):
        index("versions", column)


def create_contents_of_versions() -> None:
    create(
        "version_modules",
        text("root"),
        integer("number"),
        text("reversed_name"),
        refer_to_version("version_modules"),
        key=("root", "number", "reversed_name"),
    )
    index("version_modules", "reversed_name")
    create(
        "version_files",
        text("root"),
        integer("number"),
        text("path"),
        text("digest"),
        integer("bytes"),
        refer_to_version("version_files"),
        key=("root", "number", "path"),
    )
    index("version_files", "digest")
    create(
        "parents",
        text("root"),
        integer("number"),
        integer("position"),
        text("ref"),
        text("digest"),
        refer_to_version("parents"),
        key=("root", "number", "position"),
    )
    index("parents", "digest")


def create_statements_about_versions() -> None:
    create(
        "tags",
        text("root"),
        text("tag"),
        integer("number"),
        refer_to_version("tags"),
        key=("root", "tag"),
    )
    index("tags", "tag")
    for table, value in (("labels", text("value")), ("metrics", sa.Column("value", sa.Double(), nullable=False))):
        create(
            table,
            text("root"),
            integer("number"),
            text("key"),
            value,
            refer_to_version(table),
            key=("root", "number", "key"),
        )
        index(table, "key", "value")
