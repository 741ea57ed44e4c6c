import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hqq_core.checkpoint import FOLDING, MANIFEST
from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from service.common import repository
from service.common.errors import LeaseLost
from service.common.queue import Broker
from service.common.settings import Settings
from service.common.status import JobStatus, Phase, UnitKind, UnitStatus
from tests.checkpoints import folder_bytes, jobless_bytes
from tests.mounts import read_only
from tests.worker.conftest import RECIPE, Foreman
from worker.heartbeat import Heartbeat
from worker.steps import STEPS, run_unit
from worker.workplace import Workplace


def test_job_ends_with_the_bytes_of_the_library(
    foreman: Foreman, workplace: Workplace, source: Path, tmp_path: Path
) -> None:
    job = foreman.submit(source)
    foreman.run_all()
    job = foreman.get(job)
    assert (job.status, job.phase, job.error) == (JobStatus.SUCCEEDED, Phase.VERIFYING, None)
    assert job.result is not None
    (manifest,) = quantize_checkpoint(source, tmp_path / "direct", RECIPE, threads=1)
    output = workplace.store.output(job.id)
    assert jobless_bytes(output) == jobless_bytes(tmp_path / "direct")
    assert json.loads((output / MANIFEST).read_bytes())["provenance"]["job_id"] == job.id
    assert job.result["outputs"] == [{"folder": "", "format": RECIPE.format, "metrics": manifest.metrics}]
    assert {file["name"] for file in job.result["artifacts"]} == set(folder_bytes(output))
    assert all((output / file["name"]).stat().st_size == file["nbytes"] for file in job.result["artifacts"])


def test_files_are_private(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    foreman.run_next()
    assert workplace.store.folder(job.id).stat().st_mode & 0o777 == 0o700


def test_second_message_of_a_unit_does_nothing(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    unit_id = foreman.units()[0].id
    foreman.run_next()
    before = foreman.get(job).version
    run_unit(workplace, unit_id, owner="worker@there", leaving=foreman.leaving)
    run_unit(workplace, "unit_unknown", owner="worker@there", leaving=foreman.leaving)
    assert foreman.get(job).version == before


def test_shard_done_but_not_written_down_is_done_again_with_the_same_bytes(
    foreman: Foreman, workplace: Workplace, source: Path
) -> None:
    job = foreman.submit(source)
    foreman.run_up_to(UnitKind.SHARD)
    claim = foreman.claim_next()
    heartbeat = Heartbeat(workplace, claim, leaving=foreman.leaving)
    with workplace.database.write() as session:
        repository.expire_units(session, "worker@here")
        repository.reap_unit(session, claim.unit_id, backoff_s=0, backoff_limit_s=0)
    with pytest.raises(LeaseLost):
        STEPS[claim.kind](workplace, claim, heartbeat)
    first = folder_bytes(workplace.store.output(job.id))
    assert first.keys() == {FOLDING, "model-00001-of-00002.safetensors"}
    foreman.run_all()
    final = folder_bytes(workplace.store.output(job.id))
    assert first.items() <= final.items()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    assert foreman.get(job).attempt == 2


def test_leaving_worker_hands_its_unit_back(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    foreman.run_up_to(UnitKind.SHARD)
    foreman.leaving.set()
    foreman.run_next()
    assert "unit_handed_back" in foreman.actions(job)
    assert [unit.attempt for unit in foreman.units()] == [0, 0]
    assert folder_bytes(workplace.store.output(job.id)).keys() == {FOLDING}, "what was half written is gone"
    foreman.leaving.clear()
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    assert foreman.get(job).attempt == 1


def test_cancel_between_units_removes_the_files(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    foreman.run_next()
    claim = foreman.claim_next()
    foreman.cancel(job)
    assert foreman.get(job).status == JobStatus.CANCELLING
    with Heartbeat(workplace, claim, leaving=foreman.leaving), workplace.database.write() as session:
        repository.unit_stopped(session, claim)
    assert foreman.get(job).status == JobStatus.CANCELLED
    assert foreman.units() == []


def test_refused_source_fails_at_the_first_start(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    (source / "model-00002-of-00002.safetensors").unlink()
    job = foreman.submit(source)
    foreman.run_all()
    job = foreman.get(job)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["type"]) == ("invalid_checkpoint", "user")
    assert "model-00002-of-00002.safetensors" in job.error["message"]
    assert not workplace.store.folder(job.id).exists()


def test_shard_that_cannot_be_opened_fails_at_the_first_start(
    foreman: Foreman, workplace: Workplace, source: Path
) -> None:
    job = foreman.submit(source)
    foreman.run_up_to(UnitKind.SHARD)
    shard = source / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(shard)  # which nobody can open, not even root
    foreman.run_all()
    job = foreman.get(job)
    assert job.error is not None
    assert (job.error["code"], job.error["type"], job.attempt) == ("invalid_checkpoint", "user", 1)
    assert shard.name in job.error["message"]


def test_unknown_error_is_tried_again_then_fails_the_job(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source, max_attempts=2)
    foreman.run_up_to(UnitKind.SHARD)
    shutil.rmtree(workplace.store.output(job.id))
    foreman.run_next()
    assert foreman.get(job).status == JobStatus.RUNNING
    foreman.run_next()
    job = foreman.get(job)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["type"], job.error["retryable"]) == ("internal_error", "system", True)
    assert job.attempt == 2
    assert foreman.units() == []
    assert [unit.status for unit in foreman.units(UnitStatus.CANCELLED)] == [UnitStatus.CANCELLED]
    assert not workplace.store.folder(job.id).exists()


def age(path: Path) -> None:
    (plan,) = json.loads(path.read_text())["plans"]
    path.write_text(json.dumps({"plans": [plan | {"version": 1}]}))


def before_plans(path: Path) -> None:
    (plan,) = json.loads(path.read_text())["plans"]
    path.write_text(json.dumps(plan | {"version": 3}))


@pytest.mark.parametrize("spoil", [Path.unlink, age, before_plans], ids=["gone", "old", "of one recipe"])
@pytest.mark.parametrize("energy", ["analytic", "none"])
def test_plan_that_cannot_be_followed_is_not_the_users_fault(
    foreman: Foreman, workplace: Workplace, source: Path, energy: Any, spoil: Callable[[Path], None]
) -> None:
    job = foreman.submit(source, Recipe(energy=energy), max_attempts=1)
    foreman.run_up_to(UnitKind.SHARD)
    for plan in workplace.store.folder(job.id).glob("plan*.json"):
        spoil(plan)
    foreman.run_all()
    job = foreman.get(job)
    assert job.error is not None
    assert (job.error["code"], job.error["type"]) == ("result_damaged", "system")
    assert job.error["message"].startswith("the job's plan is gone, or another version of Halfquad made it")
    assert str(workplace.store.root) not in job.error["message"]


def test_no_room_is_said_before_anything_is_written(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    crowded = replace(workplace, settings=workplace.settings.model_copy(update={"min_free_nbytes": 1 << 60}))
    job = foreman.submit(source)
    run_unit(crowded, foreman.units()[0].id, owner="worker@here", leaving=foreman.leaving)
    job = foreman.get(job)
    assert job.error is not None
    assert (job.error["code"], job.error["type"], job.error["retryable"]) == ("storage_full", "system", True)
    assert not workplace.store.folder(job.id).exists()


def test_a_store_that_cannot_be_written_to_is_said_and_the_job_goes_on_after_it(
    foreman: Foreman, workplace: Workplace, source: Path
) -> None:
    job = foreman.submit(source)
    workplace.store.root.mkdir(parents=True)
    with read_only(workplace.store.root):
        foreman.run_next()
    with workplace.database.read() as session:
        told = [event.data for event in repository.list_events(session, job.id)]
    assert told[-1]["code"] == "storage_read_only"
    assert "the data directory cannot be written to" in told[-1]["message"]
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED


def test_work_goes_on_without_a_broker(
    foreman: Foreman, workplace: Workplace, source: Path, settings: Settings
) -> None:
    lonely = replace(workplace, broker=Broker(settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})))
    foreman.workplace = lonely
    job = foreman.submit(source)
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    lonely.broker.close()
