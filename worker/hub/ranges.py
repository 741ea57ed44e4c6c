"""Bytes of a file in a repository, no more of them than were asked for, whatever is sent."""

import hashlib
import struct
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils._http import get_session, hf_raise_for_status

from hqq_core.errors import CheckpointError
from hqq_core.source_files import MAX_HEADER_NBYTES
from worker.hub import RemoteFile
from worker.hub.faults import HubFault
from worker.hub.session import patiently

GUESS_NBYTES = 100_000  # most headers are whole in this, as the Hub's own client supposes
PREFIX_NBYTES = 8
PIECE_NBYTES = 1 << 18


def read_file(api: HfApi, repo_id: str, commit: str, file: RemoteFile) -> bytes:
    """All of a small file, which is what the Hub lists; had a second time where it is not, and then `source_damaged`."""
    for _ in range(2):
        content = patiently(lambda: read_range(api, repo_id, commit, file.path, 0, file.nbytes))
        if file.nbytes == 0 or is_listed(file, git_hash(file.nbytes, content), hashlib.sha256(content)):
            return content
    raise damaged(repo_id, file)


def read_header(api: HfApi, repo_id: str, commit: str, file: RemoteFile) -> bytes:
    """Length prefix and header of a safetensors file; the length is within bounds, the rest is for the reader to check."""
    where = f"{repo_id}: {file.path}"
    if file.nbytes < PREFIX_NBYTES:
        raise CheckpointError(f"{where}: {file.nbytes} bytes are too few for a safetensors file: wanted 8 or more")
    first = min(file.nbytes, GUESS_NBYTES)
    head = patiently(lambda: read_range(api, repo_id, commit, file.path, 0, first))
    (length,) = struct.unpack("<Q", head[:PREFIX_NBYTES])
    if not 0 < length <= min(MAX_HEADER_NBYTES, file.nbytes - PREFIX_NBYTES):
        raise CheckpointError(
            f"{where}: header of {length} bytes in a file of {file.nbytes}: wanted 1 to {MAX_HEADER_NBYTES}, inside the file"
        )
    end = PREFIX_NBYTES + length
    if end > first:
        head += patiently(lambda: read_range(api, repo_id, commit, file.path, first, end))
    return head[:end]


def read_range(api: HfApi, repo_id: str, commit: str, path: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` (excluded) of a file, by one request."""
    if start == stop:
        return b""
    headers = {**api._build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(repo_id, path, revision=commit, endpoint=api.endpoint)
    received = bytearray()
    with get_session().stream("GET", url, headers=headers) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:
            raise HubFault("hub_unavailable", f"{api.endpoint} sends all of {path} where a range of it was asked for")
        for piece in response.iter_raw(PIECE_NBYTES):
            received += piece
            if len(received) >= stop - start:
                break
    if len(received) < stop - start:
        raise HubFault("hub_unavailable", f"{path}: its answer ended after {len(received)} of {stop - start} bytes")
    return bytes(received[: stop - start])


def git_hash(nbytes: int, content: bytes = b"") -> Any:
    """Begun as git begins the id of a blob of so many bytes."""
    return hashlib.sha1(b"blob %d\0" % nbytes + content, usedforsecurity=False)


def is_listed(file: RemoteFile, git: Any, sha256: Any) -> bool:
    """Whether what was hashed is the file as the Hub lists it."""
    return bool(sha256.hexdigest() == file.sha256 if file.sha256 else git.hexdigest() == file.blob_id)


def damaged(repo_id: str, file: RemoteFile) -> HubFault:
    wanted = f"sha256 {file.sha256}" if file.sha256 else f"git id {file.blob_id}"
    return HubFault(
        "source_damaged",
        f"{repo_id}: {file.path}: what comes is not the file of {file.nbytes} bytes and {wanted} that the Hub lists, twice",
    )
