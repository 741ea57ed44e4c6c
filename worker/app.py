"""The Celery app and its signals.

    python -m celery -A worker.app worker --pool prefork --concurrency 1 --hostname NAME@%h

The parent consumes, keeps house, looks after watches and answers pings; its one spawned child does the units. A stopping
worker lets the running unit go on for soft_shutdown_s, then its child hands the unit back (SIGUSR2) and both end.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from functools import cache
from typing import Any

import structlog
from celery import Celery, signals
from celery.concurrency.base import BasePool
from celery.worker.consumer import Consumer

from service.common import repository, schema
from service.common.credentials import Credentials
from service.common.errors import ServiceError
from service.common.logs import configure_logging
from service.common.queue import celery_config
from service.common.settings import Settings
from worker.reaper import Housekeeper
from worker.watcher import Watcher
from worker.workplace import Workplace

HAND_BACK = signal.SIGUSR2
NODE_VARIABLE = "CELERY_NODE_NAME"  # a spawned child is told its parent's name by nothing but the environment
CHILD_START_S = 60  # importing torch from a cold disk; Celery would kill the child after 4 s

# a process that computes talks to no Hub: before huggingface_hub is loaded, which looks once, and for the child to inherit
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(variable, "1")

# billiard takes the names of its files away as soon as they are open: a folder made for them would outlive a SIGKILL
multiprocessing.current_process()._config["tempdir"] = tempfile.gettempdir()  # type: ignore[attr-defined]

settings = Settings()
app = Celery("halfquad", include=["worker.tasks"])
app.conf.update(
    celery_config(settings),
    worker_max_memory_per_child=settings.max_child_nbytes // 1024,
    worker_proc_alive_timeout=CHILD_START_S,
    worker_redirect_stdouts=False,
)

leaving = threading.Event()  # in the child: hand the unit back
logger = structlog.get_logger(__name__)


@cache
def workplace() -> Workplace:
    """Connections of this process alone."""
    return Workplace.open(settings)


@signals.setup_logging.connect
def set_up_logging(**_: Any) -> None:
    configure_logging(settings.log_level)


# The parent


class _Parent:
    """What the parent holds between its start and its end."""

    pool: BasePool | None = None
    housekeeper: Housekeeper | None = None
    watcher: Watcher | None = None


@signals.celeryd_init.connect
def refuse_old_schema(sender: str, **_: Any) -> None:
    os.environ[NODE_VARIABLE] = sender
    try:
        Credentials(settings)
        schema.check_head(workplace().database)
    except ServiceError as error:
        configure_logging(settings.log_level)
        logger.error("The worker did not start.", action="start_refused", reason=error.detail)
        sys.exit(1)


@signals.worker_ready.connect
def begin_housekeeping(sender: Consumer, **_: Any) -> None:
    _Parent.pool = sender.pool
    _Parent.housekeeper = Housekeeper(workplace(), sender.hostname)
    _Parent.housekeeper.start()
    _Parent.watcher = Watcher(workplace())
    _Parent.watcher.start()


@signals.worker_shutting_down.connect
def hand_back_in_time(**_: Any) -> None:
    timer = threading.Timer(settings.soft_shutdown_s, _ask_child_to_leave)
    timer.daemon = True
    timer.start()


def _ask_child_to_leave() -> None:
    for pid in _Parent.pool.info["processes"] if _Parent.pool else ():
        try:
            os.kill(pid, HAND_BACK)
        except ProcessLookupError:
            continue


@signals.worker_shutdown.connect
def end_housekeeping(**_: Any) -> None:
    if _Parent.watcher is not None:
        _Parent.watcher.stop()
    if _Parent.housekeeper is not None:
        _Parent.housekeeper.stop()
    workplace().close()


# The child


@signals.worker_process_init.connect
def prepare_child(**_: Any) -> None:
    signal.signal(HAND_BACK, lambda number, frame: leaving.set())
    import torch

    from worker import steps  # noqa: F401  # before the first unit, not within it

    torch.set_num_threads(settings.threads)  # as the solver: workers that share cores would wait for each other
    # one child at a time has this name: what its predecessor held is lost
    with workplace().database.write() as session:
        repository.expire_units(session, os.environ[NODE_VARIABLE])


@signals.worker_process_shutdown.connect
def close_child(**_: Any) -> None:
    workplace().close()
