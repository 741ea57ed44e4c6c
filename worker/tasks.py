"""The Celery tasks: an id in, one step done, nothing out."""

from typing import Any

from celery import Task

from service.common.queue import TASK
from worker.app import app, leaving, workplace


@app.task(name=TASK, bind=True)
def run_unit(task: Task[Any, None], *, unit_id: str, dispatch_seq: int) -> None:
    """Do the unit if it still waits; `dispatch_seq` tells the messages of one unit apart in logs."""
    from worker import steps  # torch and the solver: for the pool's child, not for its parent

    steps.run_unit(
        workplace(),
        unit_id,
        owner=str(task.request.hostname),
        leaving=leaving,
        delivery_tag=(task.request.properties or {}).get("delivery_tag"),
    )
