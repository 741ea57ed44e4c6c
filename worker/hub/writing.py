"""What the child process does to write to a Hub, by the real client. Plain values in and out; nothing here decides.

`preupload` may be cut off and done again: objects are stored by their content, and what is there is not sent again.
`commit` is sent once and never again: whoever called it looks for the job's trailer before the next try.
"""

import io
import json
from collections.abc import Callable, Iterable
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from worker.hub import RemoteFile
from worker.hub.faults import HubFault
from worker.hub.ranges import read_file
from worker.hub.session import patiently

CHUNK_FILES = 64
CHUNK_NBYTES = 8 * 1024**3  # progress that the client does not tell is told after so much
COMMIT_FILES = 25_000
COMMIT_REGULAR_NBYTES = 10**9
MANIFEST = "halfquad_manifest.json"
MANIFEST_LIMIT = 64 * 1024**2
UPLOADS_AT_ONCE = 4

Progress = Callable[[int], None]


def whoami(api: HfApi, *, progress: Progress) -> dict[str, Any]:
    """Whose token it is, the namespaces that are theirs, and the token's role where the Hub says it."""
    found = patiently(api.whoami)
    role = ((found.get("auth") or {}).get("accessToken") or {}).get("role")
    return {"namespaces": [found["name"], *(org["name"] for org in found.get("orgs") or ())], "role": role}


def target(api: HfApi, *, repo_id: str, branch: str, trailer: str, progress: Progress) -> dict[str, Any]:
    """A branch as it is at one commit, `head`, and the commit of its history that has the trailer.

    A branch that is not there is seen as it would be made: at the first commit of main.
    """
    try:
        info = patiently(lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        return {
            "exists": False,
            "repo_id": repo_id,
            "private": None,
            "branch": False,
            "head": None,
            "found": None,
            "files": [],
            "named": {},
        }
    heads = {ref.name: ref.target_commit for ref in patiently(lambda: api.list_repo_refs(repo_id)).branches}
    head = heads.get(branch)
    commits = api.list_repo_commits(repo_id, revision=head or heads.get("main") or info.sha)
    found = next((commit.commit_id for commit in commits if _has_line(commit, trailer)), None) if head else None
    at = head or commits[-1].commit_id
    items = api.list_repo_tree(repo_id, recursive=True, revision=at)
    files = [_listed(item) for item in items if isinstance(item, RepoFile)]
    state = {"exists": True, "repo_id": info.id, "private": bool(info.private), "branch": head is not None, "head": at}
    named = _named(api, repo_id, at, files)
    return {**state, "found": found, "files": [file.path for file in files], "named": named}


def prepare(api: HfApi, *, repo_id: str, branch: str, private: bool, start: str | None, progress: Progress) -> None:
    """The repository and the branch are there, made where they were not; `start` is where a new branch begins."""
    patiently(lambda: api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True))
    if branch != "main":
        patiently(lambda: api.create_branch(repo_id, branch=branch, revision=start, exist_ok=True))


def preupload(api: HfApi, *, repo_id: str, revision: str, files: list[dict[str, Any]], progress: Progress) -> None:
    """Store the content of large files; regular ones go with the commit. `progress` is told bytes done of all files."""
    before, xet = 0, not constants.HF_HUB_DISABLE_XET  # which takes no opened files, and tells nothing of its progress
    once = {file["sha256"]: file for file in files}  # the client would read the same open file for both, at once
    for chunk in _chunks(once.values()):
        counters = _Counters(before, sum(file["nbytes"] for file in chunk), progress)
        additions = [_addition(file, None if xet else counters) for file in chunk]
        try:
            api.preupload_lfs_files(
                repo_id, additions, revision=revision, num_threads=UPLOADS_AT_ONCE, free_memory=False
            )
        finally:
            counters.close()
        before += counters.nbytes
        progress(before)
    progress(sum(file["nbytes"] for file in files))


def commit(
    api: HfApi,
    *,
    repo_id: str,
    revision: str,
    onto: str,
    files: list[dict[str, Any]],
    deletions: list[str],
    title: str,
    description: str,
    progress: Progress,
) -> dict[str, Any]:
    """One commit after the commit `onto`, if that is still the head: sent once, whatever is answered."""
    if len(files) > COMMIT_FILES:
        raise HubFault("hub_refused", f"{len(files)} files are more than the {COMMIT_FILES} of one commit")
    additions = [_addition(file) for file in files]
    api.preupload_lfs_files(
        repo_id, additions, revision=revision, num_threads=UPLOADS_AT_ONCE, free_memory=False
    )  # there already; the answer says which are regular
    regular = sum(addition.upload_info.size for addition in additions if addition._upload_mode == "regular")
    if regular > COMMIT_REGULAR_NBYTES:
        raise HubFault("hub_refused", f"{regular} bytes outside LFS: one commit has {COMMIT_REGULAR_NBYTES} at most")
    done = api.create_commit(
        repo_id,
        [*(CommitOperationDelete(name, is_folder=False) for name in deletions), *additions],
        commit_message=title,
        commit_description=description,
        revision=revision,
        parent_commit=onto,
    )
    return {"commit": done.oid}


def pull_requests(api: HfApi, *, repo_id: str, title: str, trailer: str, progress: Progress) -> list[dict[str, Any]]:
    """The pull requests of this title, the earliest first, each with its head and the commit that has the trailer."""
    listed = patiently(lambda: list(api.get_repo_discussions(repo_id, discussion_type="pull_request")))
    numbers = sorted((discussion.num, discussion.status) for discussion in listed if discussion.title == title)
    found = []
    for number, status in numbers:
        commits = api.list_repo_commits(repo_id, revision=f"refs/pr/{number}")
        commit = next((commit.commit_id for commit in commits if _has_line(commit, trailer)), None)
        found.append({"number": number, "status": status, "head": commits[0].commit_id, "found": commit})
    return found


def open_pull_request(api: HfApi, *, repo_id: str, title: str, description: str, progress: Progress) -> None:
    """A draft without a commit."""
    api.create_pull_request(repo_id, title=title, description=description, repo_type="model")


def set_status(api: HfApi, *, repo_id: str, number: int, status: str, progress: Progress) -> None:
    """Open or close a pull request."""
    wanted: Literal["open", "closed"] = "open" if status == "open" else "closed"
    patiently(lambda: api.change_discussion_status(repo_id, number, wanted, repo_type="model"))


def _has_line(commit: Any, line: str) -> bool:
    return line in f"{commit.title}\n{commit.message}".splitlines()


def _listed(item: RepoFile) -> RemoteFile:
    return RemoteFile(
        item.path,
        item.lfs.size if item.lfs else item.size,
        item.lfs.sha256 if item.lfs else None,
        item.blob_id,
    )


def _named(api: HfApi, repo_id: str, revision: str, files: list[RemoteFile]) -> dict[str, Any]:
    """The manifests of an earlier result: which files each names."""
    named: dict[str, Any] = {}
    for file in (file for file in files if file.path.rsplit("/", 1)[-1] == MANIFEST):
        # to no file of ours: one in the client's cache would outlive a SIGKILL
        content = read_file(api, repo_id, revision, file) if file.nbytes <= MANIFEST_LIMIT else b""
        try:
            named[file.path] = {"files": [{"name": entry["name"]} for entry in json.loads(content)["files"]]}
        except (ValueError, KeyError, TypeError, RecursionError):
            named[file.path] = {}  # somebody's file of that name; it goes, or is written anew, and nothing else
    return named


def _addition(file: dict[str, Any], counters: "_Counters | None" = None) -> CommitOperationAdd:
    addition = CommitOperationAdd(file["name"], file["path"])
    addition.upload_info.sha256 = bytes.fromhex(file["sha256"])  # known since the file was verified
    if counters is not None:
        addition.path_or_fileobj = counters.open(file["path"])
    return addition


def _chunks(files: Iterable[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for file in files:
        if chunk and (len(chunk) == CHUNK_FILES or sum(one["nbytes"] for one in chunk) >= CHUNK_NBYTES):
            yield chunk
            chunk = []
        chunk.append(file)
    if chunk:
        yield chunk


class _Counters:
    """The files of a chunk, opened; how far each has been read is what has been sent."""

    def __init__(self, before: int, nbytes: int, progress: Progress) -> None:
        self.nbytes = nbytes
        self._before = before
        self._progress = progress
        self._files: list[_Counted] = []

    def open(self, path: str) -> "_Counted":
        file = _Counted(path, self._tell)
        self._files.append(file)
        return file

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _tell(self) -> None:
        self._progress(self._before + min(self.nbytes, sum(file.furthest for file in self._files)))


class _Counted(io.BufferedReader):
    """A file that tells how far it was read."""

    def __init__(self, path: str, tell: Callable[[], None]) -> None:
        super().__init__(io.FileIO(path, "rb"))
        self.furthest = 0
        self._tell_all = tell

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(size)
        self.furthest = max(self.furthest, self.tell())
        self._tell_all()
        return block
