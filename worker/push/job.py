"""The last unit of a job that has a target: everything goes there, in one commit or with the manifest last."""

from pathlib import Path

import structlog

from hqq_core.card import card_of_several
from hqq_core.checkpoint import README
from hqq_core.safetensors_file import sha256_file
from service.common import repository
from service.common.errors import ResultDamaged
from service.common.models import Job
from service.common.repository import Claim
from worker.heartbeat import Heartbeat
from worker.push.files import PushFile, files_of
from worker.push.target import push_of
from worker.workplace import Workplace

logger = structlog.get_logger(__name__)


def push_job(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Job:
    """Publish the result, or find that an earlier start has."""
    workplace.sender.settle(claim.job_id, heartbeat.look)  # what it has in work would be sent twice
    workplace.store.remove_ahead(claim.job_id)
    with workplace.database.read() as session:
        result = repository.get_job(session, claim.job_id).result
    if result is None:
        raise ResultDamaged("the job's result is not written down")
    output = workplace.store.output(claim.job_id)
    files = files_of(output, result["artifacts"])
    folders = [made["folder"] for made in result["outputs"]]
    if any(folders):
        files.append(_readme(claim, workplace.store.folder(claim.job_id), output, folders))
    for file in files:
        path = Path(file.path)
        if not path.is_file() or path.stat().st_size != file.nbytes:
            raise ResultDamaged(f"{file.name}: gone, or not of the size it was written with")
    push = push_of(workplace, claim, heartbeat.look, heartbeat.progress)
    pushed = push.run(files, [made["format"] for made in result["outputs"]])
    logger.info("The result is where it was to go.", action="result_pushed", **pushed)
    with workplace.database.write() as session:
        return repository.push_succeeded(session, claim, pushed)


def check_target(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> None:
    """Before hours of work: an error for what would be refused at their end; nothing where there is no target."""
    if claim.target is not None:
        push_of(workplace, claim, heartbeat.look, heartbeat.progress).check()


def _readme(claim: Claim, folder: Path, output: Path, folders: list[str]) -> PushFile:
    """What a reader of a repository with several results sees first."""
    assert claim.target is not None
    path = folder / README
    path.write_bytes(card_of_several(output, folders, repo_id=claim.target.get("repo_id")))
    return PushFile(README, str(path), path.stat().st_size, sha256_file(path))
