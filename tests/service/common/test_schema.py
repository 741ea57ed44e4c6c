import json
import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from hqq_core.recipe import Recipe
from service.common.errors import NotMigrated, Unavailable
from service.common.models import Base
from service.common.schema import check_head, downgrade, migrate
from service.common.session import Database
from service.common.status import JobStatus, Phase
from tests.service.conftest import OUTPUT


@pytest.fixture
def empty(database_url):
    database = Database(database_url)
    yield database
    database.close()


def test_head_is_the_models(database):
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_up_down_to_base_and_up_again(empty):
    with pytest.raises(NotMigrated, match="halfquad migrate"):
        check_head(empty)
    migrate(empty)
    check_head(empty)
    downgrade(empty, "base")
    assert inspect(empty.engine).get_table_names() == ["alembic_version"]
    migrate(empty)
    check_head(empty)


def test_rows_survive_a_step_down_and_up(database, hand):
    job = hand.insert()
    hand.plan(10, 20)
    before = hand.events(job)
    downgrade(database, "0001")
    migrate(database)
    assert hand.events(job) == before
    hand.solve(), hand.solve()
    assert hand.finish().status == JobStatus.SUCCEEDED


def test_stored_recipes_follow_the_library(database, hand):
    known = {name: value for name, value in Recipe().to_dict().items() if name not in ("preset", "energy", "fold")}
    job = hand.insert()

    def store(recipe):
        with database.write() as session:
            session.execute(text("UPDATE jobs SET recipe = :recipe"), {"recipe": json.dumps(recipe)})

    downgrade(database, "0003")
    store(Recipe().to_dict())
    downgrade(database, "0001")
    with database.read() as session:
        assert read(session.scalar(text("SELECT recipe FROM jobs"))) == known
    store({**known, "iters": 10})
    migrate(database)
    assert hand.get(job).recipes == [known]
    assert Recipe.from_dict(known) == Recipe()


def test_a_job_of_one_recipe_becomes_one_of_a_list(database, hand):
    recipe = {name: value for name, value in Recipe(format="hqq").to_dict().items() if name != "type"}
    metrics = {"relative_error": 0.1234567890123456789, "bits_per_weight": 4.5, "worst_tensors": [], "energy_note": "é"}
    artifact = {"name": "model.safetensors", "nbytes": 120, "sha256": "0" * 64}
    done, running = hand.insert(), hand.insert()
    downgrade(database, "0003")
    result = {"artifacts": [artifact], "metrics": metrics}
    over = {"status": "succeeded", "metrics": metrics}
    with database.write() as session:
        write = "UPDATE jobs SET recipe = :recipe"
        session.execute(text(write), {"recipe": json.dumps(recipe)})
        session.execute(
            text("UPDATE jobs SET result = :result WHERE id = :id"), {"result": json.dumps(result), "id": done.id}
        )
        for seq, data in enumerate([over, {"status": "cancelled"}], 2):
            values = {"id": done.id, "seq": seq, "data": json.dumps(data)}
            session.execute(
                text(
                    "INSERT INTO events (job_id, seq, type, data, created_at) "
                    "VALUES (:id, :seq, 'done', :data, CURRENT_TIMESTAMP)"
                ),
                values,
            )
    migrate(database)
    output = {"folder": "", "format": "hqq", "metrics": metrics}
    assert [hand.get(job).recipes for job in (done, running)] == [[recipe]] * 2
    assert hand.get(done).result == {"outputs": [output], "artifacts": [artifact]}
    assert hand.get(running).result is None
    ended = [data for type, data in hand.events(done) if type == "done"]
    assert ended == [{"status": "succeeded", "outputs": [output]}, {"status": "cancelled"}]
    downgrade(database, "0003")
    with database.read() as session:
        kept = session.execute(text("SELECT recipe, result FROM jobs WHERE result IS NOT NULL")).one()
        stored = session.scalars(text("SELECT data FROM events WHERE type = 'done' ORDER BY seq")).all()
    assert [read(value) for value in (*kept, *stored)] == [recipe, result, over, {"status": "cancelled"}]
    migrate(database)


def test_an_older_library_takes_recipes_without_a_type(database, hand):
    recipes = [Recipe(format="hqq", nbits=1.58), Recipe()]
    job = hand.insert()
    with database.write() as session:
        stored = json.dumps([recipe.to_dict() for recipe in recipes])
        session.execute(text("UPDATE jobs SET recipes = :recipes"), {"recipes": stored})
    downgrade(database, "0004")
    with database.read() as session:
        kept = read(session.scalar(text("SELECT recipes FROM jobs")))
    known = [{name: value for name, value in recipe.to_dict().items() if name != "type"} for recipe in recipes]
    assert kept == known
    migrate(database)
    assert [Recipe.from_dict(recipe) for recipe in hand.get(job).recipes] == recipes


def test_before_targets_a_result_on_its_way_is_one_to_download(database, hand):
    target = {"repo_id": "acme/tiny"}
    plain, queued = hand.insert(), hand.insert(target=target)
    on_its_way, failed = hand.insert(target=target, priority=9), hand.insert(target=target, priority=8)
    hand.plan(1), hand.solve(), hand.finish()
    hand.claim()
    hand.plan(1), hand.solve(), hand.finish()
    hand.fail()
    assert hand.get(on_its_way).phase == hand.get(failed).phase == Phase.UPLOADING
    downgrade(database, "0005")
    with database.read() as session:
        rows = session.execute(text("SELECT id, status, phase FROM jobs")).all()
        units = session.scalars(text("SELECT kind FROM units WHERE kind = 'push'")).all()
    assert set(rows) == {
        (plain.id, "queued", None),
        (queued.id, "queued", None),
        (on_its_way.id, "succeeded", "verifying"),
        (failed.id, "failed", "verifying"),
    }
    assert units == []
    migrate(database)
    ended = hand.get(on_its_way)
    assert (ended.target, ended.result["outputs"], ended.durations["upload"]) == (None, [OUTPUT], None)
    assert hand.events(on_its_way)[-1] == ("done", {"status": "succeeded"})
    assert hand.get(queued).target is None


def read(stored):
    return json.loads(stored) if isinstance(stored, str) else stored  # SQLite has no type for it


def test_two_may_migrate_at_once(database_url):
    code = "import sys; from service.common import schema, session; schema.migrate(session.Database(sys.argv[1]))"
    running = [subprocess.Popen([sys.executable, "-c", code, database_url], stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr.decode()
    database = Database(database_url)
    check_head(database)
    database.close()


@pytest.mark.parametrize("reach", [migrate, check_head])
def test_a_database_that_does_not_answer_is_unavailable(reach):
    database = Database("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(Unavailable, match="the database does not answer: connection failed"):
        reach(database)
    database.close()


def test_jobs_from_before_owners_are_one_owners(database, hand):
    job = hand.insert(owner="a")
    downgrade(database, "0007")
    migrate(database)
    assert hand.get(job).owner == "default"
