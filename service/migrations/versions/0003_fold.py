"""fold"""

from service.migrations.recipes import drop_settings

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A recipe without the setting folds."""


def downgrade() -> None:
    drop_settings("fold")
