"""The run: jobs are submitted, their troubles happen at their moments, until all of them have come to an end."""

import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import structlog
from sqlalchemy import select

from service.common.errors import Unavailable
from service.common.models import Job, Outbox, Unit
from service.common.queue import Broker
from service.common.session import Database
from service.common.settings import Settings
from service.common.status import TERMINAL, UnitStatus
from tests.acceptance.chaos.draws import PHASES, SLEEPERS, STEPS, Strike, draw_jobs
from tests.acceptance.chaos.processes import WORKERS, Processes
from tests.acceptance.chaos.subjects import Pending, Subject, arm, make_subject
from tests.acceptance.conftest import environment_of, free_port, kill
from tests.fakehub.server import FakeHub

POLL_S = 0.05
TOKEN_LOOK_S = 0.5
AT_ONCE = 5  # jobs on their way
QUICK = {
    "HALFQUAD_LEASE_S": "8",
    "HALFQUAD_HEARTBEAT_S": "2",
    "HALFQUAD_CANCEL_POLL_S": "0.3",
    "HALFQUAD_HOUSEKEEPING_S": "0.5",
    "HALFQUAD_REDISPATCH_S": "4",
    "HALFQUAD_BACKOFF_S": "0.3",
    "HALFQUAD_BACKOFF_LIMIT_S": "2",
    "HALFQUAD_MAX_ATTEMPTS": "20",  # kills meet all jobs that are on their way, not only the one they were drawn for
    "HALFQUAD_SOFT_SHUTDOWN_S": "0",
    "HALFQUAD_MIN_FREE_NBYTES": "0",
    "HALFQUAD_THREADS": "1",
    "HALFQUAD_SOURCE_CACHE_NBYTES": "3000000",  # room for some jobs' sources: the others are thrown out
}

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Standing:
    """Where a job is, by its row."""

    status: str
    phase: str | None

    @property
    def over(self) -> bool:
        return self.status in TERMINAL


@dataclass
class Chaos:
    """One run over one folder."""

    folder: Path
    hub: FakeHub
    processes: Processes
    database: Database
    broker: Broker
    http: httpx.Client
    subjects: list[Subject]
    standings: dict[str, Standing] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    asleep: list[tuple[float, list[int]]] = field(default_factory=list)  # until when, and who
    leaks: list[str] = field(default_factory=list)

    @property
    def data_dir(self) -> Path:
        return self.processes.settings.data_dir

    def run(self, patience_s: float) -> None:
        """Until all jobs have ended; TimeoutError where for so long nothing moves."""
        try:
            self._run(patience_s)
        finally:
            self._wake(time.monotonic() + max(SLEEPERS.values()))

    def _run(self, patience_s: float) -> None:
        waiting, before = list(self.subjects), 0
        moved_at = looked_at = time.monotonic()
        while waiting or not all(self._standing(subject).over for subject in self.subjects):
            self.processes.keep_up()
            self._wake(time.monotonic())
            self._look()
            if time.monotonic() - looked_at > TOKEN_LOOK_S:
                looked_at = time.monotonic()
                self._look_for_the_token()
            under_way = [one for one in self.subjects if one.job_id and not self._standing(one).over]
            if waiting and len(under_way) < AT_ONCE and self._submit(waiting[0]):
                under_way.append(waiting.pop(0))
            for subject in under_way:
                for pending in subject.strikes:
                    if not pending.done and self._has_come(subject, pending):
                        pending.done = self._strike(subject, pending.strike)
            if (moves := self._moves()) != before:
                before, moved_at = moves, time.monotonic()
            if time.monotonic() - moved_at > patience_s:
                raise TimeoutError(f"for {patience_s:.0f} s nothing moved: {[one.job_id for one in under_way]}")
            time.sleep(POLL_S)

    def _standing(self, subject: Subject) -> Standing:
        return self.standings.get(subject.job_id, Standing("queued", None))

    def _look(self) -> None:
        with self.database.read() as session:
            rows = session.execute(select(Job.id, Job.status, Job.phase)).all()
        self.standings = {row.id: Standing(row.status, row.phase) for row in rows}

    def _look_for_the_token(self) -> None:
        canary = self.hub.write_token.encode()
        for pid in self.processes.hub_children():
            if any(canary in variable for variable in environment_of(pid)):
                self.leaks.append(f"environment of process {pid}")

    def _moves(self) -> int:
        with self.database.read() as session:
            return sum(session.scalars(select(Job.event_seq)))

    def _submit(self, subject: Subject) -> bool:
        """With a key: an answer that was lost with the API is the same job's."""
        if not (subject.armed or subject.strikes):
            arm(subject, self.hub)
        body, key = subject.body(), {"Idempotency-Key": f"chaos-{subject.draw.name}"}
        try:
            answer = self.http.post("/v1/jobs", json=body, headers=key)
        except httpx.TransportError:
            return False
        if answer.status_code == 503:
            return False
        assert answer.status_code == 202, answer.text
        subject.job_id = answer.json()["id"]
        return True

    # strikes

    def _has_come(self, subject: Subject, pending: Pending) -> bool:
        moment, standing = pending.strike.moment, self._standing(subject)
        if moment not in STEPS:
            return standing.phase is not None and PHASES.index(standing.phase) >= PHASES.index(moment)
        assert pending.armed is not None
        return bool(pending.armed.fired) and (
            moment != "after the commit" or subject.target in landed(self.hub, subject, subject.target)
        )

    def _strike(self, subject: Subject, strike: Strike) -> bool:
        """Whether it could be done by now."""
        match strike.what:
            case "cancel":
                struck = self._cancel(subject)
            case "messages again":
                struck = self._send_again(subject)
            case "api":
                struck = self._do(self.processes.kill, "api")
            case "broker":
                struck = self._do(self.processes.kill, "broker")
            case "broker and all it holds":
                struck = self._do(self.processes.empty_broker)
            case "worker asleep":
                struck = self._put_to_sleep(strike.what, self._worker_of(subject))
            case "api asleep" | "broker asleep":
                struck = self._put_to_sleep(strike.what, strike.what.partition(" ")[0])
            case victim:
                struck = self._kill_at(victim, self._worker_of(subject))
        if struck:
            self.done[str(strike)] += 1
            log.info("Struck.", action="struck", what=str(strike), job_id=subject.job_id)
        return struck

    def _do(self, deed: Callable[..., None], *arguments: Any) -> bool:
        deed(*arguments)
        return True

    def _put_to_sleep(self, what: str, name: str) -> bool:
        self.asleep.append((time.monotonic() + SLEEPERS[what], self.processes.put_to_sleep(name)))
        return True

    def _wake(self, at: float) -> None:
        """Who has slept long enough; those that were killed meanwhile do not mind."""
        for until, pids in list(self.asleep):
            if until <= at:
                self.asleep.remove((until, pids))
                for pid in pids:
                    kill(pid, signal.SIGCONT)

    def _kill_at(self, victim: str, worker: str) -> bool:
        if victim == "worker":
            self.processes.kill(worker)
            return True
        child = self.processes.pool_child(worker)
        pids = ([child] if child else []) if victim == "pool child" else self.processes.hub_children(worker)
        for pid in pids:
            kill(pid)
        return bool(pids)

    def _worker_of(self, subject: Subject) -> str:
        """Who has a unit of the job, or had one last."""
        with self.database.read() as session:
            owner = session.scalar(
                select(Unit.lease_owner)
                .where(Unit.job_id == subject.job_id, Unit.lease_owner.is_not(None))
                .order_by((Unit.status == UnitStatus.RUNNING).desc(), Unit.started_at.desc())
                .limit(1)
            )
        return owner.split("@")[0] if owner else WORKERS[0]

    def _cancel(self, subject: Subject) -> bool:
        try:
            return self.http.post(f"/v1/jobs/{subject.job_id}/cancel").status_code in (200, 202, 409)
        except httpx.TransportError:
            return False

    def _send_again(self, subject: Subject) -> bool:
        """Every message of the job, twice: of units that wait, that run and that are over."""
        with self.database.read() as session:
            units = session.execute(
                select(Unit.id, Outbox.dispatch_seq)
                .outerjoin(Outbox, Outbox.unit_id == Unit.id)
                .where(Unit.job_id == subject.job_id)
            ).all()
        try:
            for unit_id, dispatch_seq in 2 * units:
                self.broker.send(unit_id, dispatch_seq or 1)
        except Unavailable:
            return False
        return True


def prepare(folder: Path, seed: int, njobs: int, hub: FakeHub) -> Chaos:
    """Sources, targets and running processes."""
    port, data_dir, published = free_port(), folder / "data", folder / "published"
    published.mkdir()
    environment = {
        **QUICK,
        "HALFQUAD_DATA_DIR": str(data_dir),
        "HALFQUAD_PORT": str(port),
        "HALFQUAD_BROKER_URL": Settings(data_dir=data_dir).broker_url,  # not by the temporary directory of each process
        "HALFQUAD_HUB_ENDPOINT": hub.endpoint,
        "HALFQUAD_HUB_TOKEN": hub.write_token,
        "HALFQUAD_TARGET_URLS": f"file://{published}",
    }
    subjects = [make_subject(draw, folder, hub) for draw in draw_jobs(seed, njobs)]
    processes = Processes(folder, environment)
    processes.start()
    settings = processes.settings
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
    database, broker = Database(settings.database_url), Broker(settings)
    return Chaos(folder, hub, processes, database, broker, http, subjects)


def landed(hub: FakeHub, subject: Subject, *repo_ids: str) -> list[str]:
    """The repos of the job's commits, of all branches and pull requests, a repo once for each commit."""
    looked_at = repo_ids or list(hub.state.repos)
    return [
        name
        for name in looked_at
        if name in hub.state.repos
        for commit in list(hub.repo(name).commits.values())
        if subject.trailer in commit.message.splitlines()
    ]
