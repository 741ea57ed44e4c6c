"""type"""

from service.migrations.recipes import drop_settings_of_each

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A recipe without the setting names no file type."""


def downgrade() -> None:
    drop_settings_of_each("type")
