"""Files by name: small ones at once, LFS ones through a redirect to the storage."""

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

from tests.fakehub.access import CurrentHub, Downloadable, Name
from tests.fakehub.errors import entry_not_found
from tests.fakehub.routes.lfs import signed_url

router = APIRouter()


@router.api_route("/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
def resolve(repo: Downloadable, revision: Name, path: Name, hub: CurrentHub) -> Response:
    """200 or 206 with the file, or 302 with what the client must know of it in the headers."""
    commit = repo.at(revision)
    entry = commit.files.get(path)
    if entry is None:
        raise entry_not_found(path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
    if entry.sha256 is None:
        return FileResponse(hub.storage.path(entry), headers=headers, media_type="text/plain")
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.nbytes)}
    if entry.xet_hash:
        route = f"{hub.endpoint}/api/models/{repo.id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": entry.xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
    location = signed_url(hub, "GET", f"/storage/{entry.sha256}")
    return Response(f"Found. Redirecting to {location}", 302, headers | {"Location": location})
