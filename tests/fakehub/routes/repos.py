"""Repos as such: made, removed, renamed, described."""

import json
import re
from typing import Any

from fastapi import APIRouter, Query

from tests.fakehub.access import (
    Caller,
    CurrentHub,
    JsonBody,
    Known,
    Name,
    Readable,
    Writable,
    contributable,
    readable,
    writable,
)
from tests.fakehub.card import read_card
from tests.fakehub.errors import Refusal
from tests.fakehub.history import Commit, Repo
from tests.fakehub.state import Account, Hub

router = APIRouter()
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
LONGEST_NAME = 96


@router.post("/api/repos/create")
def create(body: JsonBody, hub: CurrentHub, account: Known) -> dict[str, Any]:
    if body.get("type") not in (None, "model"):
        raise Refusal(400, f"Only models are kept here, not {body['type']}")
    repo_id = _full_name(body, account)
    name = repo_id.split("/")[1]
    if not NAME.fullmatch(name) or "--" in name or ".." in name or len(name) > LONGEST_NAME or name.endswith(".git"):
        raise Refusal(400, f"Invalid name: {name}")
    _require_namespace(repo_id, account)
    private = body.get("visibility") == "private" or bool(body.get("private"))
    repo = hub.create(Repo(repo_id, private=private), account.user)
    return {"url": f"{hub.endpoint}/{repo.id}", "name": repo.id, "id": repo.id}


@router.delete("/api/repos/delete")
def delete(body: JsonBody, hub: CurrentHub, account: Known) -> dict[str, Any]:
    hub.remove(_owned(_full_name(body, account), hub, account))
    return {}


@router.post("/api/repos/move")
def move(body: JsonBody, hub: CurrentHub, account: Known) -> dict[str, Any]:
    repo = _owned(body["fromRepo"], hub, account)
    _require_namespace(body["toRepo"], account)
    if body["toRepo"] in hub.repos:
        raise Refusal(409, f"{body['toRepo']} already exists")
    hub.rename(repo.id, body["toRepo"])
    return {"url": f"{hub.endpoint}/{body['toRepo']}"}


@router.put("/api/models/{namespace}/{name}/settings")
def settings(body: JsonBody, repo: Writable, hub: CurrentHub) -> dict[str, Any]:
    with hub.lock:
        repo.gated = body.get("gated", repo.gated)
        repo.private = body.get("private", repo.private)
        if "visibility" in body:
            repo.private = body["visibility"] == "private"
        hub.save(repo)
    return {"private": repo.private, "gated": repo.gated}


@router.get("/api/models/{namespace}/{name}")
def info(repo: Readable, hub: CurrentHub, blobs: bool = False) -> dict[str, Any]:
    return describe(hub, repo, repo.at("main"), blobs)


@router.get("/api/models/{namespace}/{name}/revision/{revision}")
def info_at(repo: Readable, revision: Name, hub: CurrentHub, blobs: bool = Query(default=False)) -> dict[str, Any]:
    return describe(hub, repo, repo.at(revision), blobs)


def describe(hub: Hub, repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    """The model's info at a commit, its card and config read from the files of that commit."""
    card = read_card(_text(hub, commit, "README.md"))
    config = _config(_text(hub, commit, "config.json"))
    return {
        "_id": git_like_id(repo),
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created_at,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": repo.disabled,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(card),
        "spaces": [],
        "usedStorage": sum(entry.nbytes for entry in repo.objects.values()),
        "siblings": [_sibling(path, commit, blobs) for path in commit.files],
    } | {
        key: value
        for key, value in {
            "cardData": card,
            "config": config,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
        }.items()
        if value
    }


def git_like_id(repo: Repo) -> str:
    """24 hexadecimal digits, the same for as long as the repo lives."""
    return repo.history("main")[-1].oid[:24]


def _sibling(path: str, commit: Commit, blobs: bool) -> dict[str, Any]:
    entry = commit.files[path]
    sibling: dict[str, Any] = {"rfilename": path}
    if blobs:
        sibling |= {"size": entry.nbytes, "blobId": entry.oid}
        if entry.sha256:
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.nbytes, "pointerSize": entry.pointer_nbytes}
    return sibling


def _tags(card: dict[str, Any]) -> list[str]:
    tags = [str(tag) for tag in card.get("tags") or []]
    if isinstance(card.get("license"), str):
        tags.append(f"license:{card['license']}")
    bases = card.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        tags.append(f"base_model:{base}")
        if card.get("base_model_relation"):
            tags.append(f"base_model:{card['base_model_relation']}:{base}")
    return [*tags, "region:us"]


def _config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError:
        return {}
    kept = ("architectures", "model_type", "quantization_config")
    return {key: config[key] for key in kept if key in config} if isinstance(config, dict) else {}


def _text(hub: Hub, commit: Commit, path: str) -> str:
    entry = commit.files.get(path)
    return hub.storage.path(entry).read_text(errors="replace") if entry else ""


def _full_name(body: dict[str, Any], account: Account) -> str:
    return f"{body.get('organization') or account.user}/{body['name']}"


def _require_namespace(repo_id: str, account: Account) -> None:
    namespace = repo_id.split("/")[0]
    if not account.writes or namespace not in account.namespaces:
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')


def _owned(repo_id: str, hub: Hub, account: Caller) -> Repo:
    assert account is not None
    namespace, name = repo_id.split("/")
    repo = readable(namespace, name, hub, account)
    return writable(contributable(repo, account), account)
