"""The broker: Celery's settings, and messages that hold ids only."""

import time
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from service.common.errors import Unavailable
from service.common.settings import Settings

QUEUE = "cpu"
TASK = "halfquad.run_unit"
KEY_PREFIX = "halfquad:"


def celery_config(settings: Settings) -> dict[str, Any]:
    """What every app on the broker must agree on."""
    return {
        "broker_url": settings.broker_url,
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": {
            "visibility_timeout": settings.visibility_timeout_s,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "socket_timeout": 30,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "queue_order_strategy": "sorted",
            "global_keyprefix": KEY_PREFIX,
        },
        "task_default_queue": QUEUE,
        "task_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_ignore_result": True,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_send_sent_event": True,
        "worker_prefetch_multiplier": 1,
        "worker_pool_start_method": "spawn",
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": settings.soft_shutdown_s,
        "worker_send_task_events": True,
        "worker_hijack_root_logger": False,
    }


class Broker:
    """A producer that sends by name, and a look at the queue; every failure is Unavailable."""

    def __init__(self, settings: Settings) -> None:
        self._app = Celery("halfquad", set_as_current=False)
        self._app.conf.update(celery_config(settings))
        self._redis = _open_redis(settings.broker_url)

    def send(self, unit_id: str, dispatch_seq: int) -> None:
        try:
            self._app.send_task(
                TASK,
                kwargs={"unit_id": unit_id, "dispatch_seq": dispatch_seq},
                queue=QUEUE,
                # once more at once: a pooled connection may be older than the broker
                retry=True,
                retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0},
            )
        except (OperationalError, RedisError, OSError) as error:
            raise Unavailable(f"the broker did not take the message: {error}") from error

    def depth(self) -> int:
        """Messages that no worker has taken yet."""
        try:
            return self._redis.llen(KEY_PREFIX + QUEUE)
        except RedisError as error:
            raise Unavailable(f"the broker does not answer: {error}") from error

    def ping(self) -> None:
        try:
            self._redis.ping()
        except RedisError as error:
            raise Unavailable(f"the broker does not answer: {error}") from error

    def renew(self, delivery_tag: str) -> None:
        """Hold back redelivery of a message that is being worked on, counting from now."""
        try:
            # XX: one that was acknowledged or restored meanwhile stays away
            self._redis.zadd(f"{KEY_PREFIX}unacked_index", {delivery_tag: time.time()}, xx=True)
        except RedisError as error:
            raise Unavailable(f"the broker does not answer: {error}") from error

    def close(self) -> None:
        self._redis.close()
        self._app.close()


def _open_redis(url: str) -> Redis:
    # once more at once, not for seconds: a request may be waiting
    options: dict[str, Any] = {"socket_timeout": 5, "socket_connect_timeout": 2, "retry": Retry(NoBackoff(), 1)}
    parts = urlsplit(url)
    if parts.scheme == "redis+socket":
        return Redis(unix_socket_path=parts.path, **options)
    return Redis.from_url(url, **options)
