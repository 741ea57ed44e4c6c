"""Recipes as they are stored, which must follow the library of the revision."""

from alembic import op


def drop_settings(*names: str) -> None:
    """Take from stored recipes what the library of the revision would refuse."""
    if op.get_bind().dialect.name == "postgresql":
        changed = "(recipe::jsonb" + "".join(f" - '{name}'" for name in names) + ")::json"
    else:
        changed = "json_remove(recipe" + "".join(f", '$.{name}'" for name in names) + ")"
    op.execute(f"UPDATE jobs SET recipe = {changed}")


def drop_settings_of_each(*names: str) -> None:
    """The same of all recipes of a job, as 0004 and later store them."""
    if op.get_bind().dialect.name == "postgresql":
        changed = "value::jsonb" + "".join(f" - '{name}'" for name in names)
        listed = f"SELECT json_agg({changed}) FROM json_array_elements(recipes)"
    else:
        changed = "json_remove(value" + "".join(f", '$.{name}'" for name in names) + ")"
        listed = f"SELECT json_group_array({changed}) FROM json_each(recipes)"
    op.execute(f"UPDATE jobs SET recipes = ({listed})")
