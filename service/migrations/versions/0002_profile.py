"""profile"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


# not in a batch: on SQLite that makes the table anew, and dropping the old one takes units and events along


def upgrade() -> None:
    _drop_settings("iters")  # presets took its place
    op.add_column("jobs", sa.Column("profiled_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "profiled_at")
    _drop_settings("preset", "energy")


def _drop_settings(*names: str) -> None:
    """Take from stored recipes what the library of the revision would refuse."""
    if op.get_bind().dialect.name == "postgresql":
        changed = "(recipe::jsonb" + "".join(f" - '{name}'" for name in names) + ")::json"
    else:
        changed = "json_remove(recipe" + "".join(f", '$.{name}'" for name in names) + ")"
    op.execute(f"UPDATE jobs SET recipe = {changed}")
