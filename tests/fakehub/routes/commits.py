"""Changes: which files go to LFS, and the commit itself."""

import base64
import json
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter

from tests.fakehub.access import CurrentHub, JsonBody, Known, Name, Offered, RawBody
from tests.fakehub.errors import Refusal, entry_not_found
from tests.fakehub.history import Commit, Entry, Repo
from tests.fakehub.routes.discussions import add_commit_event, open_pull_request
from tests.fakehub.state import Hub

router = APIRouter()
MOST_LFS_FILES = 25_000
MOST_REGULAR_NBYTES = 10**9
MOST_PREUPLOADS = 256


@router.post("/api/models/{namespace}/{name}/preupload/{revision}")
def preupload(body: JsonBody, repo: Offered, revision: Name, hub: CurrentHub) -> dict[str, Any]:
    """For each file to come: where it goes, and what lies under its name now."""
    head = repo.at(revision)
    if len(body["files"]) > MOST_PREUPLOADS:
        raise Refusal(413, f"At most {MOST_PREUPLOADS} files in one request, got {len(body['files'])}")
    return {"files": [_mode(hub, repo, head, file) for file in body["files"]]}


def _mode(hub: Hub, repo: Repo, head: Commit, file: dict[str, Any]) -> dict[str, Any]:
    there = head.files.get(file["path"])
    lfs = hub.wants_lfs(repo, file["path"], file["size"], base64.b64decode(file.get("sample") or ""))
    mode = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
    return mode | ({"oid": there.etag} if there else {})


@router.post("/api/models/{namespace}/{name}/commit/{revision}")
def commit(
    body: RawBody, repo: Offered, revision: Name, hub: CurrentHub, account: Known, create_pr: bool = False
) -> dict[str, Any]:
    """Take the changes as one commit on a branch, or as a pull request of its own."""
    header, operations = _parse(body)
    with hub.lock:
        ref = repo.branch(revision)
        head = repo.refs[ref]
        if (parent := header.get("parentCommit")) is not None and parent != head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes = dict(_changes(hub, repo, repo.commits[head], operations))
        title, message = header["summary"], header.get("description", "")
        pull_request = None
        if create_pr:
            pull_request = open_pull_request(hub, repo, account.user, title, message, base=ref, status="open")
            ref = pull_request.ref
        made = hub.commit(repo, ref, changes, account.user, title, message)
        add_commit_event(repo, ref, made)
        hub.save(repo)
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{hub.endpoint}/{repo.id}/commit/{made.oid}"}
    if pull_request:
        answer["pullRequestUrl"] = f"{hub.endpoint}/{repo.id}/discussions/{pull_request.num}"
    return answer


def _parse(body: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the operations of an ndjson payload, within the Hub's limits."""
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    headers = [line["value"] for line in lines if line["key"] == "header"]
    if len(headers) != 1 or not headers[0].get("summary"):
        raise Refusal(400, "A commit needs one header with a summary")
    operations = [line for line in lines if line["key"] != "header"]
    if not operations:
        raise Refusal(400, "A commit needs at least one operation")
    if sum(line["key"] == "lfsFile" for line in operations) > MOST_LFS_FILES:
        raise Refusal(413, f"At most {MOST_LFS_FILES} LFS files in one commit")
    if (
        sum(len(line["value"]["content"]) * 3 // 4 for line in operations if line["key"] == "file")
        > MOST_REGULAR_NBYTES
    ):
        raise Refusal(413, f"At most {MOST_REGULAR_NBYTES} bytes of regular files in one commit")
    return headers[0], operations


def _changes(
    hub: Hub, repo: Repo, head: Commit, operations: list[dict[str, Any]]
) -> Iterator[tuple[str, Entry | None]]:
    """What each operation puts under which path; None where it deletes."""
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = value["path"].rstrip("/")
        if not path or path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise Refusal(400, f"Invalid path: {value['path']}")
        match key:
            case "file":
                yield path, _regular(hub, path, value)
            case "lfsFile":
                yield path, _object(hub, repo, path, value["oid"])
            case "deletedFile":
                if path not in head.files:
                    raise entry_not_found(f"{path}: A file with this name doesn't exist")
                yield path, None
            case "deletedFolder":
                below = [name for name in head.files if name.startswith(f"{path}/")]
                if not below:
                    raise entry_not_found(f"{path}: A folder with this name doesn't exist")
                yield from ((name, None) for name in below)
            case _:
                raise Refusal(400, f"Unknown operation: {key}")


def _regular(hub: Hub, path: str, value: dict[str, Any]) -> Entry:
    text = value["content"]
    content = base64.b64decode(text) if value.get("encoding") == "base64" else text.encode()
    if len(content) > 2 * hub.limits.regular_nbytes:
        raise Refusal(400, f"{path}: {len(content)} bytes are too many for a regular file; use LFS")
    return hub.storage.add_blob(content)


def _object(hub: Hub, repo: Repo, path: str, sha256: str) -> Entry:
    entry = hub.object(repo, sha256)
    if entry is None:
        raise Refusal(400, f"{path}: LFS pointer pointed to a file that does not exist: {sha256}")
    return entry
