"""Which units go out, and in what order."""

from dataclasses import replace

from sqlalchemy import select

from service.common import repository
from service.common.models import Unit
from tests.service.conftest import in_threads


def owners_of(database, unit_ids):
    """Names of the jobs' owners, by unit."""
    with database.read() as session:
        return [repository.get_job(session, session.get(Unit, unit_id).job_id).owner for unit_id in unit_ids]


def test_urgent_units_go_first_then_the_oldest(database, hand):
    low, first, second, high = (hand.insert(priority=p).id for p in (1, 5, 5, 9))
    with database.read() as session:
        owners = dict(session.execute(select(Unit.id, Unit.job_id)).all())
    assert [owners[unit_id] for unit_id in hand.due()] == [high, first, second, low]


def test_sent_unit_is_due_again_only_after_a_while(hand):
    hand.insert()
    assert len(hand.due(redispatch_s=30)) == 1
    assert hand.due(redispatch_s=30) == []
    assert len(hand.due(redispatch_s=-1)) == 1


def test_two_dispatchers_take_different_units(database, hand):
    for _ in range(8):
        hand.insert()
    taken = in_threads(4, lambda _: hand.due(limit=2, redispatch_s=30))
    flat = [unit_id for unit_ids in taken for unit_id in unit_ids]
    assert len(flat) == len(set(flat))


def test_unit_the_broker_refused_is_due_again(database, hand):
    hand.insert()
    with database.write() as session:
        (message,) = repository.take_due(session, limit=5, redispatch_s=30)
    with database.write() as session:
        repository.give_back(session, replace(message, dispatch_seq=message.dispatch_seq - 1))
    assert hand.due(redispatch_s=30) == []  # another dispatcher has sent it since
    with database.write() as session:
        repository.give_back(session, message)
    assert len(hand.due(redispatch_s=30)) == 1


def test_owners_of_one_priority_take_turns(database, hand):
    for owner in ("a", "a", "a", "a", "b", "c", "c"):
        hand.insert(owner=owner)
    assert owners_of(database, hand.due()) == ["a", "b", "c", "a", "c", "a", "a"]


def test_who_has_units_at_work_waits_for_who_has_none(database, hand):
    for owner in ("a", "a", "a"):
        hand.insert(owner=owner)
    hand.claim()
    hand.due(limit=1, redispatch_s=30)
    for owner in ("b", "b", "b", "b"):
        hand.insert(owner=owner)
    assert owners_of(database, hand.due(redispatch_s=30)) == ["b", "b", "b", "a", "b"]


def test_a_turn_does_not_outdo_a_priority(database, hand):
    for owner, priority in (("a", 9), ("a", 9), ("b", 5), ("a", 9)):
        hand.insert(owner=owner, priority=priority)
    assert owners_of(database, hand.due()) == ["a", "a", "a", "b"]


def test_what_is_urgent_to_an_owner_takes_its_turns_first(database, hand):
    for owner, priority in (("a", 5), ("a", 9), ("b", 5)):
        hand.insert(owner=owner, priority=priority)
    assert owners_of(database, hand.due()) == ["a", "b", "a"]


def test_with_more_owners_than_workers_each_has_its_turn(hand):
    """An owner whose unit has ended is not first again because its jobs are older."""
    for owner in "abcdefg":
        for _ in range(3):
            hand.insert(owner=owner)
    served = [hand.fail().owner for _ in range(14)]
    assert sorted(served[:7]) == sorted(served[7:]) == list("abcdefg")


def test_an_owner_that_comes_later_is_served_before_those_that_were(hand):
    for owner in "aabb":
        hand.insert(owner=owner)
    assert [hand.fail().owner, hand.fail().owner] == ["a", "b"]
    hand.insert(owner="c")
    assert [hand.fail().owner for _ in range(3)] == ["c", "a", "b"]
