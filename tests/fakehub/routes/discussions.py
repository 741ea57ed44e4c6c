"""Discussions and pull requests."""

import uuid
from typing import Any, Literal

from fastapi import APIRouter

from tests.fakehub.access import Contributable, CurrentHub, JsonBody, Known, Readable, Writable
from tests.fakehub.errors import Refusal
from tests.fakehub.history import MAIN, Commit, Discussion, Entry, Event, Repo, now
from tests.fakehub.state import Hub

router = APIRouter()
PER_PAGE = 10


@router.get("/api/models/{namespace}/{name}/discussions")
def discussions(
    repo: Readable, p: int = 0, type: str = "all", status: str = "all", author: str | None = None
) -> dict[str, Any]:
    found = [one for one in reversed(repo.discussions) if _matches(one, type, status, author)]
    page = found[p * PER_PAGE : (p + 1) * PER_PAGE]
    return {"discussions": [_summary(repo, one) for one in page], "count": len(found), "start": p * PER_PAGE}


@router.post("/api/models/{namespace}/{name}/discussions")
def open_discussion(body: JsonBody, repo: Contributable, hub: CurrentHub, account: Known) -> dict[str, Any]:
    with hub.lock:
        title, description = body["title"], body.get("description", "")
        if body.get("pullRequest"):
            made = open_pull_request(hub, repo, account.user, title, description, base=MAIN, status="draft")
        else:
            made = _open(repo, account.user, title, description, is_pull_request=False, status="open")
        hub.save(repo)
    return {"num": made.num, "pullRequest": made.is_pull_request}


@router.get("/api/models/{namespace}/{name}/discussions/{num}")
def discussion(repo: Readable, num: int) -> dict[str, Any]:
    return _details(repo, repo.discussion(num))


@router.post("/api/models/{namespace}/{name}/discussions/{num}/comment")
def comment(body: JsonBody, repo: Contributable, num: int, hub: CurrentHub, account: Known) -> dict[str, Any]:
    with hub.lock:
        event = _comment(repo.discussion(num), account.user, body["comment"])
        hub.save(repo)
    return {"newMessage": _event(event)}


@router.post("/api/models/{namespace}/{name}/discussions/{num}/status")
def change_status(body: JsonBody, repo: Contributable, num: int, hub: CurrentHub, account: Known) -> dict[str, Any]:
    with hub.lock:
        event = _change_status(repo.discussion(num), account.user, body["status"])
        hub.save(repo)
    return {"newStatus": _event(event)}


@router.post("/api/models/{namespace}/{name}/discussions/{num}/merge")
def merge(repo: Writable, num: int, hub: CurrentHub, account: Known) -> dict[str, Any]:
    with hub.lock:
        one = repo.discussion(num)
        if not one.is_pull_request or one.status != "open":
            raise Refusal(400, f"Only open pull requests can be merged; {num} is {one.status}")
        if conflicts := _conflicts(repo, one):
            raise Refusal(409, f"Conflicting files: {', '.join(conflicts)}")
        made = hub.commit(repo, one.base, _changes(repo, one), account.user, f"{one.title} (#{num})")
        one.merge_commit = made.oid
        _change_status(one, account.user, "merged")
        hub.save(repo)
    return {}


def open_pull_request(
    hub: Hub, repo: Repo, author: str, title: str, description: str, base: str, status: Literal["draft", "open"]
) -> Discussion:
    """A pull request that begins at the head of its base."""
    made = _open(repo, author, title, description, is_pull_request=True, status=status)
    made.base, made.start = base, repo.refs[base]
    repo.refs[made.ref] = made.start
    return made


def add_commit_event(repo: Repo, ref: str, commit: Commit) -> None:
    """Where `ref` is a pull request's, its discussion tells of the commit."""
    if one := repo.pull_request_of(ref):
        data: dict[str, object] = {"subject": commit.title, "oid": commit.oid}
        one.events.append(Event(_id(), "commit", commit.date, commit.author, data))


def _open(
    repo: Repo, author: str, title: str, description: str, is_pull_request: bool, status: Literal["draft", "open"]
) -> Discussion:
    made = Discussion(len(repo.discussions) + 1, title, author, now(), status, is_pull_request)
    repo.discussions.append(made)
    _comment(made, author, description)
    return made


def _comment(one: Discussion, author: str, text: str) -> Event:
    latest = {"raw": text, "html": "", "updatedAt": now(), "author": {"name": author}}
    event = Event(
        _id(), "comment", now(), author, {"edited": False, "hidden": False, "latest": latest, "history": [latest]}
    )
    one.events.append(event)
    return event


def _change_status(one: Discussion, author: str, status: Literal["open", "closed", "merged"]) -> Event:
    one.status = status
    event = Event(_id(), "status-change", now(), author, {"status": status})
    one.events.append(event)
    return event


def _changes(repo: Repo, one: Discussion) -> dict[str, Entry | None]:
    """What a pull request changes since it began."""
    return _difference(repo.commits[one.start], repo.at(one.ref))


def _conflicts(repo: Repo, one: Discussion) -> list[str]:
    """Files that both the pull request and its base changed, not alike."""
    ours, theirs = _changes(repo, one), _difference(repo.commits[one.start], repo.commits[repo.refs[one.base]])
    return sorted(path for path in ours.keys() & theirs.keys() if ours[path] != theirs[path])


def _difference(before: Commit, after: Commit) -> dict[str, Entry | None]:
    paths = before.files.keys() | after.files.keys()
    return {path: after.files.get(path) for path in paths if before.files.get(path) != after.files.get(path)}


def _matches(one: Discussion, kind: str, status: str, author: str | None) -> bool:
    of_kind = kind == "all" or one.is_pull_request == (kind == "pull_request")
    of_status = status == "all" or (one.status in ("open", "draft")) == (status == "open")
    return of_kind and of_status and author in (None, one.author)


def _summary(repo: Repo, one: Discussion) -> dict[str, Any]:
    return {
        "num": one.num,
        "title": one.title,
        "author": {"name": one.author, "type": "user"},
        "createdAt": one.created_at,
        "status": one.status,
        "isPullRequest": one.is_pull_request,
        "numComments": sum(event.type == "comment" for event in one.events),
        "repo": {"name": repo.id, "type": "model"},
    }


def _details(repo: Repo, one: Discussion) -> dict[str, Any]:
    details = _summary(repo, one) | {"events": [_event(event) for event in one.events]}
    if one.is_pull_request:
        conflicts = _conflicts(repo, one) if one.status in ("open", "draft") else []
        changes = {"base": one.base} | ({"mergeCommitId": one.merge_commit} if one.merge_commit else {})
        details |= {"filesWithConflicts": conflicts, "changes": changes, "diff": ""}
    return details


def _event(event: Event) -> dict[str, Any]:
    author = {"name": event.author, "type": "user"}
    return {"id": event.id, "type": event.type, "createdAt": event.created_at, "author": author, "data": event.data}


def _id() -> str:
    return uuid.uuid4().hex[:24]
