"""The steps of a job as plain functions: claim a unit, do it, write down how it ended. No Celery here.

Every step may run twice with the same result; no transaction is open while one works.
"""

import errno
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import structlog
from structlog.contextvars import bound_contextvars

from hqq_core import convert
from hqq_core.checkpoint import MANIFEST
from hqq_core.energy import Energies
from hqq_core.errors import Cancelled, CheckpointError, EnergyError, StorageFullError
from hqq_core.plan import Plan, ShardPlan, build_plan
from hqq_core.recipe import Recipe
from hqq_core.results import ArtifactFile, ShardResult
from hqq_core.safetensors_file import sha256_file
from hqq_core.weighting import Weighting
from service.common import outbox, repository
from service.common.errors import LeaseLost, ResultDamaged, Unavailable, describe, is_final
from service.common.events import log_data
from service.common.models import Job
from service.common.repository import Claim, ShardWork
from service.common.status import UnitKind
from worker import energies
from worker.energy_cache import EnergyCache
from worker.heartbeat import Heartbeat, Stop
from worker.reaper import discard_files
from worker.sources import open_source
from worker.workplace import Workplace

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
ENERGIES_DAMAGED = "the job's input energies are damaged or gone"

logger = structlog.get_logger(__name__)


def run_unit(
    workplace: Workplace, unit_id: str, *, owner: str, leaving: threading.Event, delivery_tag: str | None = None
) -> None:
    """Do a unit that waits, or nothing: a message may come twice, late, or after a cancel."""
    with workplace.database.write() as session:
        claim = repository.claim_unit(session, unit_id, owner=owner, lease_s=workplace.settings.lease_s)
    if claim is None:
        logger.info("Nothing to do for this message.", action="unit_not_waiting", unit_id=unit_id)
        return
    with bound_contextvars(job_id=claim.job_id, unit=claim.kind, index=claim.index, attempt=claim.attempt):
        logger.info("Took a unit.", action="unit_started")
        try:
            with Heartbeat(workplace, claim, leaving=leaving, delivery_tag=delivery_tag) as heartbeat:
                job = _attempt(workplace, claim, heartbeat)
        except LeaseLost as error:
            logger.warning("Left a unit to its new owner.", action="lease_lost", reason=error.detail)
            return
        logger.info("Ended a unit.", action="unit_ended", job_status=job.status, phase=job.phase)
        discard_files(workplace, [claim.job_id])
        send_due(workplace)


def send_due(workplace: Workplace) -> None:
    """Send what has become due; where the broker is down, housekeeping sends it later."""
    try:
        outbox.dispatch(workplace.database, workplace.broker, workplace.settings)
    except Unavailable as error:
        logger.warning("The broker took no message.", action="dispatch_failed", reason=error.detail)


def _attempt(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """The step and, where it does not come to its end, what follows from that."""
    try:
        return STEPS[claim.kind](workplace, claim, heartbeat)
    except LeaseLost:
        raise
    except Cancelled:
        return _stopped(workplace, claim, heartbeat.stop)
    except Exception as error:
        return _failed(workplace, claim, error)


def _stopped(workplace: Workplace, claim: Claim, why: Stop | None) -> Job:
    if why is Stop.LEASE_LOST:
        raise LeaseLost(why.value)
    with workplace.database.write() as session:
        if why is Stop.LEAVING:
            return repository.hand_back(session, claim)
        return repository.unit_stopped(session, claim)


def _failed(workplace: Workplace, claim: Claim, error: Exception) -> Job:
    if isinstance(error, OSError) and error.errno in FULL:
        error = StorageFullError(f"no room left for the result: {error.strerror}")
    final = is_final(error)
    # what the user can mend needs no trace
    logger.error(
        "A unit failed.", action="unit_failed", reason=str(error), final=final, exc_info=None if final else error
    )
    settings = workplace.settings
    with workplace.database.write() as session:
        return repository.unit_failed(
            session,
            claim,
            describe(error),
            final=final,
            backoff_s=settings.backoff_s,
            backoff_limit_s=settings.backoff_limit_s,
        )


def plan_job(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """From headers alone: what becomes of every tensor, and whether there is room for it."""
    checkpoint = open_source(claim.source, workplace.roots)
    plan = build_plan(checkpoint, Recipe.from_dict(claim.recipe))
    workplace.store.check_room(plan.nbytes_out, reserve_nbytes=workplace.settings.min_free_nbytes)
    workplace.store.create(claim.job_id)
    workplace.store.write_plan(claim.job_id, plan.to_dict())
    with workplace.database.write() as session:
        return repository.plan_succeeded(session, claim, _shards(plan), profile=plan.recipe.weighted)


def profile_job(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """The input energies, and the plan that says which tensor has which."""
    store, settings = workplace.store, workplace.settings
    plan = _read_plan(workplace, claim, profiled=False)
    checkpoint = open_source(claim.source, workplace.roots)
    cache = EnergyCache(settings.data_dir / "energies", settings.energy_cache_nbytes)
    found, cached = energies.obtain(checkpoint, plan, store.energies(claim.job_id), cache, heartbeat)
    plan = plan.with_energies(found)
    store.write_plan(claim.job_id, plan.to_dict(), profiled=True)
    counts = Counter(tensor.energy or "none" for tensor in plan.tensors if tensor.spec)
    said = ", ".join(f"{count} {source}" for source, count in counts.most_common())
    about = {"energy": dict(counts), "cached": cached, "note": found.note}
    logger.info("Input energies are there.", action="energies_ready", **about)
    message = f"input energies of the tensors to quantize: {said}{', cached' if cached else ''}"
    with workplace.database.write() as session:
        entry = log_data("energies_ready", message, **about)
        return repository.profile_succeeded(session, claim, _shards(plan), entry)


def quantize_shard(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """One input shard, solved and written."""
    plan = _final_plan(workplace, claim)
    shard = plan.shards[claim.index]
    weighting = _read_energies(workplace, claim, shard) if plan.recipe.weighted else None
    checkpoint = open_source(claim.source, workplace.roots)
    workplace.store.check_room(shard.nbytes_out, reserve_nbytes=workplace.settings.min_free_nbytes)
    (result,) = convert.quantize_shard(
        checkpoint,
        [plan],
        claim.index,
        workplace.store.output(claim.job_id),
        weighting,
        threads=workplace.settings.threads,
        progress=heartbeat.progress,
    )
    nbytes_out = sum(file.nbytes for file in result.files)
    with workplace.database.write() as session:
        return repository.shard_succeeded(session, claim, result.to_dict(), nbytes_out=nbytes_out)


def finish_job(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """Every written byte read once more; then index, config, report and, last, the manifest."""
    plan = _final_plan(workplace, claim)
    output = workplace.store.output(claim.job_id)
    with workplace.database.read() as session:
        results = [ShardResult.from_dict(result) for result in repository.shard_results(session, claim.job_id)]
    before = 0
    for result in results:
        _verify(plan, result, output, before, heartbeat)
        before += sum(file.nbytes for file in result.files)
    checkpoint = open_source(claim.source, workplace.roots)
    manifest = convert.finish_checkpoint(checkpoint, plan, results, output)
    written = output / MANIFEST
    last = ArtifactFile(written.name, written.stat().st_size, sha256_file(written))
    artifacts = [asdict(file) for file in (*manifest.files, last)]
    workplace.store.energies(claim.job_id).unlink(missing_ok=True)  # no finish needs them, this one or its next start
    with workplace.database.write() as session:
        return repository.finish_succeeded(session, claim, artifacts=artifacts, metrics=manifest.metrics)


STEPS: dict[UnitKind, Callable[[Workplace, Claim, Heartbeat], Job]] = {
    UnitKind.PLAN: plan_job,
    UnitKind.PROFILE: profile_job,
    UnitKind.SHARD: quantize_shard,
    UnitKind.FINISH: finish_job,
}


def _shards(plan: Plan) -> list[ShardWork]:
    return [ShardWork(shard.index, shard.nbytes_in) for shard in plan.shards]


def _final_plan(workplace: Workplace, claim: Claim) -> Plan:
    """What shards and finish go by: the profile's plan, where the job has a profile."""
    return _read_plan(workplace, claim, profiled=Recipe.from_dict(claim.recipe).weighted)


def _read_plan(workplace: Workplace, claim: Claim, *, profiled: bool) -> Plan:
    try:
        return Plan.from_dict(workplace.store.read_plan(claim.job_id, profiled=profiled))
    except (FileNotFoundError, CheckpointError) as error:
        raise ResultDamaged(
            "the job's plan is gone, or another version of Halfquad made it: submit the job again"
        ) from error


def _read_energies(workplace: Workplace, claim: Claim, shard: ShardPlan) -> Energies:
    """What the profile left for the tensors of a shard; where it is not what was planned, that is nobody's fault but ours."""
    try:
        found = Energies.load(workplace.store.energies(claim.job_id), [tensor.name for tensor in shard.tensors])
        Weighting.of(shard, found)
    except (EnergyError, OSError) as error:
        raise ResultDamaged(ENERGIES_DAMAGED) from error
    return found


def _verify(plan: Plan, result: ShardResult, output: Path, before: int, heartbeat: Heartbeat) -> None:
    try:
        convert.verify_shard(
            plan, result, output, progress=lambda nbytes_done: heartbeat.progress(before + nbytes_done)
        )
    except CheckpointError as error:
        raise ResultDamaged(f"what was written is not what was solved: {error}") from error
