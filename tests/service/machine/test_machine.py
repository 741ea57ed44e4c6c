"""Random walks of jobs on both databases: docs/operations.md says what holds after each step."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.service.machine.machine import JobMachine


@pytest.mark.timeout(1200)  # a walk that fails is made shorter first
@pytest.mark.parametrize(("new_driver", "share"), [("sqlite", 0.5), ("postgresql", 0.25)], indirect=["new_driver"])
def test_job_is_what_the_model_says_and_ends(new_driver, share):
    n_walks = int(share * settings.default.max_examples)
    walks = settings(max_examples=n_walks, stateful_step_count=40, report_multiple_bugs=False)
    run_state_machine_as_test(lambda: JobMachine(new_driver()), settings=walks)
