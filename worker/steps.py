"""The steps of a job as plain functions: claim a unit, do it, write down how it ended. No Celery here.

Every step may run twice with the same result; no transaction is open while one works.
"""

import errno
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars

from hqq_core import convert
from hqq_core.checkpoint import MANIFEST
from hqq_core.energy import Energies
from hqq_core.errors import Cancelled, CheckpointError, EnergyError, StorageFullError, VerificationError
from hqq_core.plan import Plan, build_plans
from hqq_core.recipe import Recipe
from hqq_core.results import HeldPart, Manifest, ShardResult
from hqq_core.safetensors_file import artifact_of
from hqq_core.weighting import Weighting
from service.common import outbox, repository
from service.common.errors import (
    LeaseLost,
    ResultDamaged,
    ServiceError,
    StorageReadOnly,
    Unavailable,
    describe,
    is_final,
)
from service.common.events import log_data
from service.common.models import Job
from service.common.repository import Claim, ShardWork
from service.common.status import UnitKind
from worker import energies
from worker.ahead import solved_before, solving_ahead
from worker.energy_cache import EnergyCache
from worker.heartbeat import Heartbeat, Stop
from worker.kept_source import drop_weights, forget_source
from worker.push.early import going_ahead
from worker.push.job import check_target, push_job
from worker.reaper import discard_files
from worker.sources import Source, opened_source, provenance_of
from worker.verification import checking_ahead, held_before, verification
from worker.workplace import Workplace

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
CLOSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
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
    elif isinstance(error, OSError) and error.errno in CLOSED:
        error = _closed_store(workplace) or error
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
            retry_after_s=error.retry_after_s if isinstance(error, ServiceError) else None,
        )


def _closed_store(workplace: Workplace) -> StorageReadOnly | None:
    """What is to be said where it is the data directory that was refused."""
    try:
        workplace.store.check_writable()
    except StorageReadOnly as error:
        return error
    return None


def plan_job(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """From headers alone: what each recipe makes of every tensor, and whether there is room for all of it."""
    check_target(workplace, claim, heartbeat)
    with opened_source(workplace, claim, heartbeat) as source:
        plans = build_plans(source.checkpoint, _recipes(claim))
    _check_room(workplace, sum(plan.nbytes_out for plan in plans) + max(plan.finish_nbytes for plan in plans))
    workplace.store.create(claim.job_id)
    _write_plans(workplace, claim, plans, profiled=False)
    with workplace.database.write() as session:
        return repository.plan_succeeded(session, claim, _shards(plans), profile=_weighted(claim))


def profile_job(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """The input energies, and the plans that say which tensor has which."""
    store, settings = workplace.store, workplace.settings
    plans = _read_plans(workplace, claim, profiled=False)
    kept = EnergyCache(settings.data_dir / "energies", settings.energy_cache_nbytes)
    with ExitStack() as unit:
        source = unit.enter_context(opened_source(workplace, claim, heartbeat))
        passed = unit.enter_context(solving_ahead(workplace, claim, source, plans, heartbeat.look))
        unit.enter_context(going_ahead(workplace, claim))
        found, cached = energies.obtain(source, plans, store.energies(claim.job_id), kept, heartbeat, passed)
    plans = [plan.with_energies(found) for plan in plans]
    for plan in plans:
        convert.write_folding(plan, found, store.output(claim.job_id))
    _write_plans(workplace, claim, plans, profiled=True)
    weighted = (tensor for plan in plans if plan.recipe.weighted for tensor in plan.tensors if tensor.spec)
    counts = Counter({tensor.name: tensor.energy or "none" for tensor in weighted}.values())
    said = ", ".join(f"{count} {source}" for source, count in counts.most_common())
    about = {"energy": dict(counts), "cached": cached, "note": found.note}
    logger.info("Input energies are there.", action="energies_ready", **about)
    message = f"input energies of the tensors to quantize: {said}{', cached' if cached else ''}"
    with workplace.database.write() as session:
        entry = log_data("energies_ready", message, **about)
        return repository.profile_succeeded(session, claim, _shards(plans), entry)


def quantize_shard(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """One input shard, read once, solved and written for each plan; or found as it was while others were measured."""
    plans = _final_plans(workplace, claim)
    weighting = _read_energies(workplace, claim, plans) if _weighted(claim) else None
    before = solved_before(workplace, claim.job_id, plans, claim.index, weighting)
    results = before or _solve(workplace, claim, heartbeat, plans, weighting)
    nbytes_out = sum(file.nbytes for result in results for file in result.files)
    with workplace.database.write() as session:
        made = {"outputs": [result.to_dict() for result in results]}
        return repository.shard_succeeded(session, claim, made, nbytes_out=nbytes_out)


def _solve(
    workplace: Workplace, claim: Claim, heartbeat: Heartbeat, plans: Sequence[Plan], weighting: Energies | None
) -> Sequence[ShardResult]:
    with ExitStack() as unit:
        source = unit.enter_context(opened_source(workplace, claim, heartbeat))
        unit.enter_context(checking_ahead(workplace, claim, source, plans))
        unit.enter_context(going_ahead(workplace, claim))
        _check_room(workplace, sum(plan.shards[claim.index].nbytes_out for plan in plans))
        return convert.quantize_shard(
            source.checkpoint,
            plans,
            claim.index,
            workplace.store.output(claim.job_id),
            weighting,
            threads=workplace.settings.threads,
            progress=heartbeat.progress,
        )


def finish_job(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """What completes each plan's folder; then all of it read again and held against the source; last in each, its manifest."""
    plans = _final_plans(workplace, claim)
    with workplace.database.read() as session:
        shards = [result["outputs"] for result in repository.shard_results(session, claim.job_id)]
    held = held_before(workplace, claim.job_id, len(plans), heartbeat.look)
    artifacts, outputs, before = [], [], 0
    with ExitStack() as unit:
        unit.enter_context(going_ahead(workplace, claim))
        # opened when it is wanted: after a late crash it may be gone, and nothing wants it
        source = cache(lambda: unit.enter_context(opened_source(workplace, claim, heartbeat)))
        for plan, parts, own in zip(plans, held, zip(*shards, strict=True), strict=True):
            results = [ShardResult.from_dict(result) for result in own]
            manifest = _finish(workplace, claim, source, plan, results, parts, _after(before, heartbeat.progress))
            before += sum(file.nbytes for result in results for file in result.files)
            artifacts += _artifacts(plan, manifest, workplace.store.output(claim.job_id))
            outputs.append({"folder": plan.folder, "format": plan.recipe.format, "metrics": manifest.metrics})
    _remove_inputs(workplace, claim)
    with workplace.database.write() as session:
        return repository.finish_succeeded(session, claim, artifacts=artifacts, outputs=outputs)


def _remove_inputs(workplace: Workplace, claim: Claim) -> None:
    """No finish needs them any more, this one or its next start: all manifests are there."""
    with workplace.database.write() as session:  # what is no longer ours may be read by another
        repository.renew_lease(session, claim, lease_s=workplace.settings.lease_s)
    workplace.store.energies(claim.job_id).unlink(missing_ok=True)
    if not claim.source.get("keep", True):
        drop_weights(workplace, claim.job_id)
    if claim.target is None:  # else it may still be sent from there
        workplace.store.remove_ahead(claim.job_id)
    forget_source(workplace, claim.job_id)


def _finish(
    workplace: Workplace,
    claim: Claim,
    source: Callable[[], Source],
    plan: Plan,
    results: list[ShardResult],
    held: list[HeldPart],
    progress: Callable[[int], None],
) -> Manifest:
    """One folder; where an earlier start has come to its manifest, only what it names is read once more."""
    output = workplace.store.output(claim.job_id)
    nbytes = sum(file.nbytes for result in results for file in result.files)
    try:
        once_more = convert.finished(plan, output, progress=lambda nbytes_done: progress(min(nbytes_done, nbytes)))
        if once_more is not None:
            return once_more
        _check_room(workplace, plan.finish_nbytes)
        checkpoint = source().checkpoint
        check = verification(checkpoint, nbytes, held, threads=workplace.settings.threads, progress=progress)
        provenance, repo_id = provenance_of(claim.source, claim.job_id), (claim.target or {}).get("repo_id")
        return convert.finish_checkpoint(
            checkpoint, plan, results, output, check=check, provenance=provenance, repo_id=repo_id
        )
    except VerificationError as error:
        raise ResultDamaged(f"what was written is not what was solved: {error}") from error


def _artifacts(plan: Plan, manifest: Manifest, output: Path) -> list[dict[str, Any]]:
    """Every file of a folder, under its name in the job's."""
    path = output / plan.folder / MANIFEST
    last = artifact_of(path)
    prefix = f"{plan.folder}/" if plan.folder else ""
    return [{**asdict(file), "name": prefix + file.name} for file in (*manifest.files, last)]


STEPS: dict[UnitKind, Callable[[Workplace, Claim, Heartbeat], Job]] = {
    UnitKind.PLAN: plan_job,
    UnitKind.PROFILE: profile_job,
    UnitKind.SHARD: quantize_shard,
    UnitKind.FINISH: finish_job,
    UnitKind.PUSH: push_job,
}


def _recipes(claim: Claim) -> list[Recipe]:
    return [Recipe.from_dict(recipe) for recipe in claim.recipes]


def _weighted(claim: Claim) -> bool:
    """Whether the job has a profile."""
    return any(recipe.weighted for recipe in _recipes(claim))


def _shards(plans: Sequence[Plan]) -> list[ShardWork]:
    """The source's, the same in each plan."""
    return [ShardWork(shard.index, shard.nbytes_in) for shard in plans[0].shards]


def _check_room(workplace: Workplace, nbytes: int) -> None:
    workplace.cache.make_disk_room(nbytes)
    workplace.store.check_room(nbytes, reserve_nbytes=workplace.settings.min_free_nbytes)


def _write_plans(workplace: Workplace, claim: Claim, plans: Sequence[Plan], *, profiled: bool) -> None:
    stored = {"plans": [plan.to_dict() for plan in plans]}
    workplace.store.write_plan(claim.job_id, stored, profiled=profiled)


def _final_plans(workplace: Workplace, claim: Claim) -> list[Plan]:
    """What shards and finish go by: the profile's plans, where the job has a profile."""
    return _read_plans(workplace, claim, profiled=_weighted(claim))


def _read_plans(workplace: Workplace, claim: Claim, *, profiled: bool) -> list[Plan]:
    try:
        stored = workplace.store.read_plan(claim.job_id, profiled=profiled)
        return [Plan.from_dict(plan) for plan in stored["plans"]]
    except (FileNotFoundError, CheckpointError, KeyError) as error:
        raise ResultDamaged(
            "the job's plan is gone, or another version of Halfquad made it: submit the job again"
        ) from error


def _read_energies(workplace: Workplace, claim: Claim, plans: Sequence[Plan]) -> Energies:
    """What the profile left for the tensors of a shard; where it is not what was planned, that is nobody's fault but ours."""
    shards = [plan.shards[claim.index] for plan in plans if plan.recipe.weighted]
    try:
        found = Energies.load(workplace.store.energies(claim.job_id), [tensor.name for tensor in shards[0].tensors])
        for shard in shards:
            Weighting.of(shard, found)
    except (EnergyError, OSError) as error:
        raise ResultDamaged(ENERGIES_DAMAGED) from error
    return found


def _after(before: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    return lambda nbytes_done: progress(before + nbytes_done)
