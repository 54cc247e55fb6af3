"""The second schema: remotes, where versions are pushed to and pulled from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "remotes",
        sa.Column("root", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["root"], ["logs.root"], name=op.f("fk_remotes_logs")),
        sa.PrimaryKeyConstraint("root", name=op.f("pk_remotes")),
        sqlite_with_rowid=False,
    )
