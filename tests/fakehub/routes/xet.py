"""Tokens for Xet: where the store is. A Hub without Xet has no such route."""

import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from tests.fakehub.access import CurrentHub, Downloadable, Offered
from tests.fakehub.errors import Refusal
from tests.fakehub.xet import XetStore

router = APIRouter()
VALID_S = 3600


def xet_store(hub: CurrentHub) -> XetStore:
    if hub.xet_store is None:
        raise Refusal(404, "Xet is not offered here")
    return hub.xet_store


Store = Annotated[XetStore, Depends(xet_store)]


@router.get("/api/models/{namespace}/{name}/xet-read-token/{revision}")
def read_token(store: Store, repo: Downloadable, response: Response) -> dict[str, Any]:
    return _token(store.reading_url(), response)


@router.get("/api/models/{namespace}/{name}/xet-write-token/{revision}")
def write_token(store: Store, repo: Offered, response: Response) -> dict[str, Any]:
    return _token(store.writing_url(), response)


def _token(url: str, response: Response) -> dict[str, Any]:
    """The same in the body, for hf_xet, and in headers, for huggingface_hub."""
    token, expires = uuid.uuid4().hex, int(time.time()) + VALID_S
    response.headers["X-Xet-Cas-Url"] = url
    response.headers["X-Xet-Access-Token"] = token
    response.headers["X-Xet-Token-Expiration"] = str(expires)
    return {"casUrl": url, "accessToken": token, "exp": expires}
