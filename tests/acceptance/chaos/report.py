"""A run from its start to its summary."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from redis import RedisError

from tests.acceptance.chaos import invariants
from tests.acceptance.chaos.run import Chaos, landed, prepare
from tests.fakehub.server import FakeHub

SETTLED_S = 60.0


@dataclass(frozen=True)
class Report:
    """What happened, and what does not hold."""

    outcomes: Counter[str]
    faults: Counter[str]
    strikes: Counter[str]
    starts: dict[str, int]
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        njobs = sum(count for name, count in self.outcomes.items() if ":" not in name)
        lines = [f"{njobs} jobs", *_table("outcomes", self.outcomes), *_table("faults that fired", self.faults)]
        lines += [*_table("strikes that were made", self.strikes), *_table("starts of processes", Counter(self.starts))]
        lines += [f"{len(self.wrong)} invariants broken", *(f"  {wrong}" for wrong in self.wrong)]
        return "\n".join(lines)


def run_chaos(folder: Path, seed: int, njobs: int, *, patience_s: float) -> Report:
    """All of it; the folder has the log, the data directory and the Hub afterwards."""
    with FakeHub(folder / "hub") as hub:
        chaos = prepare(folder, seed, njobs, hub)
        try:
            stuck = _run(chaos, patience_s)
            return _judged(chaos, stuck)
        finally:
            chaos.http.close()
            chaos.broker.close()
            chaos.database.close()
            chaos.processes.close()


def _run(chaos: Chaos, patience_s: float) -> list[str]:
    try:
        chaos.run(patience_s)
    except TimeoutError as error:
        return [str(error)]
    return []


def _judged(chaos: Chaos, wrong: list[str]) -> Report:
    chaos.hub.faults.clear()
    chaos.processes.restart_workers()  # a crash between a job's end and its files' is mended by the next look
    jobs, events, told = _wait(lambda: invariants.fetch(chaos), (httpx.TransportError,))
    _settle(chaos, jobs)
    broker = _wait(lambda: invariants.broker_values(chaos.processes.redis()), (RedisError, OSError))
    wrong += [f"outlives the service: {command}" for command in chaos.processes.stop()]
    wrong += invariants.check_jobs(chaos, jobs)
    wrong += invariants.check_failures(chaos, events)
    wrong += invariants.check_files(chaos, jobs)
    wrong += invariants.check_canary(chaos, told, broker)
    return Report(_outcomes(chaos, jobs), _faults(chaos), chaos.done, chaos.processes.starts, tuple(wrong))


def _settle(chaos: Chaos, jobs: dict[str, dict[str, Any]]) -> None:
    """Housekeeping looks through all folders once both workers are up."""
    deadline = time.monotonic() + SETTLED_S
    while time.monotonic() < deadline:
        chaos.processes.keep_up()
        online = "2 online" in _wait(lambda: chaos.http.get("/readyz").text, (httpx.TransportError,))
        if online and not list(invariants.check_files(chaos, jobs)):
            return
        time.sleep(1)


def _wait(ask: Any, errors: tuple[type[Exception], ...]) -> Any:
    deadline = time.monotonic() + SETTLED_S
    while True:
        try:
            return ask()
        except errors:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _outcomes(chaos: Chaos, jobs: dict[str, dict[str, Any]]) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for subject in chaos.subjects:
        job = jobs[subject.job_id]
        outcomes[job["status"]] += 1
        if job["error"]:
            outcomes[f"failed: {job['error']['code']}"] += 1
        if job["status"] != "succeeded" and landed(chaos.hub, subject):
            outcomes[f"{job['status']}: the commit is there all the same"] += 1
        if job["attempt"] > 1:
            outcomes["any: with a unit that was started again"] += 1
    return outcomes


def _faults(chaos: Chaos) -> Counter[str]:
    return Counter(trouble.kind for subject in chaos.subjects for trouble, armed in subject.armed if armed.fired)


def _table(title: str, counts: Counter[str]) -> list[str]:
    return [f"{title}:", *(f"  {name}: {count}" for name, count in sorted(counts.items()))]
