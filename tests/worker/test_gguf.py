"""Format `gguf` through the service: parts by the shard tasks, joined by the finish."""

import json
from pathlib import Path

import pytest

from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from service.common import repository
from service.common.errors import LeaseLost
from service.common.status import JobStatus, UnitKind
from tests.checkpoints import VOCABULARY, folder_bytes, jobless_bytes, save_llama
from tests.vocabularies import save_tokenizer
from tests.worker.conftest import Foreman
from worker.heartbeat import Heartbeat
from worker.steps import STEPS
from worker.workplace import Workplace

GGUF = Recipe(format="gguf", type="Q4_1", energy="none")


@pytest.fixture
def source(models: Path) -> Path:
    return save_tokenizer(save_llama(models / "tiny", n_shards=3), "gpt-2", VOCABULARY)


def test_a_job_gives_the_file_of_the_library(
    foreman: Foreman, workplace: Workplace, source: Path, tmp_path: Path
) -> None:
    """Also beside another recipe, in a folder that its type names."""
    recipes = (GGUF, Recipe(format="mlx", energy="none"))
    job = foreman.submit(source, *recipes)
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    quantize_checkpoint(source, tmp_path / "direct", *recipes)
    output = jobless_bytes(workplace.store.output(job.id))
    assert output == jobless_bytes(tmp_path / "direct")
    assert "gguf-Q4_1/model.gguf" in output


def test_a_finish_that_was_not_written_down_is_done_again(
    foreman: Foreman, workplace: Workplace, source: Path, tmp_path: Path
) -> None:
    """Its parts are gone by then: what is there is checked."""
    job = foreman.submit(source, GGUF)
    foreman.run_up_to(UnitKind.FINISH)
    claim = foreman.claim_next()
    assert claim.kind == UnitKind.FINISH
    heartbeat = Heartbeat(workplace, claim, leaving=foreman.leaving)
    with workplace.database.write() as session:
        repository.expire_units(session, "worker@here")
        repository.reap_unit(session, claim.unit_id, backoff_s=0, backoff_limit_s=0)
    with pytest.raises(LeaseLost):
        STEPS[claim.kind](workplace, claim, heartbeat)
    first = folder_bytes(workplace.store.output(job.id))
    assert not [name for name in first if "part" in name]
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    assert folder_bytes(workplace.store.output(job.id)) == first


def test_a_model_without_a_tokenizer_fails_before_any_work(
    foreman: Foreman, workplace: Workplace, source: Path
) -> None:
    (source / "tokenizer.json").unlink()
    job = foreman.submit(source, GGUF)
    foreman.run_all()
    job = foreman.get(job)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert "no tokenizer.json" in json.dumps(job.error)
    assert job.attempt == 1
