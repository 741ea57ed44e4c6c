import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hqq_core.checkpoint import REPORT, Checkpoint
from hqq_core.energy import Energies
from hqq_core.errors import Cancelled
from hqq_core.recipe import Recipe
from service.common import repository
from service.common.errors import LeaseLost
from service.common.models import Job
from service.common.status import JobStatus, Phase, UnitKind
from tests.checkpoints import jobless_bytes, save_llama
from tests.worker.conftest import Foreman
from worker import energies
from worker.heartbeat import Heartbeat
from worker.reaper import reap
from worker.steps import STEPS
from worker.workplace import Workplace

N_LINEARS = 2 * 7
ANALYTIC = Recipe(energy="analytic")


def phases(foreman: Foreman, job: Job) -> list[str]:
    with foreman.workplace.database.read() as session:
        events = repository.list_events(session, job.id)
    return [event.data["phase"] for event in events if event.type == "status" and event.data["status"] == "running"]


def found(foreman: Foreman, job: Job) -> dict[str, Any]:
    """What the job's log says of its energies."""
    with foreman.workplace.database.read() as session:
        events = repository.list_events(session, job.id)
    (data,) = [event.data for event in events if event.data.get("action") == "energies_ready"]
    return data


def reported(workplace: Workplace, job: Job) -> dict[str, str]:
    """The energy of each quantized tensor, as the report has it."""
    report = json.loads((workplace.store.output(job.id) / REPORT).read_text())
    return {tensor["name"]: tensor["energy"] for tensor in report["tensors"] if tensor["spec"]}


def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.parametrize(
    ("energy", "wanted"), [("auto", "synthetic"), ("synthetic", "synthetic"), ("analytic", "analytic")]
)
def test_energies_come_between_plan_and_shards(
    foreman: Foreman, workplace: Workplace, source: Path, energy: Any, wanted: str
) -> None:
    job = foreman.submit(source, Recipe(energy=energy))
    foreman.run_up_to(UnitKind.SHARD)
    assert workplace.store.energies(job.id).is_file()
    foreman.run_all()
    done = foreman.get(job)
    assert done.status == JobStatus.SUCCEEDED
    assert phases(foreman, job) == [Phase.PREFLIGHT, Phase.PROFILING, Phase.QUANTIZING, Phase.VERIFYING]
    sources = reported(workplace, job)
    assert len(sources) == N_LINEARS
    assert sources["model.layers.1.self_attn.q_proj.weight"] == wanted
    assert found(foreman, job)["energy"] == Counter(sources.values())
    assert (found(foreman, job)["cached"], found(foreman, job)["note"]) == (False, "")
    assert done.durations["profile"] is not None
    assert not workplace.store.energies(job.id).exists(), "nobody needs it any more"


@pytest.mark.parametrize("recipe", [Recipe(energy="none"), Recipe(format="hqq", axis=0)], ids=["none", "axis 0"])
def test_nothing_is_profiled_where_it_changes_nothing(
    foreman: Foreman, workplace: Workplace, source: Path, recipe: Recipe
) -> None:
    job = foreman.submit(source, recipe)
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    assert phases(foreman, job) == [Phase.PREFLIGHT, Phase.QUANTIZING, Phase.VERIFYING]
    assert set(reported(workplace, job).values()) == {"none"}
    assert foreman.get(job).durations["profile"] is None


def test_second_job_on_a_source_measures_nothing(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = foreman.submit(source)
    foreman.run_all()
    monkeypatch.delattr(energies, "profile")
    again, other = foreman.submit(source), foreman.submit(source, Recipe(format="hqq", nbits=3))
    foreman.run_all()
    assert [found(foreman, job)["cached"] for job in (first, again, other)] == [False, True, True]
    assert jobless_bytes(workplace.store.output(again.id)) == jobless_bytes(workplace.store.output(first.id))
    assert set(reported(workplace, other).values()) == {"synthetic"}


def test_best_goes_on_with_correlations_which_others_do_without(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Recipe(preset="best", format="hqq")
    jobs = [foreman.submit(source, recipe) for recipe in (best, Recipe())]
    foreman.run_up_to(UnitKind.SHARD)
    monkeypatch.delattr(energies, "profile")
    jobs.append(foreman.submit(source, best))
    foreman.run_all()
    assert [foreman.get(job).status for job in jobs] == [JobStatus.SUCCEEDED] * 3
    assert [found(foreman, job)["cached"] for job in jobs] == [False, False, True]
    outputs = [jobless_bytes(workplace.store.output(job.id)) for job in jobs]
    assert outputs[2] == outputs[0]
    reports = [json.loads(output[REPORT]) for output in outputs]
    correlated = [sum(tensor["correlated"] for tensor in report["tensors"]) for report in reports]
    assert correlated == [N_LINEARS, 0, N_LINEARS]
    solvers = {tensor["solver"] for tensor in reports[0]["tensors"] if tensor["spec"]}
    assert solvers == {"least squares, coordinate descent"}
    left = {path.name for job in jobs for path in workplace.store.folder(job.id).iterdir()}
    assert left == {"output", "plan.json", "plan.profiled.json"}, "no file of correlations stays"


def test_copy_of_a_source_is_the_same_source_and_another_model_is_not(
    foreman: Foreman, models: Path, source: Path
) -> None:
    copy, other = save_llama(models / "copy", n_shards=2), save_llama(models / "other", n_shards=2, seed=1)
    jobs = [foreman.submit(folder) for folder in (source, copy, other)]
    foreman.run_all()
    assert [found(foreman, job)["cached"] for job in jobs] == [False, True, False]


def test_without_transformers_auto_is_analytic_says_so_and_is_not_kept(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        without_transformers(patched)
        job = foreman.submit(source)
        foreman.run_all()
    assert "analytic" in reported(workplace, job).values()
    assert "synthetic" not in reported(workplace, job).values()
    assert "transformers" in found(foreman, job)["note"]
    better = foreman.submit(source)
    foreman.run_all()
    assert (found(foreman, better)["cached"], set(reported(workplace, better).values())) == (False, {"synthetic"})


def test_synthetic_energies_that_cannot_be_had_fail_the_job_at_once(
    foreman: Foreman, workplace: Workplace, source: Path
) -> None:
    config = source / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "unheard_of"'))
    job = foreman.submit(source, Recipe(energy="synthetic"))
    foreman.run_all()
    job = foreman.get(job)
    assert job.error is not None
    assert (job.status, job.error["code"], job.error["type"]) == (JobStatus.FAILED, "energy_unavailable", "user")
    assert "unheard_of" in job.error["message"]
    assert job.attempt == 1
    assert not workplace.store.folder(job.id).exists()


def test_unexpected_error_is_tried_again(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    job = foreman.submit(source)
    with monkeypatch.context() as patched:
        patched.setattr(energies, "profile", broken)
        foreman.run_next()
        foreman.run_next()
    assert foreman.get(job).status == JobStatus.RUNNING
    foreman.run_all()
    assert (foreman.get(job).status, foreman.get(job).attempt) == (JobStatus.SUCCEEDED, 2)


def test_progress_is_that_of_the_bytes_hashed_and_read(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = Checkpoint.open(source).headers()
    nbytes = sum(entry.nbytes for file in headers.values() for entry in file.values())

    def reading(*arguments: object, progress: Callable[[int], None], **options: object) -> Energies:
        for done in range(0, nbytes + 1, nbytes // 20):
            progress(done)
            time.sleep(0.03)
        return Energies({}, {})

    monkeypatch.setattr(energies, "profile", reading)
    job = foreman.submit(source)
    foreman.run_up_to(UnitKind.SHARD)
    with workplace.database.read() as session:
        events = [event.data for event in repository.list_events(session, job.id) if event.type == "progress"]
    percents = [event["percent"] for event in events]
    assert {(event["phase"], event["total"]) for event in events} == {("profiling", 2 * nbytes)}
    assert len(percents) > 5
    assert percents[-1] > 50
    assert percents == sorted(set(percents))


@pytest.mark.parametrize("deaf", [False, True], ids=["at its next look", "in the middle of a long product"])
def test_cancel_while_profiling_leaves_nothing(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    begun, over = threading.Event(), threading.Event()

    def endless(*arguments: object, progress: Callable[[int], None], **options: object) -> None:
        begun.set()
        while not over.wait(0.01):
            if not deaf:
                progress(1)

    def cancel() -> None:
        begun.wait(10)
        foreman.cancel(job)

    monkeypatch.setattr(energies, "profile", endless)
    job = foreman.submit(source)
    foreman.run_next()
    user = threading.Thread(target=cancel)
    user.start()
    try:
        foreman.run_next()
        assert foreman.get(job).status == JobStatus.CANCELLED
        assert not workplace.store.folder(job.id).exists()
        assert not (workplace.settings.data_dir / "energies").exists()
    finally:
        over.set()
        user.join()


def test_cancel_ends_the_hash(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, over = threading.Event(), threading.Event()

    def endless(
        checkpoint: Checkpoint, revision: str | None, *, progress: Callable[[int], None] = lambda nbytes: None
    ) -> None:
        foreman.cancel(job)
        try:
            while not over.wait(0.01):
                progress(1)
        except Cancelled:
            stopped.set()
            raise

    monkeypatch.setattr(energies, "fingerprint", endless)
    job = foreman.submit(source)
    foreman.run_next()
    try:
        foreman.run_next()
        assert foreman.get(job).status == JobStatus.CANCELLED
        assert stopped.wait(5), "nobody waits for it, and it does not go on"
    finally:
        over.set()


def test_profile_done_but_not_written_down_is_done_again(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    job = foreman.submit(source)
    foreman.run_next()
    with monkeypatch.context() as patched:
        patched.setattr(repository, "profile_succeeded", killed)
        with pytest.raises(KeyboardInterrupt):
            foreman.run_next()
    with workplace.database.write() as session:
        repository.expire_units(session, "worker@here")
    with workplace.database.read() as session:
        (unit_id,) = repository.expired_units(session)
    with workplace.database.write() as session:
        repository.reap_unit(session, unit_id, backoff_s=0, backoff_limit_s=0)
    foreman.run_all()
    assert (foreman.get(job).status, foreman.get(job).attempt) == (JobStatus.SUCCEEDED, 2)
    assert found(foreman, job)["cached"]


def test_plan_that_wakes_late_does_not_undo_the_profile(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source, ANALYTIC)
    claim = foreman.claim_next()
    with workplace.database.write() as session:
        repository.expire_units(session, "worker@here")
        repository.reap_unit(session, claim.unit_id, backoff_s=0, backoff_limit_s=0)
    foreman.run_up_to(UnitKind.SHARD)
    with pytest.raises(LeaseLost):
        STEPS[claim.kind](workplace, claim, Heartbeat(workplace, claim, leaving=foreman.leaving))
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    assert "analytic" in reported(workplace, job).values()


def leave_nothing(path: Path) -> None:
    path.unlink()


def leave_half(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()  # the cache has the same file under another name
    path.write_bytes(content[: len(content) // 2])


def leave_others(path: Path) -> None:
    path.unlink()
    Energies({}, {}).save(path)


@pytest.mark.parametrize("damage", [leave_nothing, leave_half, leave_others])
def test_energies_of_a_job_that_are_damaged_are_not_the_users_fault(
    foreman: Foreman, workplace: Workplace, source: Path, damage: Callable[[Path], None]
) -> None:
    job = foreman.submit(source, ANALYTIC, max_attempts=1)
    foreman.run_up_to(UnitKind.SHARD)
    damage(workplace.store.energies(job.id))
    foreman.run_all()
    job = foreman.get(job)
    assert job.error == {
        "code": "result_damaged",
        "type": "system",
        "message": "the job's input energies are damaged or gone",
        "retryable": True,
    }


def test_source_that_is_gone_by_then_is_named(foreman: Foreman, source: Path) -> None:
    job = foreman.submit(source, ANALYTIC)
    foreman.run_next()
    (source / "model-00002-of-00002.safetensors").unlink()
    foreman.run_all()
    error = foreman.get(job).error
    assert error is not None
    assert (error["code"], error["type"]) == ("invalid_checkpoint", "user")


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def put_a_copy(path: Path) -> None:
    """Another file, as old and as large."""
    path.replace(path.with_suffix(".old"))
    shutil.copy2(path.with_suffix(".old"), path)


@pytest.mark.parametrize("change", [touch, put_a_copy])
def test_energies_of_a_source_that_changed_meanwhile_are_not_kept(
    foreman: Foreman, source: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    measure = energies.profile

    def disturbed(*arguments: Any, **options: Any) -> Energies:
        found = measure(*arguments, **options)
        change(source / "model-00002-of-00002.safetensors")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(energies, "profile", disturbed)
        foreman.submit(source, ANALYTIC)
        foreman.run_all()
    later = [foreman.submit(source, ANALYTIC) for _ in range(2)]
    foreman.run_all()
    assert [found(foreman, job)["cached"] for job in later] == [False, True]


def test_energies_are_gone_before_the_job_is_done_and_its_finish_needs_none(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    job = foreman.submit(source, ANALYTIC)
    foreman.run_up_to(UnitKind.FINISH)
    with monkeypatch.context() as patched:
        patched.setattr(repository, "finish_succeeded", killed)
        with pytest.raises(KeyboardInterrupt):
            foreman.run_next()
    assert not workplace.store.energies(job.id).exists()
    with workplace.database.write() as session:
        repository.expire_units(session, "worker@here")
    reap(workplace)
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
