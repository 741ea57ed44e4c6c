"""What lies at a revision, and the names of revisions."""

import hashlib
from typing import Any
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Query, Request, Response

from tests.fakehub.access import CurrentHub, JsonBody, Name, RawBody, Readable, Writable
from tests.fakehub.errors import Refusal, entry_not_found, revision_not_found
from tests.fakehub.history import MAIN, Commit, Repo

router = APIRouter()
COMMITS_PER_PAGE = 50
MOST_PATHS = 1000


@router.get("/api/models/{namespace}/{name}/tree/{revision}")
@router.get("/api/models/{namespace}/{name}/tree/{revision}/{folder:path}")
def tree(
    request: Request,
    response: Response,
    repo: Readable,
    revision: Name,
    hub: CurrentHub,
    folder: Name = "",
    recursive: bool = False,
    expand: bool = False,
    cursor: int = 0,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Files and folders, a page at a time; the header Link leads on."""
    commit = repo.at(revision)
    below = f"{folder.strip('/')}/" if folder else ""
    paths = [path for path in _everything(commit) if path.startswith(below)]
    if folder and not paths:
        raise entry_not_found(folder)
    if not recursive:
        paths = [path for path in paths if "/" not in path.removeprefix(below)]
    end = cursor + (limit or hub.limits.page_nitems)
    if end < len(paths):
        query = urlencode({**request.query_params, "cursor": end})
        response.headers["Link"] = f'<{hub.endpoint}{request.url.path}?{query}>; rel="next"'
    return [_item(repo, commit, path, expand) for path in paths[cursor:end]]


@router.post("/api/models/{namespace}/{name}/paths-info/{revision}")
def paths_info(body: RawBody, repo: Readable, revision: Name) -> list[dict[str, Any]]:
    form = parse_qs(body.decode())
    paths, commit = form.get("paths", []), repo.at(revision)
    if len(paths) > MOST_PATHS:
        raise Refusal(413, "too many parameters")
    there = set(_everything(commit))
    expand = form.get("expand") == ["true"]
    return [_item(repo, commit, path, expand) for path in (each.rstrip("/") for each in paths) if path in there]


@router.get("/api/models/{namespace}/{name}/commits/{revision}")
def commits(
    request: Request, response: Response, repo: Readable, revision: Name, hub: CurrentHub, p: int = Query(default=0)
) -> list[dict[str, Any]]:
    history = repo.history(revision)
    start = p * COMMITS_PER_PAGE
    if start + COMMITS_PER_PAGE < len(history):
        query = urlencode({**request.query_params, "p": p + 1})
        response.headers["Link"] = f'<{hub.endpoint}{request.url.path}?{query}>; rel="next"'
    return [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in history[start : start + COMMITS_PER_PAGE]
    ]


@router.get("/api/models/{namespace}/{name}/refs")
def refs(repo: Readable, include_prs: bool = False) -> dict[str, Any]:
    def below(prefix: str) -> list[dict[str, str]]:
        found = [(ref, oid) for ref, oid in repo.refs.items() if ref.startswith(prefix)]
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in found]

    answer = {"branches": below("refs/heads/"), "tags": below("refs/tags/"), "converts": []}
    return answer | ({"pullRequests": below("refs/pr/")} if include_prs else {})


@router.post("/api/models/{namespace}/{name}/branch/{branch}")
def create_branch(body: JsonBody, repo: Writable, branch: Name, hub: CurrentHub) -> dict[str, Any]:
    _point(hub, repo, f"refs/heads/{branch}", repo.at(body.get("startingPoint") or "main"))
    return {}


@router.delete("/api/models/{namespace}/{name}/branch/{branch}")
def delete_branch(repo: Writable, branch: Name, hub: CurrentHub) -> dict[str, Any]:
    if f"refs/heads/{branch}" == MAIN:
        raise Refusal(403, "Cannot delete the branch main")
    return _drop(hub, repo, f"refs/heads/{branch}")


@router.post("/api/models/{namespace}/{name}/tag/{revision}")
def create_tag(body: JsonBody, repo: Writable, revision: Name, hub: CurrentHub) -> dict[str, Any]:
    _point(hub, repo, f"refs/tags/{body['tag']}", repo.at(revision))
    return {}


@router.delete("/api/models/{namespace}/{name}/tag/{tag}")
def delete_tag(repo: Writable, tag: Name, hub: CurrentHub) -> dict[str, Any]:
    return _drop(hub, repo, f"refs/tags/{tag}")


def _everything(commit: Commit) -> list[str]:
    """Paths of files and of the folders that hold them."""
    folders = {"/".join(path.split("/")[:depth]) for path in commit.files for depth in range(1, path.count("/") + 1)}
    return sorted([*commit.files, *folders])


def _item(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    entry = commit.files.get(path)
    last = {"lastCommit": _last_commit(repo, commit, path)} if expand else {}
    if entry is None:
        inside = {
            name.removeprefix(f"{path}/"): each.oid
            for name, each in commit.files.items()
            if name.startswith(f"{path}/")
        }
        below = "".join(f"{name} {oid}\n" for name, oid in inside.items())
        oid = hashlib.sha1(below.encode(), usedforsecurity=False).hexdigest()
        return {"type": "directory", "path": path, "oid": oid, "size": 0} | last
    item: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.nbytes}
    if entry.sha256:
        item["lfs"] = {"oid": entry.sha256, "size": entry.nbytes, "pointerSize": entry.pointer_nbytes}
    if entry.xet_hash:
        item["xetHash"] = entry.xet_hash
    return item | last


def _last_commit(repo: Repo, commit: Commit, path: str) -> dict[str, str]:
    """The commit that last changed a file or anything in a folder."""

    def content(at: Commit) -> dict[str, str]:
        return {name: each.oid for name, each in at.files.items() if name == path or name.startswith(f"{path}/")}

    last = commit
    for older in repo.history(commit.oid)[1:]:
        if content(older) != content(commit):
            break
        last = older
    return {"id": last.oid, "title": last.title, "date": last.date}


def _point(hub: CurrentHub, repo: Repo, ref: str, commit: Commit) -> None:
    with hub.lock:
        if ref in repo.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        repo.refs[ref] = commit.oid
        hub.save(repo)


def _drop(hub: CurrentHub, repo: Repo, ref: str) -> dict[str, Any]:
    with hub.lock:
        if ref not in repo.refs:
            raise revision_not_found(ref)
        del repo.refs[ref]
        hub.save(repo)
    return {}
