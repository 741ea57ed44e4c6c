"""A job's target, and the steps that have to do with it: looked at before the work, sent to during and after it."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hqq_core.errors import Cancelled
from service.common import repository
from service.common.errors import HubUnavailable, TargetNotAllowed
from service.common.repository import Claim
from service.common.settings import Settings
from service.common.status import JobStatus
from service.common.target_urls import check_target_url
from worker.access import hub_of
from worker.hub.child import converse
from worker.push.at_hub import HubPush, HubTarget, Watch
from worker.push.files import PushFile
from worker.workplace import Workplace

PAUSE_LIMIT_S = 60.0  # a longer wait gives the worker to another job
SLICE_S = 0.1
KEPT_FROM_STORES = ("HALFQUAD_", "HF_", "HUGGING")  # nothing of the service's, no token of a Hub

Look = Callable[[], None]


class Push(Protocol):
    """What can be done with a target."""

    def check(self) -> None:
        """An error for what would be refused at the end."""

    def run(self, files: Sequence[PushFile], formats: Sequence[str]) -> dict[str, Any]:
        """Publish everything; where it is now."""

    def warm_up(self, files: Sequence[PushFile], *, begun: bool = False) -> None:
        """Send what is final already; nothing of it is published. `begun`: others of the job went this way before."""


def push_of(workplace: Workplace, claim: Claim, look: Look, progress: Callable[[int], None]) -> Push:
    """The target of a job that has one, as its settings allow it now."""
    assert claim.target is not None
    watch = Watch(look, progress, _fence(workplace, claim), _pause(workplace.settings, look))
    if "url" in claim.target:
        check_target_url(claim.target["url"], workplace.settings.target_urls)
        check_links(claim.target["url"], workplace.settings.target_urls)
        return UrlPush(claim.target["url"], claim.job_id, watch, overwrite=bool(claim.target.get("overwrite")))
    target = HubTarget.from_dict(claim.target)
    hub = hub_of(workplace.settings, claim.target.get("credential"), writes_to=target.repo_id)
    return HubPush(hub, target, claim.job_id, watch)


def check_links(url: str, allowed: Sequence[str]) -> None:
    """TargetNotAllowed where a folder is below an allowed one by name alone: a link leads elsewhere."""
    folder = url.removeprefix("file://")
    if folder != url:
        real = os.path.realpath(folder)
        roots = [os.path.realpath(prefix.removeprefix("file://")) for prefix in allowed if prefix.startswith("file:")]
        if not any(os.path.commonpath([real, root]) == root for root in roots):
            raise TargetNotAllowed("the target's folder is a link out of what this service may write to")


def _fence(workplace: Workplace, claim: Claim) -> Callable[[], None]:
    def fence() -> None:
        with workplace.database.write() as session:
            status = repository.renew_lease(session, claim, lease_s=workplace.settings.lease_s)
        if status != JobStatus.RUNNING:
            raise Cancelled(f"the job is {status}")

    return fence


def _pause(settings: Settings, look: Look) -> Callable[[int, float | None], None]:
    def pause(attempt: int, asked_s: float | None) -> None:
        wait_s = asked_s if asked_s is not None else min(settings.backoff_s * 2 ** (attempt - 1), PAUSE_LIMIT_S)
        if wait_s > PAUSE_LIMIT_S:
            raise HubUnavailable("the Hub asks for a longer wait", retry_after_s=int(wait_s))
        until = time.monotonic() + wait_s
        while (left := until - time.monotonic()) > 0:
            look()
            time.sleep(min(SLICE_S, left))

    return pause


class UrlPush:
    """One job's result and one folder or bucket; each step in a process of its own."""

    def __init__(self, url: str, job_id: str, watch: Watch, *, overwrite: bool) -> None:
        self._url = url
        self._job_id = job_id
        self._watch = watch
        self._overwrite = overwrite

    def check(self) -> None:
        self._ask("check")

    def run(self, files: Sequence[PushFile], formats: Sequence[str]) -> dict[str, Any]:
        stale = self._ask("begin", files)
        if stale is not None:
            manifests = [file for file in files if file.is_manifest]
            self._ask("upload", [file for file in files if not file.is_manifest])
            self._watch.fence()
            self._ask("publish", manifests, stale=stale)
        return {"url": self._url}

    def warm_up(self, files: Sequence[PushFile], *, begun: bool = False) -> None:
        """Only to an empty place, or one that is this job's: what another result needs is left until the end."""
        if not self._overwrite and self._ask("begin", files) is not None:
            self._ask("upload", files)

    def _ask(self, op: str, files: Sequence[PushFile] = (), stale: Sequence[str] = ()) -> Any:
        request = {
            "op": op, "token": None, "url": self._url, "job_id": self._job_id, "overwrite": self._overwrite,
            "files": [file.to_dict() for file in files], "stale": list(stale),
        }  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if not name.startswith(KEPT_FROM_STORES)}
        return converse("worker.push", request, environment, self._watch.look, self._watch.progress)
