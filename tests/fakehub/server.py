"""A Hub that runs: two loopback ports, a thread, and what tests do to it from within."""

import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import uvicorn

from tests.fakehub.app import create_app
from tests.fakehub.connections import Connections
from tests.fakehub.faults import Faults
from tests.fakehub.history import Commit, Repo
from tests.fakehub.requests import RequestLog
from tests.fakehub.state import GIT_ATTRIBUTES, Account, Hub, Limits

HOST = "127.0.0.1"
START_TIMEOUT_S = 30.0
WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_canary_write", "hf_canary_read", "hf_canary_other"


class FakeHub:
    """A running Hub.

    Its storage has a port of its own, as at the Hub: the client must not take its token there. Three tokens are known from the
    start: `write_token` and `read_token` of the user `alice`, who belongs to the organizations `team-a` and `team-b`, and
    `other_token` of the user `mallory`, who belongs to none and may write under her own name.
    """

    def __init__(self, folder: Path, *, port: int = 0, xet: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.state = Hub(folder, xet=xet)
        self.faults, self.requests = Faults(), RequestLog()
        self.write_token, self.read_token, self.other_token = WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN
        self.add_token(WRITE_TOKEN, "alice", ("team-a", "team-b"))
        self.add_token(READ_TOKEN, "alice", ("team-a", "team-b"), writes=False)
        self.add_token(OTHER_TOKEN, "mallory")
        connections = Connections()
        app = create_app(self.state, self.faults, self.requests, connections)
        config = uvicorn.Config(app, http=connections.protocol, log_config=None, access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._sockets = [_listen(port), _listen(0)]
        self.state.endpoint, self.state.storage_endpoint = (_url(each) for each in self._sockets)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": self._sockets}, daemon=True)

    @property
    def endpoint(self) -> str:
        return self.state.endpoint

    @property
    def storage_endpoint(self) -> str:
        return self.state.storage_endpoint

    def __enter__(self) -> "FakeHub":
        self._thread.start()  # connections made by now wait in the listening sockets
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        for each in self._sockets:
            each.close()

    @property
    def limits(self) -> Limits:
        return self.state.limits

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to have this as its Hub, without Xet, any token or any cache of the user's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_XET": "0" if self.state.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def add_token(self, token: str, user: str, organizations: tuple[str, ...] = (), *, writes: bool = True) -> None:
        self.state.tokens[token] = Account(user, organizations, writes)

    def add_repo(
        self,
        repo_id: str,
        folder: Path | None = None,
        *,
        private: bool = False,
        gated: Literal[False, "auto", "manual"] = False,
        disabled: bool = False,
    ) -> str:
        """A repo, with a folder's files as its second commit; its head."""
        repo = self.state.create(Repo(repo_id, private, gated, disabled), repo_id.split("/")[0])
        if folder is not None:
            files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
            self.commit(repo_id, files, message="Upload model")
        return repo.at("main").oid

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path | None],
        *,
        message: str = "Change files",
        description: str = "",
        branch: str = "main",
    ) -> str:
        """A commit by someone else, made without a request: contents, paths of files, or None to delete; its id."""
        repo = self.state.repos[repo_id]
        contents = {path: one.encode() if isinstance(one, str) else one for path, one in files.items()}
        changes = {path: None if one is None else self.state.add(repo, path, one) for path, one in contents.items()}
        author = repo_id.split("/")[0]
        return self.state.commit(repo, repo.branch(branch), changes, author, message, description).oid

    def rename(self, old: str, new: str) -> None:
        self.state.rename(old, new)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Path]:
        """Where the content of each file of a revision lies."""
        commit = self.state.repos[repo_id].at(revision)
        return {path: self.state.storage.path(entry) for path, entry in commit.files.items()}

    def contents(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision that someone put there: all but the .gitattributes of a new repo."""
        files = {path: file.read_bytes() for path, file in self.files(repo_id, revision).items()}
        if files.get(".gitattributes") == GIT_ATTRIBUTES.read_bytes():
            del files[".gitattributes"]
        return files

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first; the last is the one that the Hub makes with each repo."""
        return self.state.repos[repo_id].history(revision)

    def repo(self, repo_id: str) -> Repo:
        return self.state.repos[repo_id]


def _listen(port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((HOST, port))
    listening.listen(128)
    return listening


def _url(listening: socket.socket) -> str:
    return f"http://{HOST}:{listening.getsockname()[1]}"
