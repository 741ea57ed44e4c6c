"""profile"""

import sqlalchemy as sa
from alembic import op

from service.migrations.recipes import drop_settings

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


# not in a batch: on SQLite that makes the table anew, and dropping the old one takes units and events along


def upgrade() -> None:
    drop_settings("iters")  # presets took its place
    op.add_column("jobs", sa.Column("profiled_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "profiled_at")
    drop_settings("preset", "energy")
