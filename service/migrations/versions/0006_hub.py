"""hub"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


# no batch, for the reason of 0002

UPLOADING = "phase = 'uploading' AND status IN ('running', 'cancelling')"
DONE = """'{"status": "succeeded"}'"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("target", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("verified_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """A result that was on its way stays to be downloaded: its job has succeeded."""
    data = f"CAST({DONE} AS json)" if op.get_bind().dialect.name == "postgresql" else DONE
    op.execute("DELETE FROM outbox WHERE unit_id IN (SELECT id FROM units WHERE kind = 'push')")
    op.execute("DELETE FROM units WHERE kind = 'push'")
    op.execute(
        "INSERT INTO events (job_id, seq, type, data, created_at) "
        f"SELECT id, event_seq + 1, 'done', {data}, updated_at FROM jobs WHERE {UPLOADING}"
    )
    op.execute(
        "UPDATE jobs SET status = 'succeeded', event_seq = event_seq + 1, version = version + 1, "
        f"finished_at = updated_at WHERE {UPLOADING}"
    )
    op.execute("UPDATE jobs SET phase = 'verifying' WHERE phase = 'uploading'")
    op.drop_column("jobs", "verified_at")
    op.drop_column("jobs", "target")
