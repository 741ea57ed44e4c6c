"""A result read again and held against its source: shards of a pinned one soon after they are written, the rest at the end."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import structlog

from hqq_core.checkpoint import Checkpoint
from hqq_core.convert import describe_part
from hqq_core.errors import VerificationError
from hqq_core.plan import Plan
from hqq_core.results import HeldPart, Manifest, ShardResult
from hqq_core.verify import verify_folder, verify_part
from service.common import repository
from service.common.repository import Claim
from worker.errands import Look
from worker.hub_source import HubSource
from worker.sources import Source
from worker.workplace import Workplace

logger = structlog.get_logger(__name__)


def checking_ahead(
    workplace: Workplace, claim: Claim, source: Source, plans: Sequence[Plan]
) -> AbstractContextManager[None]:
    """While a unit computes, what others have written is verified.

    Not of a source that nothing pins: it might change afterwards, and half of a result be of another model.
    """
    fetched = source.fetched
    if fetched is None:
        return nullcontext()
    return workplace.checker.during(claim.job_id, lambda look: _check_next(workplace, claim, fetched, plans, look))


def held_before(workplace: Workplace, job_id: str, n_plans: int, look: Look) -> list[list[HeldPart]]:
    """Of each plan, the parts that were verified."""
    workplace.checker.settle(job_id, look)
    checks = workplace.store.read_checks(job_id).values()
    return [[HeldPart.from_dict(part) for check in checks if (part := check[i])] for i in range(n_plans)]


def verification(
    checkpoint: Checkpoint,
    nbytes: int,
    held: Sequence[HeldPart],
    *,
    threads: int | None,
    progress: Callable[[int], None],
) -> Callable[[Path, Manifest], None]:
    """The check that `finish_checkpoint` takes; all of it counts for `nbytes`."""

    def check(folder: Path, manifest: Manifest) -> None:
        def report(done: int, total: int) -> None:
            progress(nbytes * done // total)

        found = verify_folder(folder, checkpoint, manifest=manifest, held=held, threads=threads, progress=report)
        about = found.to_dict() | {"shards_verified_before": len(held)}
        logger.info("What was written is what was solved.", action="result_verified", **about)

    return check


def _check_next(workplace: Workplace, claim: Claim, source: HubSource, plans: Sequence[Plan], look: Look) -> bool:
    """Verify the newest shard that was not looked at, and whose source is still here; whether there was one."""
    with workplace.database.read() as session:
        shards = repository.shard_results(session, claim.job_id)
    done = workplace.store.read_checks(claim.job_id)
    for shard in reversed(shards):
        index = shard["outputs"][0]["index"]
        file = plans[0].shards[index].file
        if index in done or not source.has(file):
            continue
        results = [ShardResult.from_dict(result) for result in shard["outputs"]]
        held: list[dict[str, Any] | None] = [None] * len(plans)
        try:
            with source.lend(file, look):  # between two tensors, too
                held = [
                    _held(workplace, claim.job_id, source, *made, look) for made in zip(plans, results, strict=True)
                ]
        except VerificationError as error:  # for the last unit to find, and to say
            logger.warning("A shard is not what was solved.", action="shard_damaged", index=index, reason=str(error))
        workplace.store.write_check(claim.job_id, index, held)
        if all(held) and not claim.source.get("keep", True):
            source.drop(file)
        return True
    return False


def _held(
    workplace: Workplace, job_id: str, source: HubSource, plan: Plan, result: ShardResult, look: Look
) -> dict[str, Any] | None:
    """What one plan made of a shard; None where that is not what readers look for yet."""
    if not result.final:
        return None
    checkpoint = source.checkpoint(look)
    folder, about = workplace.store.output(job_id) / plan.folder, describe_part(checkpoint, plan, result)
    threads = workplace.settings.threads
    return verify_part(folder, result, *about, checkpoint, threads=threads, progress=lambda done: look()).to_dict()
