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


def downgrade() -> None:
    for table in ("watches", "jobs"):
        op.drop_column(table, "owner")
