"""A Hub, reached through a process of its own for every call: what it may do, and for how long, is the caller's to say."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from worker.hub.child import ask

Look = Callable[[], None]
Progress = Callable[[int], None]

logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """Where a Hub is, and whether its large files go by Xet."""

    url: str
    xet: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it; `sha256` where it is one of LFS, else `blob_id`, git's, says what it holds."""

    path: str
    nbytes: int
    sha256: str | None
    blob_id: str

    @property
    def is_weights(self) -> bool:
        return self.path.endswith(".safetensors")


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: the files to work with, and the names of the others."""

    repo_id: str
    commit: str
    private: bool
    files: tuple[RemoteFile, ...]
    left_out: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[RemoteFile, ...]:
        return tuple(file for file in self.files if file.is_weights)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True)
class Head:
    """Where a branch is: the name that its repository has now, and the commit."""

    repo_id: str
    commit: str


class Hub:
    """One endpoint and one credential, whose name is for messages only."""

    def __init__(self, endpoint: Endpoint, token: str | None, credential: str | None = None) -> None:
        self.endpoint = endpoint
        self.credential = credential
        self._token = token

    def __repr__(self) -> str:
        return f"Hub({self.endpoint.url!r}, credential={self.credential!r})"  # never the token

    def call(self, op: str, *, look: Look, progress: Progress | None = None, **arguments: Any) -> Any:
        """The result of one operation of `worker.hub.__main__`; `progress` gets the bytes that are done so far.

        Raises HubError for what the Hub or the network refused, CheckpointError for a repository that cannot be a source,
        StorageFullError, Unavailable where the process was lost, and whatever `look` raises: several times a second it is asked.
        """
        request = {"op": op, "token": self._token, "credential": self.credential, **arguments}
        return ask(request, self.endpoint.url, xet=self.endpoint.xet, look=look, progress=progress)

    def head(self, repo_id: str, revision: str, *, look: Look) -> Head:
        """The commit that `revision` is now; an old name of a repository leads to the new one."""
        return Head(**self.call("head", look=look, repo_id=repo_id, revision=revision))

    def resolve(self, repo_id: str, revision: str, *, look: Look) -> Snapshot:
        """The commit that `revision` is now, and the files there; an old name of a repository leads to the new one."""
        found = self.call("resolve", look=look, repo_id=repo_id, revision=revision)
        files = tuple(RemoteFile(**file) for file in found["files"])
        snapshot = Snapshot(found["repo_id"], found["commit"], found["private"], files, tuple(found["left_out"]))
        if snapshot.repo_id != repo_id:
            logger.info(
                "The repository has another name now.", action="repo_renamed", old=repo_id, new=snapshot.repo_id
            )
        return snapshot

    def fetch_small(self, snapshot: Snapshot, folder: Path, *, look: Look) -> None:
        """All files but the weights; of those the headers, in sparse files of the true size, read by Range.

        `Checkpoint.open(folder)`, its headers and a plan then are those of the whole checkpoint.
        """
        self.call(
            "fetch_small",
            look=look,
            repo_id=snapshot.repo_id,
            commit=snapshot.commit,
            files=[asdict(file) for file in snapshot.files],
            folder=str(folder),
        )

    def download(
        self, snapshot: Snapshot, file: RemoteFile, path: Path, *, look: Look, progress: Progress | None = None
    ) -> str:
        """One file at `path`, whole and as the Hub lists it, or not there; its sha256.

        What was had before a stop stays beside it under `part_of(path)`, and is gone on with: by one process at a time.
        """
        sha256: str = self.call(
            "download",
            look=look,
            progress=progress,
            repo_id=snapshot.repo_id,
            commit=snapshot.commit,
            file=asdict(file),
            path=str(path),
        )
        return sha256


def part_of(path: Path) -> Path:
    """Where a download to `path` collects what it has."""
    return path.with_name(f".{path.name}.part")
