"""A walk: users, workers, a broker and housekeeping do what they can and what befalls them, in any order."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from service.common.repository import Claim, Message
from tests.service.machine.crashes import UNHEARD
from tests.service.machine.driver import Driver, Work
from tests.service.machine.model import TERMINAL

N_JOBS, N_AT_ONCE = 9, 3
HUB, ELSEWHERE = {"repo_id": "acme/tiny"}, {"repo_id": "acme/tiny-again"}
picks = st.integers(0, 7)
owners = st.sampled_from(["one", "two"])
outcomes = st.sampled_from(["succeed", "succeed", "fail", "hand back", "renew"])
ANOTHER = {
    "shards": (300, 10, 1),
    "profile": False,
    "upload": "some day",
    "priority": 5,
    "max_attempts": 2,
}
submissions = st.fixed_dictionaries(
    {
        "shards": st.sampled_from([(10,), (300, 10), (10, 300, 1)]),
        "profile": st.booleans(),
        "upload": st.sampled_from(["none", "some day", "refused at once"]),
        "priority": st.integers(0, 9),
        "max_attempts": st.integers(1, 3),
        "n_rounds": st.sampled_from([0, 1, 1, 2, 2, 3, 4, 4]),
    }
)
steps = st.one_of(
    st.tuples(st.just("submit"), submissions),
    st.tuples(st.just("ask"), st.sampled_from(["cancel", "retry", "retry elsewhere"]), picks),
    st.tuples(st.just("retry_failed"), picks),
    st.tuples(st.just("dispatch"), st.sampled_from([0, 400]), st.integers(0, 2), st.booleans()),
    st.tuples(st.just("deliver"), picks, owners, st.sampled_from(["taken", "taken and kept", "lost"])),
    st.tuples(st.just("echo"), picks, owners),
    st.tuples(st.just("take_work"), owners),
    st.tuples(st.just("succeed_with_all"), owners),
    st.tuples(st.just("say"), picks, st.sampled_from(["succeed", "succeed", "hand back", "pin", "renew"])),
    st.tuples(st.just("progress"), picks, st.sampled_from([0.5, 0.1, 0, 0.9, 1])),
    st.tuples(st.just("fail"), picks, st.booleans(), st.sampled_from([None, 550, 99_999])),
    st.tuples(st.just("cancel_in_flight"), picks, outcomes),
    st.tuples(st.just("sleep_through_lease"), picks),
    st.tuples(st.just("come_back"), picks, st.sampled_from([0, 1, 100])),
    st.tuples(st.just("reap_late"), picks, st.sampled_from(["renew", "succeed", "hand back"])),
    st.tuples(st.just("reap"), st.sampled_from([0, 400])),
    st.tuples(st.just("restart"), owners),
    st.tuples(st.just("doom"), st.sampled_from([UNHEARD, 0, 1, 2, 3, 5, 99])),
    st.tuples(
        st.just("let_time_pass"), st.sampled_from([400, 1000, 100, 200, -100]), st.sampled_from([0, -86_400, 86_400])
    ),
)


class JobMachine(RuleBasedStateMachine):
    """Whatever happens, each job is what the model says, and ends.

    All steps are one rule: of several, Hypothesis leaves some out of each walk, and what a fault needs would seldom meet.
    """

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    @initialize(survivors=st.booleans(), submission=submissions)
    def begin(self, survivors, submission):
        self.survivors = survivors
        self.submit(submission)

    @rule(step=steps)
    def step(self, step):
        name, *drawn = step
        getattr(self, name)(*drawn)

    def teardown(self):
        if self.driver.sound:
            self.driver.end_faults(survivors=self.survivors)

    # users

    def submit(self, submission: dict[str, Any]) -> None:
        """A walk seldom brings a job to its end by itself, so some go a part of the way at once."""
        jobs, asked = self.driver.jobs, dict(submission)
        if len(jobs) == N_JOBS or sum(job.status not in TERMINAL for job in jobs) == N_AT_ONCE:
            return
        work = Work(asked.pop("shards"), asked.pop("profile"))
        upload, n_rounds = asked.pop("upload"), asked.pop("n_rounds")
        self.driver.submit(work, target=HUB if upload != "none" else None, **asked)
        refused = upload == "refused at once"
        for _ in range(5 if refused else n_rounds):
            self.driver.work("early", uploads=not refused)

    def ask(self, act: str, pick: int) -> None:
        """Of any job, whether it can be had or not."""
        number = _pick(range(len(self.driver.jobs)), pick)
        if number is None:  # the process that submitted it died
            return
        if act == "cancel":
            self.driver.cancel(number)
        else:
            self.driver.retry(number, ELSEWHERE if act == "retry elsewhere" else None)

    def retry_failed(self, pick: int) -> None:
        failed = [number for number, job in enumerate(self.driver.jobs) if job.status == "failed"]
        if failed:
            self.driver.retry(_pick(failed, pick), None)

    # the broker

    def dispatch(self, after_s: int, patience: int, deadly: bool) -> None:
        """A broker that was emptied takes so many messages and is gone, or the sender is."""
        if all(job.status in TERMINAL for job in self.driver.jobs):
            self.submit(ANOTHER | {"n_rounds": 1})
        self.driver.clock.move(after_s)
        self.driver.take_messages()
        self.driver.dispatch(patience=patience, deadly=deadly)

    def deliver(self, pick: int, owner: str, fate: str) -> None:
        """One message, the oldest or not."""
        message = _pick(self.driver.broker.messages, pick)
        if message and fate != "taken and kept":
            self.driver.broker.messages.remove(message)
        if message and fate != "lost":
            self.driver.deliver(message, owner)

    def echo(self, pick: int, owner: str) -> None:
        """A message that was long taken comes once more: its unit runs, waits for its time, or is done."""
        units = {
            unit_id: self.driver.jobs[number].units[key] for unit_id, (number, key) in self.driver.seen.names.items()
        }
        started = [unit_id for unit_id, unit in units.items() if unit.fence]
        lively = [unit_id for unit_id in started if units[unit_id].status in ("queued", "running")]
        if unit_id := _pick(lively or started, pick):
            self.driver.deliver(Message(unit_id, 1), owner)

    def take_work(self, owner: str) -> None:
        """All goes well from the outbox to a worker, which then has units in hand."""
        self.driver.dispatch()
        for message in self.driver.take_messages():
            self.driver.deliver(message, owner)

    # workers

    def in_hand(self, pick: int) -> Claim | None:
        """A claim that holds; a worker without one waits for a message, or for all that there are."""
        if not self.driver.held():
            if all(job.status in TERMINAL for job in self.driver.jobs):
                self.submit(ANOTHER | {"n_rounds": pick % 5})
            self.reap(1000)
            self.driver.dispatch()
            for _ in self.driver.broker.messages[: 1 if pick % 2 else None]:
                self.deliver(0, "one", "taken")
        return _pick(self.driver.held(), pick)

    def act(self, claim: Claim, what: str) -> None:
        match what:
            case "succeed":
                self.driver.succeed(claim)
            case "fail":
                self.driver.fail(claim, final=True)
            case "hand back":
                self.driver.hand_back(claim)
            case "pin":
                self.driver.pin(claim)
            case "renew":
                self.driver.beat(claim, None)

    def say(self, pick: int, what: str) -> None:
        if claim := self.in_hand(pick):
            self.act(claim, what)

    def succeed_with_all(self, owner: str) -> None:
        """Of units that run at once the last to begin is the first to end."""
        self.take_work(owner)
        for claim in reversed(self.driver.held()):
            self.driver.succeed(claim)

    def progress(self, pick: int, share: float) -> None:
        if claim := self.in_hand(pick):
            self.tell(claim, share)

    def tell(self, claim: Claim, share: float) -> None:
        """How far the unit is: within a start it does not go back."""
        unit = self.driver.unit(claim)
        self.driver.beat(claim, max(unit.nbytes_done, int(share * unit.nbytes)))

    def fail(self, pick: int, final: bool, retry_after_s: int | None) -> None:
        if claim := self.in_hand(pick):
            self.driver.fail(claim, final=final, retry_after_s=retry_after_s)

    def cancel_in_flight(self, pick: int, outcome: str) -> None:
        """A cancel meets a unit that runs, of the newest job, which ends in its own way."""
        self.submit(ANOTHER | {"n_rounds": (1, 3, 4)[pick % 3], "priority": 9})
        self.take_work("one")
        claim = max(self.driver.held(), key=self.driver.find, default=None)
        if claim is None:
            return
        self.driver.cancel(self.driver.find(claim)[0])
        if self.driver.is_held(claim):
            self.act(claim, outcome)

    def sleep_through_lease(self, pick: int) -> None:
        """The unit begins again with another worker, and then the first one wakes."""
        claim = self.in_hand(pick)
        if claim is None:
            return
        self.tell(claim, 0.9)
        self.reap(400)
        self.driver.clock.move(1000)
        self.take_work("two")
        for other in self.driver.held():
            if other.unit_id == claim.unit_id:
                self.tell(other, 0.1)
        self.come_back_as(claim)

    def come_back(self, pick: int, guess: int) -> None:
        """A worker that has lost a unit, or never heard that it was done; or one with a fence that nobody has."""
        if claim := _pick(self.driver.claims, pick):
            self.come_back_as(replace(claim, fence=claim.fence + guess))

    def come_back_as(self, claim: Claim) -> None:
        if not self.driver.is_held(claim):
            self.driver.try_everything(claim)

    # what befalls them

    def reap(self, after_s: int) -> None:
        self.driver.clock.move(after_s)
        for unit_id in self.driver.expired():
            self.driver.reap(unit_id)

    def reap_late(self, pick: int, act: str) -> None:
        """Between the reaper's look and its hand a worker comes back."""
        claim = self.in_hand(pick)
        self.driver.clock.move(400)
        found = self.driver.expired()
        if claim:
            self.act(claim, act)
        for unit_id in found:
            self.driver.reap(unit_id)

    def restart(self, owner: str) -> None:
        self.driver.restart(owner)

    def doom(self, fate: int) -> None:
        """Whoever writes next dies at its write of this number, at its commit, or before it hears that it is committed."""
        self.driver.crashes.fate = fate

    def let_time_pass(self, by_s: int, skew_s: int) -> None:
        """The clock that all share may be set back; a worker's own is wrong, and where the database has one nobody may ask it."""
        self.driver.clock.move(by_s)
        self.driver.clock.skew_s = skew_s


def _pick(things: Any, pick: int) -> Any:
    return things[pick % len(things)] if things else None
