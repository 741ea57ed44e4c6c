"""Files of a repository, written to disk: whole and as the Hub lists them, or not at all."""

import errno
import hashlib
import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.file_download import get_hf_file_metadata, http_get, xet_get
from huggingface_hub.utils._runtime import is_xet_available
from huggingface_hub.utils._xet import XetFileData
from huggingface_hub.utils.tqdm import tqdm

from hqq_core.errors import CheckpointError
from worker.hub import RemoteFile, part_of
from worker.hub.ranges import damaged, git_hash, is_listed, read_file, read_header
from worker.hub.session import patiently

AT_ONCE = 8
CHUNK_NBYTES = 1 << 23
Progress = Callable[[int], None]


def fetch_small(
    api: HfApi, *, repo_id: str, commit: str, files: list[dict[str, Any]], folder: str, progress: Progress
) -> None:
    """The small files, and the headers of the weight files in sparse files of the true size, below `folder`."""
    remote = [RemoteFile(**file) for file in files]
    limit_file_size(max((file.nbytes for file in remote), default=0))

    def fetch(file: RemoteFile) -> int:
        read = read_header if file.is_weights else read_file
        content = read(api, repo_id, commit, file)
        _write(Path(folder, file.path), content, file.nbytes)
        return len(content)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        nbytes = 0
        for each in pool.map(fetch, remote):
            nbytes += each
            progress(nbytes)


def download(api: HfApi, *, repo_id: str, commit: str, file: dict[str, Any], path: str, progress: Progress) -> str:
    """One file, its size and hash checked; its sha256. A part of it that is there is gone on with."""
    remote, final = RemoteFile(**file), Path(path)
    part = part_of(final)
    for _ in range(2):
        patiently(lambda: _fetch(api, repo_id, commit, remote, part, progress))
        with part.open("rb") as file_:
            if sha256 := _listed_sha256(remote, file_):
                os.fsync(file_.fileno())
                part.replace(final)
                _sync_folder(final.parent)
                return sha256
        part.unlink()
    raise damaged(repo_id, remote)


def limit_file_size(nbytes: int) -> None:
    """Have the kernel refuse (EFBIG) to make any file of this process larger, whatever a Hub sends."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def _write(path: Path, content: bytes, nbytes: int) -> None:
    """`content` and then nothing, in a file of `nbytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    with part.open("wb") as file:
        file.write(content)
        file.truncate(nbytes)
    part.replace(path)


def _fetch(api: HfApi, repo_id: str, commit: str, file: RemoteFile, part: Path, progress: Progress) -> None:
    """Have as many bytes in `part` as the file has; what it held before is kept where the Hub can send the rest."""
    url = hf_hub_url(repo_id, file.path, revision=commit, endpoint=api.endpoint)
    headers = {**api._build_hf_headers(), "Accept-Encoding": "identity"}
    options: dict[str, Any] = {
        "expected_size": file.nbytes, "displayed_filename": file.path, "tqdm_class": _bar_class(progress), "headers": headers,
    }  # fmt: skip
    try:
        if xet := _xet_data(api, url):
            xet_get(incomplete_path=part, xet_file_data=xet, **options)
            return  # hashed as it comes, and Xet keeps books in files of its own
        limit_file_size(file.nbytes)
        with part.open("ab") as output:
            if output.tell() > file.nbytes:
                output.seek(0)
                output.truncate()
            http_get(url, output, resume_size=output.tell(), **options)
    except OSError as error:
        if error.errno != errno.EFBIG and "Consistency check failed" not in str(error):
            raise  # else it is of another size: its hash will tell
    except ValueError as error:  # the client's own bound
        raise CheckpointError(f"{repo_id}: {file.path}: {error}") from error


def _xet_data(api: HfApi, url: str) -> XetFileData | None:
    if not is_xet_available():
        return None
    return get_hf_file_metadata(url, token=api.token, endpoint=api.endpoint, retry_on_errors=True).xet_file_data


def _bar_class(progress: Progress) -> type[tqdm]:
    """What the client takes for a progress bar."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
            self.nbytes = kwargs.get("initial", 0)

        def update(self, n: float | None = 1) -> None:
            self.nbytes += int(n or 0)
            progress(self.nbytes)

        def update_transfer(self, n: float) -> None:
            """Bytes on the wire: Xet has a second bar for them otherwise."""

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            """Their rate."""

    return Bar


def _listed_sha256(remote: RemoteFile, file: BinaryIO) -> str | None:
    """The sha256 of an open file where it is what the Hub lists."""
    git, sha256 = git_hash(remote.nbytes), hashlib.sha256()
    while piece := file.read(CHUNK_NBYTES):
        sha256.update(piece)
        if remote.sha256 is None:
            git.update(piece)
    return sha256.hexdigest() if file.tell() == remote.nbytes and is_listed(remote, git, sha256) else None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
