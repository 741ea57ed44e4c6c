import time

import pytest
from redis import Redis

from service.common.errors import Unavailable
from service.common.queue import KEY_PREFIX, Broker, celery_config
from service.common.settings import Settings


def test_renewal_moves_a_message_being_worked_on_and_no_other(settings, redis_url):
    broker = Broker(settings)
    with Redis.from_url(redis_url) as redis:
        redis.zadd(f"{KEY_PREFIX}unacked_index", {"ours": 1.0})
        broker.renew("ours")
        broker.renew("acknowledged")
        assert redis.zscore(f"{KEY_PREFIX}unacked_index", "ours") == pytest.approx(time.time(), abs=5)
        assert redis.zscore(f"{KEY_PREFIX}unacked_index", "acknowledged") is None
    broker.close()


def test_broker_away_is_unavailable(tmp_path):
    broker = Broker(Settings(data_dir=tmp_path))
    for call in (broker.ping, broker.depth, lambda: broker.renew("tag"), lambda: broker.send("unit_1", 1)):
        with pytest.raises(Unavailable):
            call()
    broker.close()


def test_messages_are_json_and_late(settings):
    config = celery_config(settings)
    assert config["accept_content"] == config["result_accept_content"] == ["json"]
    assert config["task_acks_late"]
    assert config["task_reject_on_worker_lost"]
    assert config["worker_prefetch_multiplier"] == 1
    assert config["broker_transport_options"]["visibility_timeout"] == settings.visibility_timeout_s
