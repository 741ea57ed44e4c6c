"""python -m worker: one Celery worker with one spawned child; further arguments go to Celery."""

import sys

from service.common.queue import QUEUE
from worker.app import app

if __name__ == "__main__":
    app.worker_main(
        [
            "--quiet",
            "worker",
            *("--pool", "prefork", "--concurrency", "1", "--queues", QUEUE),
            *("--without-gossip", "--without-mingle"),
            *sys.argv[1:],
        ]
    )
