"""Random walks over the job table: whatever workers, users and the reaper do, the rows stay sound and the job ends."""

import tempfile
from datetime import timedelta
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select, update

from service.common import repository
from service.common.errors import JobError, JobNotRetryable, JobTerminal, LeaseLost
from service.common.models import Job, Outbox, Unit
from service.common.repository import ShardWork
from service.common.schema import migrate
from service.common.session import Database
from service.common.status import MOVES, TERMINAL, JobStatus, Phase, UnitKind, UnitStatus

ERROR = JobError("broken", "system", "it broke", True)
WAIT = {"backoff_s": 0.0, "backoff_limit_s": 0.0}
picks = st.integers(0, 7)


class JobTable(RuleBasedStateMachine):
    """One job; claims may be held by zombies whose unit was reaped."""

    @initialize(
        n_shards=st.integers(1, 3),
        profile=st.booleans(),
        begin=st.sampled_from(["plan", "plan to push", "push", "failed push"]),
    )
    def submit(self, n_shards, profile, begin):
        self.folder = tempfile.TemporaryDirectory()
        self.database = Database(f"sqlite:///{Path(self.folder.name) / 'halfquad.db'}")
        migrate(self.database)
        self.shards = [ShardWork(i, 10) for i in range(n_shards)]
        self.profile = profile
        self.claims = []
        self.seen = JobStatus.QUEUED
        self.retries = 0
        with self.database.write() as session:
            self.job_id = repository.insert_job(
                session,
                source={},
                recipes=[{}],
                target={"repo_id": "acme/tiny"} if begin != "plan" else None,
                labels={},
                priority=5,
                max_attempts=2,
            ).id

        if begin in ("push", "failed push"):  # a walk seldom gets there by itself
            while not self.uploading():
                self.claim()
                self.succeed(0)
        if begin == "failed push":
            self.claim()
            self.fail(0, final=True)

    def uploading(self):
        with self.database.read() as session:
            return session.get(Job, self.job_id).phase == Phase.UPLOADING

    def teardown(self):
        if hasattr(self, "database"):
            self.drain()
            self.retry()
            self.rows_are_sound()
            self.drain()
            self.database.close()
            self.folder.cleanup()

    @rule()
    def claim(self):
        with self.database.write() as session:
            for message in repository.take_due(session, limit=1, redispatch_s=-1):
                claim = repository.claim_unit(session, message.unit_id, owner="w", lease_s=60)
                self.claims += [claim] if claim else []

    def take(self, pick):
        return self.claims.pop(pick % len(self.claims))

    def write(self, act, claim):
        """True unless the claim was a zombie's, and then nothing was written."""
        try:
            with self.database.write() as session:
                act(session, claim)
        except LeaseLost:
            return False
        return True

    @precondition(lambda self: self.claims)
    @rule(pick=picks)
    def succeed(self, pick):
        def act(session, claim):
            match claim.kind:
                case UnitKind.PLAN:
                    repository.plan_succeeded(session, claim, self.shards, profile=self.profile)
                case UnitKind.PROFILE:
                    repository.profile_succeeded(session, claim, self.shards, {})
                case UnitKind.SHARD:
                    repository.shard_succeeded(session, claim, {}, nbytes_out=5)
                case UnitKind.FINISH:
                    repository.finish_succeeded(session, claim, artifacts=[], outputs=[])
                case UnitKind.PUSH:
                    repository.push_succeeded(session, claim, {"url": "https://hub.example/acme/tiny"})

        self.write(act, self.take(pick))

    @precondition(lambda self: self.claims)
    @rule(pick=picks, final=st.booleans())
    def fail(self, pick, final):
        self.write(
            lambda session, claim: repository.unit_failed(session, claim, ERROR, final=final, **WAIT), self.take(pick)
        )

    @precondition(lambda self: self.claims)
    @rule(pick=picks)
    def hand_back(self, pick):
        self.write(repository.hand_back, self.take(pick))

    @precondition(lambda self: self.claims)
    @rule(pick=picks, nbytes=st.integers(0, 10))
    def look(self, pick, nbytes):
        claim = self.claims[pick % len(self.claims)]

        def act(session, claim):
            if repository.save_progress(session, claim, nbytes, lease_s=60) != JobStatus.RUNNING:
                repository.unit_stopped(session, claim)

        if not self.write(act, claim):
            self.claims.remove(claim)

    @precondition(lambda self: self.claims)
    @rule(pick=picks)
    def lose(self, pick):
        """The worker is silent; it may come back as a zombie."""
        claim = self.claims[pick % len(self.claims)]
        with self.database.write() as session:
            past = repository.now(session) - timedelta(seconds=1)
            session.execute(
                update(Unit).where(Unit.id == claim.unit_id, Unit.fence == claim.fence).values(lease_expires_at=past)
            )

    @rule()
    def reap(self):
        with self.database.read() as session:
            expired = repository.expired_units(session)
        for unit_id in expired:
            with self.database.write() as session:
                repository.reap_unit(session, unit_id, **WAIT)

    @rule()
    def cancel(self):
        try:
            with self.database.write() as session:
                repository.cancel_job(session, self.job_id)
        except JobTerminal:
            assert self.seen in (JobStatus.SUCCEEDED, JobStatus.FAILED)

    @rule()
    def retry(self):
        try:
            with self.database.write() as session:
                repository.retry_upload(session, self.job_id)
        except JobNotRetryable:
            return
        assert self.seen == JobStatus.FAILED
        self.retries += 1

    def drain(self):
        """Nobody disturbs any more: dead workers are reaped, a live one does what is left."""
        for _ in range(50):
            if self.seen in TERMINAL:
                return
            for i in range(len(self.claims)):
                self.lose(i)
            self.claims = []
            self.reap()
            self.claim()
            while self.claims:
                self.succeed(0)
            self.rows_are_sound()
        raise AssertionError(f"the job stays {self.seen}")

    @invariant()
    def rows_are_sound(self):
        if not hasattr(self, "database"):
            return
        with self.database.read() as session:
            job = session.get(Job, self.job_id)
            units = session.scalars(select(Unit)).all()
            waiting = set(session.scalars(select(Outbox.unit_id)))
            events = repository.list_events(session, job.id)
            kept = not repository.discarded_jobs(session, [job.id])
        assert job.status in reachable(self.seen)
        self.seen = job.status
        assert [event.seq for event in events] == list(range(1, job.event_seq + 1))
        assert [event.type for event in events].count("done") == (job.status in TERMINAL) + self.retries
        assert waiting == {unit.id for unit in units if unit.status == UnitStatus.QUEUED}
        assert all(unit.attempt <= job.max_attempts for unit in units)
        assert all(
            sum(unit.kind == kind for unit in units) <= 1 for kind in (UnitKind.PROFILE, UnitKind.FINISH, UnitKind.PUSH)
        )
        live = [unit for unit in units if unit.status in (UnitStatus.QUEUED, UnitStatus.RUNNING)]
        match job.status:
            case JobStatus.QUEUED | JobStatus.RUNNING:
                assert live
            case JobStatus.CANCELLING:
                assert live
                assert all(unit.status == UnitStatus.RUNNING for unit in live)
            case JobStatus.SUCCEEDED:
                assert all(unit.status == UnitStatus.SUCCEEDED for unit in units)
                assert ("pushed" in job.result) == (job.target is not None)
            case JobStatus.FAILED | JobStatus.CANCELLED:
                assert not waiting
                assert job.result is None or kept
        uploads = [unit for unit in units if unit.kind == UnitKind.PUSH]
        whole = job.status == JobStatus.SUCCEEDED or (uploads and job.status != JobStatus.CANCELLED)
        assert (job.result is not None) == bool(whole)
        assert job.finished_at is None or job.status in TERMINAL


def reachable(earlier):
    reached = {earlier}
    while further := {onward for status in reached for onward in MOVES[status]} - reached:
        reached |= further
    return reached


TestJobTable = JobTable.TestCase
TestJobTable.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
