"""All queries. Nothing here commits: the caller's `with database.write()` does.

Whoever changes a job or its units locks the job row first; only a lease is moved without it, under its unit's. So writers
of one job go one after the other, two of them never wait for each other, and what is read under the lock is what is written back.
"""

from service.common.repository.claims import Claim, claim_unit, renew_lease
from service.common.repository.clock import now, ping
from service.common.repository.dispatch import Message, give_back, take_due
from service.common.repository.events import append_event, event_seqs, list_events
from service.common.repository.expiry import drop_old_events, expire_units, expired_units, jobs_with_old_events, purge
from service.common.repository.failures import reap_unit, unit_failed
from service.common.repository.idempotency import find_idempotency, insert_idempotency, settle_idempotency
from service.common.repository.jobs import cancel_job, discarded_jobs, ended_lately, get_job, insert_job, retry_upload
from service.common.repository.leases import (
    WORKER_LEASE,
    drop_lease,
    take_lease,
    worker_left,
    worker_seen,
    workers_online,
)
from service.common.repository.outcomes import (
    finish_succeeded,
    hand_back,
    plan_succeeded,
    profile_succeeded,
    push_succeeded,
    shard_results,
    shard_succeeded,
    unit_stopped,
)
from service.common.repository.pages import JobFilter, Page, list_jobs, list_watches
from service.common.repository.progress import save_progress
from service.common.repository.sources import pin_source
from service.common.repository.units import ShardWork, queued_shards
from service.common.repository.watches import (
    change_watch,
    delete_watch,
    get_watch,
    insert_watch,
    take_due_watch,
    watch_failed,
    watch_seen,
)

__all__ = [
    "WORKER_LEASE",
    "Claim",
    "JobFilter",
    "Message",
    "Page",
    "ShardWork",
    "append_event",
    "cancel_job",
    "change_watch",
    "claim_unit",
    "delete_watch",
    "discarded_jobs",
    "drop_lease",
    "drop_old_events",
    "ended_lately",
    "event_seqs",
    "expire_units",
    "expired_units",
    "find_idempotency",
    "finish_succeeded",
    "get_job",
    "get_watch",
    "give_back",
    "hand_back",
    "insert_idempotency",
    "insert_job",
    "insert_watch",
    "jobs_with_old_events",
    "list_events",
    "list_jobs",
    "list_watches",
    "now",
    "pin_source",
    "ping",
    "plan_succeeded",
    "profile_succeeded",
    "purge",
    "push_succeeded",
    "queued_shards",
    "reap_unit",
    "renew_lease",
    "retry_upload",
    "save_progress",
    "settle_idempotency",
    "shard_results",
    "shard_succeeded",
    "take_due",
    "take_due_watch",
    "take_lease",
    "unit_failed",
    "unit_stopped",
    "watch_failed",
    "watch_seen",
    "worker_left",
    "worker_seen",
    "workers_online",
]
