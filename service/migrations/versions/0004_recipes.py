"""recipes"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


# A job had one recipe: it becomes the first of a list, and its metrics those of the first output, in the done event too.
# In SQL, so that numbers stay as they were written; no batch, for the reason of 0002.

FORMAT = "compressed-tensors"  # the default, where a recipe names none


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        outputs = (
            "json_build_array(json_build_object('folder', '', 'format', "
            f"coalesce(jobs.recipe ->> 'format', '{FORMAT}'), 'metrics', {{}} -> 'metrics'))"
        )
        made = f"json_build_object('outputs', {outputs.format('result')}, 'artifacts', result -> 'artifacts')"
        done = f"json_build_object('status', data -> 'status', 'outputs', {outputs.format('data')})"
        given, wrapped = "data -> 'metrics' IS NOT NULL", "json_build_array(recipes)"
    else:
        outputs = (
            "json_array(json_object('folder', '', 'format', "
            f"coalesce(json_extract(jobs.recipe, '$.format'), '{FORMAT}'), 'metrics', {{}} -> '$.metrics'))"
        )
        made = f"json_object('outputs', {outputs.format('result')}, 'artifacts', result -> '$.artifacts')"
        done = f"json_object('status', data -> '$.status', 'outputs', {outputs.format('data')})"
        given, wrapped = "json_type(data, '$.metrics') IS NOT NULL", "json_array(json(recipes))"
    op.execute(
        f"UPDATE events SET data = (SELECT {done} FROM jobs WHERE jobs.id = job_id) WHERE type = 'done' AND {given}"
    )
    op.execute(f"UPDATE jobs SET result = {made} WHERE result IS NOT NULL")
    op.execute("ALTER TABLE jobs RENAME COLUMN recipe TO recipes")
    op.execute(f"UPDATE jobs SET recipes = {wrapped}")


def downgrade() -> None:
    """Of several recipes the first stays, and its metrics."""
    if op.get_bind().dialect.name == "postgresql":
        metrics = "{} -> 'outputs' -> 0 -> 'metrics'"
        made = f"json_build_object('artifacts', result -> 'artifacts', 'metrics', {metrics.format('result')})"
        done = f"json_build_object('status', data -> 'status', 'metrics', {metrics.format('data')})"
        given, first = "data -> 'outputs' IS NOT NULL", "recipe -> 0"
    else:
        metrics = "{} -> '$.outputs[0].metrics'"
        made = f"json_object('artifacts', result -> '$.artifacts', 'metrics', {metrics.format('result')})"
        done = f"json_object('status', data -> '$.status', 'metrics', {metrics.format('data')})"
        given, first = "json_type(data, '$.outputs') IS NOT NULL", "recipe -> '$[0]'"
    op.execute(f"UPDATE events SET data = {done} WHERE type = 'done' AND {given}")
    op.execute(f"UPDATE jobs SET result = {made} WHERE result IS NOT NULL")
    op.execute("ALTER TABLE jobs RENAME COLUMN recipes TO recipe")
    op.execute(f"UPDATE jobs SET recipe = {first}")
