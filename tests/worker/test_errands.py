"""What is done ahead, beside a unit: real threads and rows."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hqq_core.errors import Cancelled
from service.common.models import Job
from tests.worker.conftest import Foreman
from worker.errands import Errands, Look
from worker.workplace import Workplace


@pytest.fixture
def job(foreman: Foreman, source: Path) -> Job:
    job = foreman.submit(source)
    foreman.run_next()
    return job


@pytest.fixture
def prefetcher(workplace: Workplace) -> Errands:
    return workplace.prefetcher


class Endless:
    """An errand that ends only when it is told to, and knows how it did."""

    def __init__(self) -> None:
        self.begun, self.cancelled, self.let_go = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, look: Look) -> bool:
        self.begun.set()
        while not self.let_go.wait(0.01):
            try:
                look()
            except Cancelled:
                self.cancelled.set()
                raise
        return False


def happens(event: threading.Event) -> bool:
    return event.wait(30)


def test_errand_is_run_again_while_there_is_work(prefetcher: Errands, job: Job) -> None:
    left, done = [3, 2, 1], threading.Event()

    def errand(look: Look) -> bool:
        if left:
            left.pop()
            return True
        done.set()
        return False

    with prefetcher.during(job.id, errand):
        assert happens(done)
    assert left == []


def test_what_is_in_work_at_the_end_of_a_unit_goes_on(prefetcher: Errands, job: Job) -> None:
    errand = Endless()
    with prefetcher.during(job.id, errand):
        assert happens(errand.begun)
    following = Endless()
    with prefetcher.during(job.id, following):
        assert not following.begun.is_set()
        errand.let_go.set()
        assert happens(following.begun)
        following.let_go.set()
    assert not errand.cancelled.is_set()


def test_unit_that_breaks_takes_its_errand_along(prefetcher: Errands, job: Job) -> None:
    errand = Endless()

    def broken() -> None:
        with prefetcher.during(job.id, errand):
            assert happens(errand.begun)
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        broken()
    assert errand.cancelled.is_set()


def test_cancel_of_the_job_ends_it(prefetcher: Errands, foreman: Foreman, job: Job) -> None:
    errand = Endless()
    with prefetcher.during(job.id, errand):
        assert happens(errand.begun)
    foreman.cancel(job)
    assert happens(errand.cancelled)


def test_closed_workplace_ends_it(prefetcher: Errands, workplace: Workplace, job: Job) -> None:
    errand = Endless()
    with prefetcher.during(job.id, errand):
        assert happens(errand.begun)
    workplace.close()
    assert errand.cancelled.is_set()


@pytest.mark.parametrize("make_error", [OSError, ValueError])
def test_what_fails_ahead_is_left_to_the_unit(
    prefetcher: Errands, job: Job, make_error: Callable[[str], Exception]
) -> None:
    failed = threading.Event()

    def broken(look: Look) -> bool:
        failed.set()
        raise make_error("broken")

    with prefetcher.during(job.id, broken):
        assert happens(failed)
    errand = Endless()
    with prefetcher.during(job.id, errand):
        assert happens(errand.begun)
        errand.let_go.set()


def test_settled_when_what_is_in_work_has_come_to_its_end(prefetcher: Errands, job: Job) -> None:
    prefetcher.settle(job.id, lambda: pytest.fail("nothing is in work"))
    errand, looked = Endless(), threading.Event()
    with prefetcher.during(job.id, errand):
        assert happens(errand.begun)
    prefetcher.settle("another job", lambda: pytest.fail("nothing of that job is in work"))

    def look() -> None:
        looked.set()
        errand.let_go.set()

    prefetcher.settle(job.id, look)
    assert looked.is_set()
    assert not errand.cancelled.is_set()


def test_who_stops_waiting_ends_what_is_in_work(prefetcher: Errands, job: Job) -> None:
    errand = Endless()
    with prefetcher.during(job.id, errand):
        assert happens(errand.begun)

    def look() -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        prefetcher.settle(job.id, look)
    assert errand.cancelled.is_set()
