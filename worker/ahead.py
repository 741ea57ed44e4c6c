"""Shards solved while the rest of their model is still measured, so that a result grows as its source arrives.

What a shard's weights are weighted and folded with is most often known when the pass through the model has come to the next
weight file. So an errand beside the profile's unit solves it then, in a folder that has the hash of the problem for a name. The
shard's own unit takes what it finds under the hash of its problem; so a guess that came too early costs time and nothing else.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from hqq_core import convert
from hqq_core.energy import Energies, Passed, fold
from hqq_core.plan import Plan
from hqq_core.results import ShardResult
from hqq_core.safetensors_file import publish, temporary_path, write_json
from hqq_core.weighting import Weighting
from service.common import repository
from service.common.repository import Claim
from worker.errands import Look
from worker.hub_source import HubSource
from worker.sources import Source
from worker.workplace import Workplace

NOTE = "solved.json"
VERSION = 1  # of the note and of what a problem is

logger = structlog.get_logger(__name__)


@contextmanager
def solving_ahead(
    workplace: Workplace, claim: Claim, source: Source, plans: Sequence[Plan], look: Look
) -> Iterator[Passed | None]:
    """Within it, shards are solved that what the `with` gets is called for; None where nothing can be done ahead.

    Correlations are not to be read before they are all written, and a source that nothing pins may change.
    """
    if source.fetched is None or any(plan.recipe.correlated for plan in plans):
        yield None
        return
    ahead = _Ahead(workplace, claim.job_id, source.fetched, plans)
    with workplace.solver.during(claim.job_id, ahead.solve_next):
        yield lambda index, measured: ahead.measured.append((index, measured))
    workplace.solver.settle(claim.job_id, look)  # else another worker would begin with the same shard


def solved_before(
    workplace: Workplace, job_id: str, plans: Sequence[Plan], index: int, energies: Energies | None
) -> list[ShardResult] | None:
    """What was made of a shard, put where it belongs, if it was made of this problem."""
    folder, output = workplace.store.solved(job_id) / _problem(plans, index, energies), workplace.store.output(job_id)
    if (note := _read_note(folder)) is None:
        return None
    results = [ShardResult.from_dict(result) for result in note["outputs"]]
    for plan, result in zip(plans, results, strict=True):
        (output / plan.folder).mkdir(exist_ok=True)
        for file in result.files:
            if not _take_over(folder / plan.folder / file.name, output / plan.folder / file.name, file.nbytes):
                return None
    return results


def written_shards(workplace: Workplace, job_id: str) -> list[tuple[Path, dict[str, Any]]]:
    """What is written of any shard, and below which folder, whether or not its unit has come to its turn."""
    with workplace.database.read() as session:
        shards = [(workplace.store.output(job_id), shard) for shard in repository.shard_results(session, job_id)]
    seen = {shard["outputs"][0]["index"] for _, shard in shards}
    ahead = [(folder, _read_note(folder)) for folder in sorted(workplace.store.solved(job_id).glob("*"))]
    return shards + [(folder, note) for folder, note in ahead if note and note["outputs"][0]["index"] not in seen]


def _read_note(folder: Path) -> dict[str, Any] | None:
    """What was solved there; None where it is not whole."""
    try:
        note: dict[str, Any] = json.loads((folder / NOTE).read_bytes())
    except FileNotFoundError:
        return None
    return note if note["version"] == VERSION else None


def _take_over(found: Path, path: Path, nbytes: int) -> bool:
    """Have a file under its own name; it may be on its way to a target under the other. Whether it was there."""
    try:
        if found.stat().st_size != nbytes:
            return False
        temporary = temporary_path(path)
        os.link(found, temporary)
        publish(temporary, path)
    except OSError as error:  # gone, or no links there
        logger.info("A shard is solved again.", action="shard_not_taken_over", file=path.name, reason=error.strerror)
        return False
    return True


@dataclass
class _Ahead:
    workplace: Workplace
    job_id: str
    source: HubSource
    plans: Sequence[Plan]
    measured: deque[tuple[int, Energies]] = field(default_factory=deque)

    def solve_next(self, look: Look) -> bool:
        """Solve the first shard that is measured; whether there was one."""
        if not self.measured:
            return False
        index, measured = self.measured.popleft()
        file = self.plans[0].shards[index].file
        if self.source.has(file):  # else there was no room for it, and what comes next wants that more
            energies = self._folded(index, measured, look)
            with self.source.lend(file, look):  # between two tensors, too
                self._solve(index, energies, look)
        return True

    def _folded(self, index: int, measured: Energies, look: Look) -> Energies:
        """With the folds of a shard's tensors, for which other files may be read."""
        if not any(plan.recipe.weighted and plan.recipe.fold for plan in self.plans):
            return measured
        names = {tensor.name for tensor in self.plans[0].shards[index].tensors}
        checkpoint = self.source.checkpoint(look)
        return replace(measured, folds=fold(checkpoint, names, progress=lambda nbytes: look()))

    def _solve(self, index: int, energies: Energies, look: Look) -> None:
        plans = [plan.with_energies(energies) for plan in self.plans]
        folder = self.workplace.store.solved(self.job_id) / _problem(plans, index, energies)
        if _unmeasured(plans, index) or _read_note(folder):
            return
        store, settings = self.workplace.store, self.workplace.settings
        store.check_room(sum(plan.shards[index].nbytes_out for plan in plans), reserve_nbytes=settings.min_free_nbytes)
        folder.mkdir(mode=0o700, exist_ok=True)
        source, threads = self.source.checkpoint(look), settings.threads
        results = convert.quantize_shard(
            source, plans, index, folder, energies, threads=threads, progress=lambda nbytes: look()
        )
        write_json(folder / NOTE, {"version": VERSION, "outputs": [result.to_dict() for result in results]})
        logger.info("Solved a shard ahead.", action="shard_solved_ahead", index=index)


def _unmeasured(plans: Sequence[Plan], index: int) -> bool:
    """Whether a weight waits for another kind of energy, which is looked for at the end."""
    tensors = (tensor for plan in plans for tensor in plan.shards[index].tensors)
    return any(tensor.spec and tensor.energy == "none" for tensor in tensors)


def _problem(plans: Sequence[Plan], index: int, energies: Energies | None) -> str:
    """Hex SHA-256 of all that a shard's result follows from, but the source."""
    digest = hashlib.sha256()
    for plan in plans:
        shard = plan.shards[index]
        about = {"recipe": plan.recipe.to_dict(), "folder": plan.folder, "shard": asdict(shard)}
        digest.update(json.dumps(about, sort_keys=True).encode())
        digest.update(Weighting.of(shard, energies if plan.recipe.weighted else None).digest.encode())
    return digest.hexdigest()
