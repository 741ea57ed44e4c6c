"""What holds after every write, whatever the model says. The tables are docs/api.md's and the ADRs', not the code's."""

from dataclasses import replace

from tests.service.machine.model import TERMINAL, Job, Unit
from tests.service.machine.rows import Rows

JOB_MOVES = {
    None: {"queued"},
    "queued": {"running", "cancelled"},
    "running": {"cancelling", "succeeded", "failed"},
    "cancelling": {"cancelled", "succeeded"},  # succeeded where the cancel came too late
    "failed": {"running"},  # a retry of the upload
    "succeeded": set(),
    "cancelled": set(),
}
UNIT_MOVES = {
    "queued": {"running", "cancelled"},
    "running": {"queued", "succeeded", "failed", "cancelled"},
    "failed": {"queued"},  # a retry of the upload
    "succeeded": set(),
    "cancelled": set(),
}
PHASES = [None, "preflight", "profiling", "quantizing", "verifying", "uploading"]


def check(before: Rows, after: Rows, at: float) -> None:
    for number, job in enumerate(after.jobs):
        assert after.numbers[number] == list(range(1, len(job.events) + 1)), "events are numbered without a gap"
        check_moves(job)
        check_progress(job)
        check_live_units(job)
        check_files(job, number in after.discarded)
        for unit in job.units.values():
            check_unit(unit, job)
        if number < len(before.jobs):
            check_change(before.jobs[number], job, at)
            changed = without_units(before.jobs[number]) != without_units(job)
            assert after.versions[number] - before.versions[number] >= changed, (
                "a job was changed without a new version"
            )


def without_units(job: Job) -> Job:
    return replace(job, units={}, events=[])


def check_moves(job: Job) -> None:
    """The events tell every move, and each is one of the table's; a phase follows an earlier one; an end is told once."""
    status, phase = None, None
    for number, (type, *data) in enumerate(job.events):
        if type == "done":
            assert data[0] == status, "done tells how the job stands"
            assert job.events[number - 1][:2] == ("status", status), "done follows the end at once"
        if type != "status":
            continue
        onward, following = data
        assert onward in JOB_MOVES[status] or (onward == status and following != phase), f"{status} became {onward}"
        assert PHASES.index(following) >= PHASES.index(phase), f"{phase} came before {following}"
        assert onward != status or status == "running", f"a phase began while {status}"
        status, phase = onward, following
    assert (status, phase) == (job.status, job.phase), "the last status event is how the job stands"
    done = [event for event in job.events if event[0] == "done"]
    ends = [event for event in job.events if event[0] == "status" and event[1] in TERMINAL]
    assert len(done) == len(ends), "every end is told as done"


def check_progress(job: Job) -> None:
    """Within one go at a phase it only grows, at most one event for each percent, and never beyond the whole."""
    told = -1
    for type, *data in job.events:
        if type == "status":
            told = -1
        if type == "progress":
            done, total = data
            assert 100 * done // total > told, f"{100 * done // total} % was told after {told} %"
            assert done <= total, "more than all of it is done"
            told = 100 * done // total


def check_live_units(job: Job) -> None:
    """A job that has not ended has somebody to bring it on; one that has ended has nothing that waits."""
    statuses = [unit.status for unit in job.units.values()]
    match job.status:
        case "queued" | "running":
            assert {"queued", "running"} & set(statuses), f"a {job.status} job has no unit that waits or runs"
        case "cancelling":
            assert "running" in statuses, "a job is cancelling and nothing runs"
            assert "queued" not in statuses, "a unit waits in a job that is cancelling"
        case "succeeded":
            assert set(statuses) == {"succeeded"}, "a job succeeded without one of its units"
            assert ("pushed" in job.result) == (job.target is not None), "the result is where it was to go"
        case _:
            assert "queued" not in statuses, f"a unit waits in a {job.status} job"
    assert (job.error is not None) == (job.status == "failed"), "an error is a failed job's"


def check_files(job: Job, may_go: bool) -> None:
    """They go with a job that was cancelled or has failed without a whole result, and not while somebody may write."""
    is_lost = job.status == "cancelled" or (job.status == "failed" and job.result is None)
    is_busy = any(unit.status == "running" for unit in job.units.values())
    assert may_go == (is_lost and not is_busy), "the files of a job go when they must, and only then"


def check_unit(unit: Unit, job: Job) -> None:
    assert (unit.way is not None) == (unit.status == "queued"), f"a {unit.status} unit and the outbox: {unit.way}"
    assert unit.way is None or unit.way.available_at == unit.available_at, "a message is due before its unit, or after"
    assert 0 <= unit.attempt <= job.max_attempts, f"start {unit.attempt} of {job.max_attempts}"
    assert unit.attempt <= unit.fence, "a start without a fence"
    assert (unit.lease_until is not None) == (unit.status == "running"), "a lease is a running unit's"


def check_change(before: Job, after: Job, at: float) -> None:
    """One write on: the past stays, results stay, and units move along their table."""
    assert after.events[: len(before.events)] == before.events, "the past was changed"
    assert before.status not in ("succeeded", "cancelled") or after == before, f"a {before.status} job was changed"
    if before.result is not None:
        kept = {name: value for name, value in (after.result or {}).items() if name in before.result}
        gone = after.result is None and after.status == "cancelled"
        assert gone or kept == before.result, "the result was changed"
    new_events = after.events[len(before.events) :]
    for key, unit in before.units.items():
        check_unit_change(unit, after.units[key], key[0] == "push")
        if ("log", "unit_failed", "worker_lost") in new_events and unit != after.units[key]:
            assert unit.status != "running" or unit.lease_until < at, "a unit was taken from a live lease"


def check_unit_change(before: Unit, after: Unit, is_push: bool) -> None:
    status, onward = before.status, after.status
    assert status == onward or onward in UNIT_MOVES[status], f"a unit that was {status} is {onward}"
    assert (status, onward) != ("failed", "queued") or is_push, "only uploads are retried"
    assert before.result is None or after.result == before.result, "a unit's result was written twice"
    starts = (status, onward) == ("queued", "running")
    assert after.fence - before.fence == starts, "a fence is for one claim"
    assert starts or after.owner in (before.owner, None), "a unit has two owners"
    if status == onward == "running":
        assert after.attempt == before.attempt, "a start was counted twice"
