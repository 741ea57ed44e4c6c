import json

import pytest
from redis import Redis

from service.common import repository
from service.common.errors import Unavailable
from service.common.outbox import dispatch
from service.common.queue import KEY_PREFIX, QUEUE, TASK, Broker
from service.common.settings import Settings


@pytest.fixture
def broker(settings):
    broker = Broker(settings)
    yield broker
    broker.close()


def bodies(redis_url):
    with Redis.from_url(redis_url) as redis:
        return [json.loads(message) for message in redis.lrange(KEY_PREFIX + QUEUE, 0, -1)]


def test_broker_holds_ids_only(database, hand, broker, settings, redis_url):
    hand.insert()
    assert dispatch(database, broker, settings) == 1
    (message,) = bodies(redis_url)
    assert message["headers"]["task"] == TASK
    assert "path" not in message["headers"]["kwargsrepr"]
    assert dispatch(database, broker, settings) == 0


def test_broker_holds_no_more_than_workers_take_soon(database, hand, broker, settings, redis_url):
    for _ in range(9):
        hand.insert()
    assert dispatch(database, broker, settings) == 2
    with database.write() as session:
        repository.worker_seen(session, "one", ttl_s=60)
        repository.worker_seen(session, "two", ttl_s=60)
    assert dispatch(database, broker, settings) == 4
    assert broker.depth() == len(bodies(redis_url)) == 6


def test_emptied_broker_is_filled_again(database, hand, broker, settings, redis_url):
    hand.insert()
    dispatch(database, broker, settings)
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
    soon = settings.model_copy(update={"redispatch_s": -1})
    assert dispatch(database, broker, settings) == 0
    assert dispatch(database, broker, soon) == 1


def test_broker_away_leaves_units_due(database, hand, settings, tmp_path):
    hand.insert()
    away = Settings(data_dir=tmp_path / "nobody")
    broker = Broker(away)
    with pytest.raises(Unavailable, match="broker"):
        dispatch(database, broker, away)
    broker.close()
    assert len(hand.due(redispatch_s=60)) == 1


def test_broker_lost_while_sending_gives_units_back(database, hand, broker, settings, monkeypatch):
    for _ in range(2):
        hand.insert()

    def refuse(unit_id, dispatch_seq):
        raise Unavailable("gone between the two")

    monkeypatch.setattr(broker, "send", refuse)
    with pytest.raises(Unavailable, match="gone"):
        dispatch(database, broker, settings)
    assert len(hand.due(redispatch_s=60)) == 2
