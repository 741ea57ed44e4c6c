"""Recipes as they are stored, which must follow the library of the revision."""

from alembic import op


def drop_settings(*names: str) -> None:
    """Take from stored recipes what the library of the revision would refuse."""
    if op.get_bind().dialect.name == "postgresql":
        changed = "(recipe::jsonb" + "".join(f" - '{name}'" for name in names) + ")::json"
    else:
        changed = "json_remove(recipe" + "".join(f", '$.{name}'" for name in names) + ")"
    op.execute(f"UPDATE jobs SET recipe = {changed}")
