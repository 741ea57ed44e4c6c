"""Who asks, and what they may: the dependencies that every route names in its signature."""

import json
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, Request
from pydantic import AfterValidator

from tests.fakehub.errors import Refusal, repo_not_found
from tests.fakehub.history import Repo
from tests.fakehub.state import Account, Hub

# Routes are matched on the path as it came, so that a revision may hold %2F; each name is unquoted afterwards.
Name = Annotated[str, AfterValidator(unquote)]


def current_hub(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


CurrentHub = Annotated[Hub, Depends(current_hub)]


def caller(request: Request, hub: CurrentHub) -> Account | None:
    """The account of the request's token; None without one, refused where no account has that token."""
    header = request.headers.get("Authorization")
    if header is None:
        return None
    account = hub.tokens.get(header.removeprefix("Bearer "))
    if account is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return account


Caller = Annotated[Account | None, Depends(caller)]


def known(account: Caller) -> Account:
    if account is None:
        raise Refusal(401, "Invalid username or password.")
    return account


Known = Annotated[Account, Depends(known)]


def readable(namespace: Name, name: Name, hub: CurrentHub, account: Caller) -> Repo:
    """A repo whose existence the caller may know of."""
    repo = hub.repos.get(f"{namespace}/{name}")
    member = account is not None and namespace in account.namespaces
    if repo is None or (repo.private and not member):
        raise repo_not_found(account is not None)
    if repo.disabled:
        raise Refusal(403, "Access to this resource is disabled.")
    return repo


Readable = Annotated[Repo, Depends(readable)]


def downloadable(repo: Readable, account: Caller) -> Repo:
    """A repo whose files the caller may have."""
    member = account is not None and (repo.id.split("/")[0] in account.namespaces or account.user in repo.granted)
    if not repo.gated or member:
        return repo
    if account is None:
        words = "You must have access to it and be authenticated to access it. Please log in."
        raise Refusal(401, f"Access to model {repo.id} is restricted. {words}", "GatedRepo")
    words = "and you are not in the authorized list. Visit the model's page to ask for access."
    raise Refusal(403, f"Access to model {repo.id} is restricted {words}", "GatedRepo")


Downloadable = Annotated[Repo, Depends(downloadable)]


def contributable(repo: Readable, account: Known) -> Repo:
    """A repo to which the caller may offer changes."""
    if not account.writes:
        raise Refusal(403, "You don't have the rights to write: your token has the role read")
    return repo


Contributable = Annotated[Repo, Depends(contributable)]


def writable(repo: Contributable, account: Known) -> Repo:
    if repo.id.split("/")[0] not in account.namespaces:
        raise Refusal(403, f"You don't have the rights to write to {repo.id}")
    return repo


Writable = Annotated[Repo, Depends(writable)]


def offered(repo: Contributable, account: Known, create_pr: bool = False) -> Repo:
    """A repo to write to, or with create_pr one to offer a change to."""
    return repo if create_pr else writable(repo, account)


Offered = Annotated[Repo, Depends(offered)]


async def json_body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(await request.body() or b"{}")
    return body


JsonBody = Annotated[dict[str, Any], Depends(json_body)]


async def raw_body(request: Request) -> bytes:
    return await request.body()


RawBody = Annotated[bytes, Depends(raw_body)]
