"""Every act, done by the real repository and by the model, and the two held against each other after it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sqlalchemy.orm import Session

from service.common import outbox, repository
from service.common.errors import JobError, JobNotRetryable, JobTerminal, LeaseLost, Unavailable
from service.common.events import log_data
from service.common.models import Base
from service.common.repository import Claim, Message, ShardWork
from service.common.session import Database
from tests.service.machine import invariants, rows
from tests.service.machine.broker import Broker
from tests.service.machine.clock import Clock
from tests.service.machine.crashes import UNHEARD, Crash, Crashes
from tests.service.machine.model import TERMINAL, Job, Key, Unit, due

LEASE_S, BACKOFF_S, BACKOFF_LIMIT_S, REDISPATCH_S = 250, 150, 450, 350
WAIT = {"backoff_s": BACKOFF_S, "backoff_limit_s": BACKOFF_LIMIT_S}
RETRY_AFTER_LIMIT_S = 3600
ERROR = JobError("broken", "system", "it broke", True)
ENTRY = log_data("energies_ready", "there")
SOURCE = {"type": "hub", "repo_id": "acme/tiny"}
PINNED = {**SOURCE, "commit": "c" * 40}
WRITES: dict[str, Callable[[Session, Claim], Any]] = {
    "renew_lease": lambda session, claim: repository.renew_lease(session, claim, lease_s=LEASE_S),
    "save_progress": lambda session, claim: repository.save_progress(session, claim, 7, lease_s=LEASE_S),
    "pin_source": lambda session, claim: repository.pin_source(session, claim, {**PINNED, "commit": "d" * 40}),
    "plan_succeeded": lambda session, claim: repository.plan_succeeded(session, claim, [ShardWork(0, 1)]),
    "profile_succeeded": lambda session, claim: repository.profile_succeeded(session, claim, [ShardWork(0, 1)], ENTRY),
    "shard_succeeded": lambda session, claim: repository.shard_succeeded(session, claim, {"by": -1}, nbytes_out=1),
    "finish_succeeded": lambda session, claim: repository.finish_succeeded(session, claim, artifacts=[], outputs=[]),
    "push_succeeded": lambda session, claim: repository.push_succeeded(session, claim, {"url": "stale"}),
    "unit_failed": lambda session, claim: repository.unit_failed(session, claim, ERROR, final=True, **WAIT),
    "hand_back": repository.hand_back,
    "unit_stopped": repository.unit_stopped,
}


@dataclass(frozen=True)
class Work:
    """What a job's plan finds."""

    shards: tuple[int, ...]
    profile: bool


class Driver:
    """Jobs, the broker and every claim that was ever given out, in the order they came."""

    def __init__(self, database: Database, clock: Clock, crashes: Crashes) -> None:
        self.database, self.clock, self.crashes = database, clock, crashes
        self.broker = Broker()
        self.clock.set(0)
        self.crashes.fate = None
        self.ids: list[str] = []
        self.jobs: list[Job] = []
        self.works: list[Work] = []
        self.claims: list[Claim] = []
        with database.write() as session:
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(table.delete())
        self.seen = rows.Rows([], {}, [], [], set())
        self.sound = True  # so far

    def do(self, write: Callable[[Session], Any], expect: Callable[[], Any]) -> Any:
        """Both, or neither where the process dies first; what came of it, None where nobody heard."""
        self.sound = False
        unheard = self.crashes.fate == UNHEARD
        try:
            with self.crashes.write() as session:
                got = write(session)
        except Crash:
            self.check()
            return None
        except (LeaseLost, JobTerminal, JobNotRetryable) as refusal:
            got = type(refusal).__name__
        expected = expect()
        assert got == expected, f"the answer is {got}, not {expected}"
        self.check()
        return None if unheard else got

    def check(self) -> None:
        self.sound = False
        before, self.seen = self.seen, rows.read(self.database, self.ids)
        invariants.check(before, self.seen, self.clock.at)
        for number, (job, expected) in enumerate(zip(self.seen.jobs, self.jobs, strict=True)):
            assert job == expected, f"job {number} is\n{job}\nand not\n{expected}"
        self.sound = True

    # users

    def submit(self, work: Work, *, priority: int, max_attempts: int, target: dict[str, Any] | None) -> None:
        self.clock.move(1)  # no two jobs are of one age
        inserted = []

        def write(session: Session) -> str:
            job = repository.insert_job(
                session,
                source=SOURCE,
                recipes=[{}],
                target=target,
                labels={},
                priority=priority,
                max_attempts=max_attempts,
            )
            inserted.append(job.id)
            return job.status

        def expect() -> str:
            job = Job(self.clock.at, priority, max_attempts, target, SOURCE)
            job.submit()
            self.ids += inserted
            self.jobs.append(job)
            self.works.append(work)
            return job.status

        self.do(write, expect)

    def cancel(self, number: int) -> None:
        job_id, job = self.ids[number], self.jobs[number]
        self.do(lambda session: repository.cancel_job(session, job_id).status, job.cancel)

    def retry(self, number: int, target: dict[str, Any] | None) -> None:
        job_id, job = self.ids[number], self.jobs[number]
        self.do(
            lambda session: repository.retry_upload(session, job_id, target=target).status,
            lambda: job.retry(self.clock.at, target),
        )

    # from the outbox to a worker

    def dispatch(self, *, patience: int | None = None, deadly: bool = False) -> int:
        """The real outbox; after so many messages the broker is away, or the sender dead. How many went."""
        self.broker.patience, self.broker.deadly = patience, deadly
        queued = len(self.broker.messages)
        with self.database.read() as session:
            room = max(2 * repository.workers_online(session) + 2 - queued, 0)
        expected = due(self.jobs, self.clock.at, REDISPATCH_S)[:room]
        try:
            outbox.dispatch(self.database, self.broker, SimpleNamespace(redispatch_s=REDISPATCH_S))
        except (Unavailable, Crash):
            assert patience is not None
            assert patience < len(expected), "the broker refused nothing"
        sent = self.broker.messages[queued:]
        n_taken = len(expected) if patience is None else min(patience, len(expected))
        assert [self.seen.names[message.unit_id] for message in sent] == expected[:n_taken], "not the most urgent"
        self._mark_sent(expected, n_taken, deadly)
        self.check()
        return len(sent)

    def _mark_sent(self, expected: list[tuple[int, Key]], n_taken: int, deadly: bool) -> None:
        for place, (number, key) in enumerate(expected):
            way = self.jobs[number].units[key].way
            way.n_sent += 1
            way.sent_at = self.clock.at if place < n_taken or deadly else None

    def deliver(self, message: Message, owner: str) -> None:
        number, key = self.seen.names[message.unit_id]
        claims = []

        def write(session: Session) -> int | None:
            claim = repository.claim_unit(session, message.unit_id, owner=owner, lease_s=LEASE_S)
            claims.append(claim)
            return claim and claim.fence

        if self.do(write, lambda: self.jobs[number].claim(key, owner, self.clock.at, LEASE_S)) is not None:
            self.claims += claims

    # workers

    def find(self, claim: Claim) -> tuple[int, Key]:
        return self.seen.names[claim.unit_id]

    def unit(self, claim: Claim) -> Unit:
        number, key = self.find(claim)
        return self.jobs[number].units[key]

    def is_held(self, claim: Claim) -> bool:
        unit = self.unit(claim)
        return unit.status == "running" and unit.fence == claim.fence

    def held(self) -> list[Claim]:
        return [claim for claim in self.claims if self.is_held(claim)]

    def beat(self, claim: Claim, nbytes_done: int | None) -> None:
        """Renew the lease, or with it say how far the unit is; stop where the job no longer runs."""
        number, key = self.find(claim)

        def write(session: Session) -> str:
            if nbytes_done is None:
                return repository.renew_lease(session, claim, lease_s=LEASE_S)
            return repository.save_progress(session, claim, nbytes_done, lease_s=LEASE_S)

        lease_until = self.clock.at + LEASE_S
        status = self.do(write, lambda: self.jobs[number].beat(key, nbytes_done, lease_until))
        if status not in (None, "running"):
            self.do(
                lambda session: repository.unit_stopped(session, claim).status, lambda: self.jobs[number].stopped(key)
            )

    def pin(self, claim: Claim) -> None:
        job = self.jobs[self.find(claim)[0]]
        self.do(lambda session: repository.pin_source(session, claim, PINNED).status, lambda: job.pin(PINNED))

    def succeed(self, claim: Claim) -> None:
        number, key = self.find(claim)
        job, work, at = self.jobs[number], self.works[number], self.clock.at
        shards = [ShardWork(index, nbytes) for index, nbytes in enumerate(work.shards)]
        made = {"by": claim.fence, "unit": list(key)}
        artifacts = [{"name": "model.safetensors", "nbytes": 33, **made}]
        result = {"outputs": [made], "artifacts": artifacts}
        writes: dict[str, Callable[[Session], Any]] = {
            "plan": lambda session: repository.plan_succeeded(session, claim, shards, profile=work.profile),
            "profile": lambda session: repository.profile_succeeded(session, claim, shards, ENTRY),
            "shard": lambda session: repository.shard_succeeded(session, claim, made, nbytes_out=11),
            "finish": lambda session: repository.finish_succeeded(session, claim, artifacts=artifacts, outputs=[made]),
            "push": lambda session: repository.push_succeeded(session, claim, made),
        }
        models = {
            "plan": lambda: job.plan_succeeded(key, at, list(work.shards), work.profile),
            "profile": lambda: job.profile_succeeded(key, at, list(work.shards)),
            "shard": lambda: job.shard_succeeded(key, at, made, 11),
            "finish": lambda: job.finish_succeeded(key, at, result),
            "push": lambda: job.push_succeeded(key, at, made),
        }
        self.do(lambda session: writes[key[0]](session).status, models[key[0]])

    def fail(self, claim: Claim, *, final: bool, retry_after_s: int | None = None) -> None:
        number, key = self.find(claim)
        job = self.jobs[number]
        asked_s = min(retry_after_s or 0, RETRY_AFTER_LIMIT_S)
        wait_s = max(_backoff_s(job.units[key].attempt), asked_s)
        self.do(
            lambda session: (
                repository.unit_failed(session, claim, ERROR, final=final, retry_after_s=retry_after_s, **WAIT).status
            ),
            lambda: job.failed(key, ERROR.code, self.clock.at, final=final, wait_s=wait_s),
        )

    def hand_back(self, claim: Claim) -> None:
        number, key = self.find(claim)
        self.do(
            lambda session: repository.hand_back(session, claim).status,
            lambda: self.jobs[number].handed_back(key, self.clock.at),
        )

    def try_everything(self, claim: Claim) -> None:
        """A worker whose unit is another's, or done: each write is refused and leaves no trace."""
        for name, write in WRITES.items():
            try:
                with self.database.write() as session:
                    write(session, claim)
            except LeaseLost:
                continue
            raise AssertionError(f"{name} was taken from a worker whose unit is no longer its own")
        self.check()

    # housekeeping

    def expired(self) -> list[str]:
        """Ids of the units that the reaper finds."""
        with self.database.read() as session:
            found = repository.expired_units(session)
        names = {self.seen.names[unit_id] for unit_id in found}
        assert names == set(self._expired()), "the reaper finds what has expired"
        return sorted(found, key=self.seen.names.__getitem__)

    def _expired(self) -> Iterable[tuple[int, Key]]:
        for number, job in enumerate(self.jobs):
            for key, unit in job.units.items():
                if unit.status == "running" and unit.lease_until < self.clock.at:
                    yield number, key

    def reap(self, unit_id: str) -> None:
        """As the reaper does with what it found, maybe a while ago."""
        number, key = self.seen.names[unit_id]
        job = self.jobs[number]

        def write(session: Session) -> str | None:
            job = repository.reap_unit(session, unit_id, **WAIT)
            return job and job.status

        def expect() -> str | None:
            if (number, key) not in self._expired():
                return None
            wait_s = _backoff_s(job.units[key].attempt)
            return job.failed(key, "worker_lost", self.clock.at, final=False, wait_s=wait_s)

        self.do(write, expect)

    def restart(self, owner: str) -> None:
        """A worker of that name is back: what it held is known to be lost."""

        def expect() -> None:
            for job in self.jobs:
                for unit in job.units.values():
                    if unit.owner == owner:
                        unit.lease_until = self.clock.at - 1

        self.do(lambda session: repository.expire_units(session, owner), expect)

    # without faults

    def work(self, owner: str, *, uploads: bool = True) -> None:
        """Send what is due, take every message, and do what it says; without `uploads` the target refuses them."""
        self.dispatch()
        for message in self.take_messages():
            self.deliver(message, owner)
            for claim in self.held():
                if claim.unit_id != message.unit_id:
                    continue
                if claim.kind == "push" and not uploads:
                    self.fail(claim, final=True)
                else:
                    self.succeed(claim)

    def take_messages(self) -> list[Message]:
        messages, self.broker.messages = self.broker.messages, []
        return messages

    def end_faults(self, *, survivors: bool) -> None:
        """From here on nothing goes wrong: in one round for each phase, and one before, every job ends.

        The workers of units that run go on with them, or are lost.
        """
        self.crashes.fate = None
        for claim in self.held() if survivors else []:
            self.beat(claim, None)
            if self.is_held(claim):
                self.succeed(claim)
        for _ in invariants.PHASES:
            if all(job.status in TERMINAL for job in self.jobs):
                return
            self.clock.move(RETRY_AFTER_LIMIT_S + LEASE_S)
            for unit_id in self.expired():
                self.reap(unit_id)
            self.clock.move(RETRY_AFTER_LIMIT_S)
            self.take_messages()  # the broker is emptied once more
            while due(self.jobs, self.clock.at, REDISPATCH_S):
                self.work("last")
        stuck = [number for number, job in enumerate(self.jobs) if job.status not in TERMINAL]
        assert not stuck, f"jobs {stuck} do not end"


def _backoff_s(attempt: int) -> float:
    return min(BACKOFF_S * 2 ** (attempt - 1), BACKOFF_LIMIT_S)
