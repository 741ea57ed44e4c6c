"""What a job must be, in plain Python: no rows, no transactions. Times are seconds; who may write was settled before."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, int]
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Way:
    """To the broker: from when on, and when and how often a message went."""

    available_at: float
    sent_at: float | None = None
    n_sent: int = 0


@dataclass
class Unit:
    nbytes: int
    status: str = "queued"
    available_at: float | None = None  # while it waits
    way: Way | None = None
    attempt: int = 0
    fence: int = 0
    owner: str | None = None  # while it runs
    lease_until: float | None = None
    nbytes_done: int = 0
    nbytes_out: int = 0
    result: dict[str, Any] | None = None

    def wait(self, from_: float) -> None:
        self.status, self.available_at, self.way = "queued", from_, Way(from_)
        self.owner = self.lease_until = None

    def start(self, owner: str, lease_until: float) -> None:
        self.status, self.owner, self.lease_until = "running", owner, lease_until
        self.attempt, self.fence, self.nbytes_done = self.attempt + 1, self.fence + 1, 0
        self.available_at = self.way = None

    def end(self, status: str) -> None:
        self.status = status
        self.available_at = self.way = self.owner = self.lease_until = None


@dataclass
class Job:
    created_at: float
    priority: int
    max_attempts: int
    target: dict[str, Any] | None
    source: dict[str, Any]
    status: str = "queued"
    phase: str | None = None
    attempt: int = 0
    nbytes_done: int = 0
    nbytes_total: int | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    ended: bool = False
    units: dict[Key, Unit] = field(default_factory=dict)
    events: list[tuple[Any, ...]] = field(default_factory=list)

    def submit(self) -> None:
        self.add("plan", [0], self.created_at)
        self.move("queued")

    def claim(self, key: Key, owner: str, at: float, lease_s: float) -> int | None:
        """The fence; None where there is nothing to be had."""
        unit = self.units[key]
        if unit.status != "queued" or unit.available_at > at:
            return None
        unit.start(owner, at + lease_s)
        if self.status == "queued":
            self.move("running", "preflight")
        self.attempt = max(self.attempt, unit.attempt)
        self.log("unit_claimed")
        return unit.fence

    def beat(self, key: Key, nbytes_done: int | None, lease_until: float) -> str:
        unit = self.units[key]
        unit.lease_until = lease_until
        if nbytes_done is not None:
            unit.nbytes_done = nbytes_done
            self.count(key[0])
        return self.status

    def pin(self, source: dict[str, Any]) -> str:
        if self.source != source:
            self.source = source
            self.log("source_pinned")
        return self.status

    def plan_succeeded(self, key: Key, at: float, shards: list[int], profile: bool) -> str:
        if self.succeed(key, at):
            return self.status
        self.next("profile", [2 * sum(shards)], at) if profile else self.next("shard", shards, at)
        return self.status

    def profile_succeeded(self, key: Key, at: float, shards: list[int]) -> str:
        if self.succeed(key, at):
            return self.status
        self.log("energies_ready")
        self.next("shard", shards, at)
        return self.status

    def shard_succeeded(self, key: Key, at: float, result: dict[str, Any], nbytes_out: int) -> str:
        unit = self.units[key]
        unit.result, unit.nbytes_out = result, nbytes_out
        if self.succeed(key, at):
            return self.status
        self.count("shard")
        shards = [unit for (kind, _), unit in self.units.items() if kind == "shard"]
        if all(shard.status == "succeeded" for shard in shards):
            self.next("finish", [sum(shard.nbytes_out for shard in shards)], at)
        return self.status

    def finish_succeeded(self, key: Key, at: float, result: dict[str, Any]) -> str:
        """Without a target a cancel comes too late now."""
        if self.succeed(key, at, stoppable=self.target is not None):
            return self.status
        self.events += [("artifact", artifact["name"]) for artifact in result["artifacts"]]
        self.result = result
        if self.target is None:
            return self.end_well()
        self.next("push", [sum(artifact["nbytes"] for artifact in result["artifacts"])], at)
        return self.status

    def push_succeeded(self, key: Key, at: float, pushed: dict[str, Any]) -> str:
        self.succeed(key, at, stoppable=False)
        self.result = {**self.result, "pushed": pushed}
        return self.end_well()

    def stopped(self, key: Key) -> str:
        self.units[key].end("cancelled")
        return self.settle()

    def handed_back(self, key: Key, at: float) -> str:
        if self.status != "running":
            return self.stopped(key)
        unit = self.units[key]
        unit.wait(at)
        unit.attempt -= 1
        self.log("unit_handed_back")
        return self.status

    def failed(self, key: Key, code: str, at: float, *, final: bool, wait_s: float) -> str:
        unit = self.units[key]
        self.log("unit_failed", code)
        if self.status != "running":
            return self.stopped(key)
        if not final and unit.attempt < self.max_attempts:
            unit.wait(at + wait_s)
            return self.status
        unit.end("failed")
        self.drop_waiting()
        self.error = code
        return self.end("failed")

    def cancel(self) -> str:
        if self.status in ("succeeded", "failed"):
            return "JobTerminal"
        if self.status in ("cancelling", "cancelled"):
            return self.status
        self.drop_waiting()
        if self.status == "queued":
            return self.end("cancelled")
        self.move("cancelling")
        return self.settle()

    def retry(self, at: float, target: dict[str, Any] | None) -> str:
        upload = self.units.get(("push", 0))
        if self.status != "failed" or upload is None:
            return "JobNotRetryable"
        upload.wait(at)
        upload.attempt = upload.nbytes_done = self.nbytes_done = 0
        self.target, self.error = target or self.target, None
        self.move("running", "uploading")
        return self.status

    # what these are made of

    def succeed(self, key: Key, at: float, *, stoppable: bool = True) -> bool:
        """The unit has; True where that is all, for the job was stopped."""
        unit = self.units[key]
        unit.end("succeeded")
        if key[0] != "plan":
            unit.nbytes_done = unit.nbytes
        if stoppable and self.status != "running":
            self.settle()
            return True
        return False

    def settle(self) -> str:
        """A job that was cancelled ends with its last running unit, and its result is gone."""
        if self.status == "cancelling" and not any(unit.status == "running" for unit in self.units.values()):
            self.result = None
            self.end("cancelled")
        return self.status

    def next(self, kind: str, work: list[int], at: float) -> None:
        phases = {"profile": "profiling", "shard": "quantizing", "finish": "verifying", "push": "uploading"}
        self.nbytes_done, self.nbytes_total = 0, sum(work)
        self.move(self.status, phases[kind])
        self.add(kind, work, at)

    def add(self, kind: str, work: Iterable[int], at: float) -> None:
        for index, nbytes in enumerate(work):
            self.units[kind, index] = unit = Unit(nbytes)
            unit.wait(at)

    def count(self, kind: str) -> None:
        """How far the phase has come: never back, and told once for each percent."""
        done = sum(unit.nbytes_done for (each, _), unit in self.units.items() if each == kind)
        if self.status != "running" or done <= self.nbytes_done:
            return
        told, self.nbytes_done = self.percent, done
        if self.percent > told:
            self.events.append(("progress", done, self.nbytes_total))

    @property
    def percent(self) -> int:
        return 100 * self.nbytes_done // self.nbytes_total if self.nbytes_total else 0

    def drop_waiting(self) -> None:
        for unit in self.units.values():
            if unit.status == "queued":
                unit.end("cancelled")

    def end_well(self) -> str:
        if self.status == "cancelling":
            self.log("cancel_too_late")
        self.nbytes_done = self.nbytes_total or 0
        return self.end("succeeded")

    def end(self, status: str) -> str:
        self.move(status)
        self.events.append(("done", status))
        return status

    def move(self, status: str, phase: str | None = None) -> None:
        self.status, self.phase = status, phase or self.phase
        self.ended = status in TERMINAL
        self.events.append(("status", self.status, self.phase))

    def log(self, *said: str) -> None:
        self.events.append(("log", *said))


def due(jobs: Iterable[Job], at: float, redispatch_s: float) -> list[tuple[int, Key]]:
    """Numbers of jobs and units that are to be sent, the most urgent first."""
    waiting = [(number, job, key, unit.way) for number, job in enumerate(jobs) for key, unit in job.units.items()]
    ready = [
        (-job.priority, job.created_at, key, number)
        for number, job, key, way in waiting
        if way and way.available_at <= at and (way.sent_at is None or way.sent_at < at - redispatch_s)
    ]
    return [(number, key) for _, _, key, number in sorted(ready)]
