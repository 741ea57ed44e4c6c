"""A short run; the long one is `make chaos`."""

from pathlib import Path

import pytest

from tests.acceptance.chaos.draws import KINDS, PHASES, POINTS, SLEEPERS, STEPS, VICTIMS, HubTrouble, Strike, draw_jobs
from tests.acceptance.chaos.report import run_chaos

SEED = 5087  # kills, sleep and a cancel, faults before and after their effect, every kind of target and of energy


@pytest.mark.timeout(900)
def test_whatever_happens_each_job_ends_once_and_nothing_is_left(tmp_path: Path) -> None:
    report = run_chaos(tmp_path, SEED, 12, patience_s=120)
    print(report)
    assert not report.wrong, str(report)
    assert report.faults
    assert report.strikes


def test_a_long_run_leaves_nothing_out() -> None:
    troubles = {trouble for draw in draw_jobs(5, 900) for trouble in draw.troubles}
    strikes = {(trouble.what, trouble.moment) for trouble in troubles if isinstance(trouble, Strike)}
    faults = {trouble for trouble in troubles if isinstance(trouble, HubTrouble)}
    assert strikes >= {(victim, moment) for victim in (*VICTIMS, *SLEEPERS) for moment in (*PHASES, *STEPS)}
    assert {fault.kind for fault in faults} == KINDS.keys()
    assert {fault.point for fault in faults} == POINTS.keys()


def test_a_seed_draws_the_same_again() -> None:
    assert draw_jobs(7, 50) == draw_jobs(7, 50) != draw_jobs(8, 50)
