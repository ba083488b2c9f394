"""The table of students."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "students",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("age", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("weight", sa.Integer()),
        sa.Column("score", sa.JSON(), nullable=False),
        sa.Column("w", sa.Integer(), nullable=False),
        sa.Column("teacher", sa.String(100)),
        sa.Column("class", sa.String(100)),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("idempotency_key", sa.String(128)),
        sa.Column("request_digest", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_students"),
        sa.UniqueConstraint("idempotency_key", name="uq_students_idempotency_key"),
        sqlite_autoincrement=True,
    )
