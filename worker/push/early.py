"""Shards on their way before the job is done: only a saving of time, for the push sends whatever is not there."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import structlog

from hqq_core.outputs import output_folders
from hqq_core.recipe import Recipe
from hqq_core.results import ArtifactFile
from service.common.errors import ServiceError
from service.common.repository import Claim
from worker.ahead import written_shards
from worker.push.files import files_of
from worker.push.target import push_of
from worker.workplace import Workplace

logger = structlog.get_logger(__name__)


def going_ahead(workplace: Workplace, claim: Claim) -> AbstractContextManager[None]:
    """While a unit computes, what earlier ones have finished is sent."""
    if claim.target is None:
        return nullcontext()
    return workplace.sender.during(claim.job_id, lambda look: send_next(workplace, claim, look))


def send_next(workplace: Workplace, claim: Claim, look: Callable[[], None]) -> bool:
    """Send at once all files that are final and that this process has not tried; whether there were any."""
    shards = written_shards(workplace, claim.job_id)
    files = [file for folder, shard in shards for file in files_of(folder, final_files(claim, [shard]))]
    waiting = [file for file in files if (claim.job_id, file.name) not in workplace.sent]
    if not waiting:
        return False
    begun = any(sent[0] == claim.job_id for sent in workplace.sent)
    workplace.sent.difference_update([sent for sent in workplace.sent if sent[0] != claim.job_id])
    try:
        push_of(workplace, claim, look, lambda nbytes: None).warm_up(waiting, begun=begun)
    except ServiceError as error:
        logger.info("Nothing was sent ahead.", action="early_upload_failed", reason=error.detail)
    workplace.sent.update((claim.job_id, file.name) for file in waiting)
    return True


def final_files(claim: Claim, shards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What shards wrote and no finish will touch, by names in the job's output."""
    folders = output_folders([Recipe.from_dict(recipe) for recipe in claim.recipes])
    return [
        {**file, "name": f"{folder}/{file['name']}" if folder else file["name"]}
        for shard in shards
        for folder, made in zip(folders, shard["outputs"], strict=True)
        for file in made["files"]
        if ArtifactFile(**file).final
    ]
