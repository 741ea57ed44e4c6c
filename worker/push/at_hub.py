"""A result as one commit of a repository, exactly once (docs/adr/0012-exactly-once.md).

Every attempt looks first at one commit, the head, and through all of its history for the job's trailer. Not found, the
attempt is made onto that head and no other: the Hub refuses it when another commit came between. So of all attempts
of a job, also of starts that were lost or taken over, one can land, and who comes later finds it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from hqq_core.errors import Cancelled
from service.common.errors import (
    HubRefused,
    LeaseLost,
    NamespaceNotAllowed,
    RepoExists,
    ServiceError,
    TokenRefused,
)
from worker.hub import Hub
from worker.push.files import PushFile, named_by

TRIES = 6  # of one start; then the unit waits and starts again
KEPT = ".gitattributes"  # the Hub's own
GRACE_S = 2.0  # that a commit on its way has, when the unit is to stop
LAST_LOOK_S = 1.5

logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class HubTarget:
    """Where a job's result goes, as it was asked for."""

    repo_id: str
    branch: str = "main"
    create_pr: bool = False
    private: bool = False
    overwrite: bool = False

    @classmethod
    def from_dict(cls, target: dict[str, Any]) -> "HubTarget":
        names = cls.__dataclass_fields__
        return cls(**{name: value for name, value in target.items() if name in names and value is not None})


@dataclass(frozen=True)
class Place:
    """The target at one moment."""

    exists: bool
    branch_exists: bool
    revision: str  # what a commit goes to
    head: str | None  # None: nothing is there yet
    found: str | None  # this job's commit
    stale: tuple[str, ...]  # what an earlier result has and this one has not
    pull_request: int | None = None
    doubles: tuple[int, ...] = ()  # pull requests of this job that will stay empty


@dataclass(frozen=True)
class Watch:
    """The step's side of a push."""

    look: Callable[[], None]  # Cancelled when the unit has to stop
    progress: Callable[[int], None]
    fence: Callable[[], None]  # LeaseLost or Cancelled when this start is not the one to publish
    pause: Callable[[int, float | None], None]  # after a failed attempt, the first is 1; what the Hub asked for


class Patience:
    """A look that lets go on for a while once there is a reason to stop."""

    def __init__(self, look: Callable[[], None], patience_s: float) -> None:
        self._look = look
        self._patience_s = patience_s
        self._since: float | None = None

    def __call__(self) -> None:
        try:
            self._look()
        except Cancelled:
            self._since = self._since or time.monotonic()
            if time.monotonic() - self._since >= self._patience_s:
                raise


class HubPush:
    """One job's result and one repository."""

    def __init__(self, hub: Hub, target: HubTarget, job_id: str, watch: Watch) -> None:
        self._hub = hub
        self._target = target
        self._job_id = job_id
        self._watch = watch
        self.trailer = f"Halfquad-Job: {job_id}"

    def run(self, files: Sequence[PushFile], formats: Sequence[str]) -> dict[str, Any]:
        """Publish; what is to be told of it. HubError where it cannot be."""
        place = self._prepared(files)
        if place.found is None:
            self.preupload(files, place.revision)
            place = self._commit(files, formats)
        return self._told(place)

    def check(self) -> None:
        """Before hours of work: HubError for what would be refused at their end."""
        if self._target.create_pr and self._target.branch != "main":
            raise HubRefused(f"pull requests are opened against main, not {self._target.branch}: leave branch out")
        place = self._look([])
        if not place.exists or not self._target.create_pr:
            self._check_namespace()

    def preupload(self, files: Sequence[PushFile], revision: str | None = None) -> None:
        """Store the content of large files; what is there is not sent again."""
        self._call(
            "preupload",
            progress=self._watch.progress,
            revision=revision or self._target.branch,
            files=[file.to_dict() for file in files],
        )

    def warm_up(self, files: Sequence[PushFile], *, begun: bool = False) -> None:
        """Store the content of files ahead of the rest, in the repository, which is made for it.

        Nothing for a pull request: it is opened when there is something to pull. What is stored is no commit, so the place is
        looked at only for the first of them: each look is a process of its own.
        """
        if self._target.create_pr:
            return
        if begun:
            self.preupload(files)
        else:
            place = self._prepared(files)
            if place.found is None:
                self.preupload(files, place.revision)

    def _prepared(self, files: Sequence[PushFile]) -> Place:
        place = self._look(files)
        if place.found is not None:
            return place
        if not (place.exists and place.branch_exists):
            self._call("prepare", branch=self._target.branch, private=self._target.private, start=place.head)
            place = self._look(files)
        if self._target.create_pr and place.found is None and place.pull_request is None:
            self._watch.fence()
            self._call("open_pull_request", title=self._pull_title(), description=self.trailer)
            place = self._look(files)
        return place

    def _commit(self, files: Sequence[PushFile], formats: Sequence[str]) -> Place:
        for attempt in range(1, TRIES + 1):
            place = self._prepared(files)
            if place.found is not None:
                return place
            try:
                return self._try(place, files, formats)
            except LeaseLost:
                raise
            except ServiceError as error:
                # an answer that is lost, or an error that is none: only the history tells
                landed = self._look(files)
                if landed.found is not None:
                    logger.info("The commit had landed.", action="commit_found", reason=error.detail)
                    return landed
                if not error.retryable or attempt == TRIES:
                    raise
                logger.info("The commit is tried again.", action="commit_failed", reason=error.detail, attempt=attempt)
                self._watch.pause(attempt, error.retry_after_s)
        raise AssertionError("unreachable")

    def _try(self, place: Place, files: Sequence[PushFile], formats: Sequence[str]) -> Place:
        self._watch.fence()
        try:
            found = self._send(place, files, formats)
        except Cancelled:
            landed = self._last_look(files)
            if landed is None or landed.found is None:
                raise
            return landed
        return replace(place, found=found)

    def _send(self, place: Place, files: Sequence[PushFile], formats: Sequence[str]) -> str:
        done = self._call(
            "commit",
            look=Patience(self._watch.look, GRACE_S),
            revision=place.revision,
            onto=place.head,
            files=[file.to_dict() for file in files],
            deletions=list(place.stale),
            title=f"Weights quantized by Halfquad: {', '.join(dict.fromkeys(formats))}",
            description=self.trailer,
        )
        return str(done["commit"])

    def _last_look(self, files: Sequence[PushFile]) -> Place | None:
        """After a stop, as long as that may take: what landed before it stands."""
        try:
            return self._look(files, look=Patience(self._watch.look, LAST_LOOK_S))
        except (Cancelled, ServiceError):
            return None

    def _look(self, files: Sequence[PushFile], look: Callable[[], None] | None = None) -> Place:
        """The target as it is; RepoExists where something is in the way."""
        target = self._target
        state = self._call("target", look=look, branch=target.branch, trailer=self.trailer)
        ours = {file.name for file in files} | {KEPT}
        named = {file.name: state["named"].get(file.name) for file in files if file.is_manifest}
        stale = {name for manifest, content in named.items() for name in named_by(manifest, content)}
        place = Place(
            exists=state["exists"],
            branch_exists=state["branch"],
            revision=target.branch,
            head=state["head"],
            found=state["found"],
            stale=tuple(sorted((stale & set(state["files"])) - ours)),
        )
        if place.found is not None or not place.exists:
            return place
        if state["repo_id"].lower() != target.repo_id.lower():  # what a credential may write to goes by the name
            raise RepoExists(f"{target.repo_id} has moved to {state['repo_id']}: name that one")
        if target.private and not state["private"]:
            raise RepoExists(f"{target.repo_id} is there already and public; private was asked for")
        if target.create_pr:
            return self._look_at_pull_requests(place, look)
        others = [name for name in state["files"] if name != KEPT]
        if others and not target.overwrite:
            raise RepoExists(
                f"{target.repo_id}, branch {target.branch}, has {len(others)} files that are not this job's: choose "
                "another repo_id or branch, or say create_pr or overwrite"
            )
        return place

    def _look_at_pull_requests(self, place: Place, look: Callable[[], None] | None) -> Place:
        """The earliest of this job's: numbers only grow, so all who look after they have opened one see the same."""
        pulls = self._call("pull_requests", look=look, title=self._pull_title(), trailer=self.trailer)
        chosen = next((pull for pull in pulls if pull["found"]), None) or next(
            (pull for pull in pulls if pull["status"] in ("draft", "open")), None
        )
        if chosen is None:
            return place
        number = chosen["number"]
        doubles = [pull["number"] for pull in pulls if pull["number"] != number and pull["status"] in ("draft", "open")]
        return replace(
            place,
            revision=f"refs/pr/{number}",
            head=chosen["head"],
            found=chosen["found"],
            pull_request=number,
            doubles=tuple(doubles),
        )

    def _told(self, place: Place) -> dict[str, Any]:
        url = f"{self._hub.endpoint.url}/{self._target.repo_id}"
        pull_request = None
        if place.pull_request is not None:
            self._settle(place)
            pull_request = f"{url}/discussions/{place.pull_request}"
        if self._target.branch != "main":
            url += f"/tree/{self._target.branch}"
        return {"url": url, "commit": place.found, "pull_request": pull_request}

    def _settle(self, place: Place) -> None:
        """Out of draft, and doubles closed; that the commit is there hangs neither on it nor on a cancel."""
        look = Patience(self._watch.look, LAST_LOOK_S)
        for number, status in ((place.pull_request, "open"), *((double, "closed") for double in place.doubles)):
            try:
                self._call("set_status", look=look, number=number, status=status)
            except (Cancelled, ServiceError) as error:
                logger.warning("A pull request keeps its status.", action="status_kept", reason=str(error))

    def _pull_title(self) -> str:
        return f"Weights quantized by Halfquad ({self._job_id})"

    def _check_namespace(self) -> None:
        namespace = self._target.repo_id.split("/", 1)[0].lower()
        me = self._hub.call("whoami", look=self._watch.look)
        if me["role"] == "read":
            raise TokenRefused("the credential's token can only read; a target needs one that can write")
        if namespace not in map(str.lower, me["namespaces"]):
            raise NamespaceNotAllowed(
                f"{namespace} is not one of the credential's namespaces: {', '.join(me['namespaces'])}"
            )

    def _call(self, op: str, *, look: Callable[[], None] | None = None, **arguments: Any) -> Any:
        return self._hub.call(op, look=look or self._watch.look, repo_id=self._target.repo_id, **arguments)
