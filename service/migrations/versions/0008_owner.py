"""owner"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


# no batch, for the reason of 0002


def upgrade() -> None:
    """What is there has nobody's name: it goes on as one owner's."""
    for table in ("jobs", "watches"):
        op.add_column(table, sa.Column("owner", sa.String(length=64), nullable=False, server_default="default"))
    op.create_table(
        "turns",
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("served_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_turns")),
    )


def downgrade() -> None:
    op.drop_table("turns")
    for table in ("watches", "jobs"):
        op.drop_column(table, "owner")
