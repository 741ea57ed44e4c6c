from hypothesis import given
from hypothesis import strategies as st

from service.common.status import DISCARDED, MOVES, TERMINAL, JobStatus, leading_to

statuses = st.sampled_from(JobStatus)


def test_every_status_has_its_moves():
    assert set(MOVES) == set(JobStatus)
    assert {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED} == TERMINAL
    assert DISCARDED < TERMINAL
    assert {status for status in TERMINAL if MOVES[status]} == {JobStatus.FAILED}, "a retry"


@given(statuses, statuses)
def test_leading_to_is_the_table_read_backwards(earlier, later):
    assert (earlier in leading_to(later)) == (later in MOVES[earlier])


def test_every_status_leads_to_an_end():
    reached = set(TERMINAL)
    for _ in JobStatus:
        reached |= {status for status, onward in MOVES.items() if onward & reached}
    assert reached == set(JobStatus)
