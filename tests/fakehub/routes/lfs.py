"""The LFS batch, and the storage behind it: signed URLs on an origin of their own, as at the Hub, where no token may come."""

import hashlib
import math
import uuid
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse

from tests.fakehub.access import Contributable, CurrentHub, JsonBody
from tests.fakehub.errors import Refusal
from tests.fakehub.history import Repo, lfs_entry
from tests.fakehub.state import Hub

router = APIRouter()


@router.post("/{namespace}/{name}.git/info/lfs/objects/batch")
def batch(body: JsonBody, repo: Contributable, hub: CurrentHub) -> dict[str, Any]:
    """How to upload each object; nothing to do for those that are there."""
    if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
        raise Refusal(400, "Only uploads by sha256 are offered")
    multipart = "multipart" in body.get("transfers", [])
    return {"transfer": "basic", "objects": [_instructions(hub, repo, one, multipart) for one in body["objects"]]}


def _instructions(hub: Hub, repo: Repo, wanted: dict[str, Any], multipart: bool) -> dict[str, Any]:
    sha256, nbytes = wanted["oid"], wanted["size"]
    answer: dict[str, Any] = {"oid": sha256, "size": nbytes}
    if sha256 in repo.objects:
        return answer
    verify = {"href": f"{hub.endpoint}/{repo.id}.git/info/lfs/verify"}
    if multipart and nbytes > hub.limits.multipart_nbytes:
        return answer | {"actions": {"upload": _parts(hub, repo, sha256, nbytes), "verify": verify}}
    return answer | {"actions": {"upload": {"href": signed_url(hub, "PUT", f"/storage/{sha256}")}, "verify": verify}}


def _parts(hub: Hub, repo: Repo, sha256: str, nbytes: int) -> dict[str, Any]:
    """Where each part goes, and where to say that all are there."""
    upload, part_nbytes = uuid.uuid4().hex, hub.limits.part_nbytes
    paths = {number: f"/storage/{sha256}/{upload}/{number}" for number in range(1, math.ceil(nbytes / part_nbytes) + 1)}
    header = {f"{number:05d}": signed_url(hub, "PUT", path) for number, path in paths.items()}
    complete = f"/api/complete_multipart/{sha256}/{upload}"
    href = f"{hub.endpoint}{complete}?signature={hub.storage.signature('POST', complete)}"
    return {"href": href, "header": {"chunk_size": str(part_nbytes), **header}}


def signed_url(hub: Hub, method: str, path: str) -> str:
    return f"{hub.storage_endpoint}{path}?signature={hub.storage.signature(method, path)}"


def signed(request: Request, hub: CurrentHub) -> None:
    """As S3 does: the signature in the URL is the one way in, and a token beside it is an error."""
    if "Authorization" in request.headers:
        raise Refusal(400, "Only one auth mechanism allowed: the storage must not be sent a token")
    method = "GET" if request.method == "HEAD" else request.method
    if request.query_params.get("signature") != hub.storage.signature(method, request.url.path):
        raise Refusal(403, "The request signature we calculated does not match the signature you provided.")


Signed = Depends(signed)


async def uploaded(request: Request, hub: CurrentHub) -> Path:
    """The request's body, on disk."""
    partial = hub.storage.partial / uuid.uuid4().hex
    try:
        with partial.open("wb") as file:
            async for chunk in request.stream():
                file.write(chunk)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


Uploaded = Annotated[Path, Depends(uploaded)]


@router.put("/storage/{sha256}", dependencies=[Signed])
def put(sha256: str, partial: Uploaded, hub: CurrentHub) -> Response:
    hub.storage.add_object(partial, sha256)
    return Response(headers={"ETag": f'"{sha256}"'})


@router.put("/storage/{sha256}/{upload}/{number}", dependencies=[Signed])
def put_part(sha256: str, upload: str, number: int, partial: Uploaded, hub: CurrentHub) -> Response:
    part = partial.replace(hub.storage.part_path(sha256, upload, number))
    with part.open("rb") as file:
        return Response(headers={"ETag": f'"{hashlib.file_digest(file, "md5").hexdigest()}"'})


@router.post("/api/complete_multipart/{sha256}/{upload}", dependencies=[Signed])
def complete(body: JsonBody, sha256: str, upload: str, hub: CurrentHub) -> dict[str, Any]:
    """Join the parts, whose ETags the client names again."""
    parts = [hub.storage.part_path(sha256, upload, part["partNumber"]) for part in body["parts"]]
    for part, announced in zip(parts, body["parts"], strict=True):
        if not part.is_file():
            raise Refusal(400, f"Part {announced['partNumber']} was not uploaded")
        with part.open("rb") as file:
            if announced["etag"].strip('"') != hashlib.file_digest(file, "md5").hexdigest():
                raise Refusal(400, f"Part {announced['partNumber']} has another ETag")
    hub.storage.add_object(hub.storage.join(parts), sha256)
    return {}


@router.post("/{namespace}/{name}.git/info/lfs/verify")
def verify(body: JsonBody, repo: Contributable, hub: CurrentHub) -> dict[str, Any]:
    """The object is there as a whole: from now on the repo may commit it."""
    path = hub.storage.lfs_path(body["oid"])
    if not path.is_file() or path.stat().st_size != body["size"]:
        raise Refusal(404, f"Object {body['oid']} of {body['size']} bytes is not there")
    with hub.lock:
        repo.objects[body["oid"]] = lfs_entry(body["oid"], body["size"])
        hub.save(repo)
    return {}


@router.api_route("/storage/{sha256}", methods=["GET", "HEAD"], dependencies=[Signed])
def get(sha256: str, hub: CurrentHub) -> FileResponse:
    return FileResponse(
        hub.storage.lfs_path(sha256), headers={"ETag": f'"{sha256}"'}, media_type="application/octet-stream"
    )
