"""A repo: its commits, each with all its files, and the names that point at them."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

from tests.fakehub.errors import Refusal, revision_not_found

MAIN = "refs/heads/main"
SHORTEST_PREFIX = 7


@dataclass(frozen=True)
class Entry:
    """A file as a commit holds it: a git blob, or a pointer to an LFS object where sha256 is given."""

    oid: str  # sha1 of the git blob, which for LFS is the pointer
    nbytes: int
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def pointer_nbytes(self) -> int:
        return len(lfs_pointer(self.sha256 or "", self.nbytes))

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


def git_oid(content: bytes) -> str:
    """The name git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, nbytes: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {nbytes}\n".encode()


def lfs_entry(sha256: str, nbytes: int, xet_hash: str | None = None) -> Entry:
    return Entry(git_oid(lfs_pointer(sha256, nbytes)), nbytes, sha256, xet_hash)


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]


@dataclass
class Event:
    """Something that happened in a discussion; `data` is what the client reads for this type."""

    id: str
    type: Literal["comment", "commit", "status-change"]
    created_at: str
    author: str
    data: dict[str, object]


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    created_at: str
    status: Literal["draft", "open", "closed", "merged"]
    is_pull_request: bool
    base: str = MAIN
    start: str = ""  # the commit that a pull request began at
    merge_commit: str | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """One model repo; refs by full name (refs/heads/main, refs/tags/v1, refs/pr/1) lead to commits."""

    id: str
    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    disabled: bool = False
    created_at: str = field(default_factory=lambda: now())
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    objects: dict[str, Entry] = field(default_factory=dict)  # LFS objects uploaded to this repo, by sha256
    granted: set[str] = field(default_factory=set)  # users who were let through the gate

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request; None where there is none of that name."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def branch(self, revision: str) -> str:
        """The full name of what can be committed to: a branch or a pull request."""
        ref = self.ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise revision_not_found(revision)
        return ref

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request or a (shortened) commit id."""
        ref = self.ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        found = [oid for oid in self.commits if oid.startswith(revision)] if len(revision) >= SHORTEST_PREFIX else []
        if len(found) != 1:
            raise revision_not_found(revision)
        return self.commits[found[0]]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commits = [self.at(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits

    def append(self, ref: str, files: dict[str, Entry], author: str, title: str, message: str = "") -> Commit:
        """A new commit at the head of `ref`."""
        parent = self.refs.get(ref)
        content = {path: asdict(entry) for path, entry in sorted(files.items())}
        date = now()
        identity = json.dumps([self.id, len(self.commits), parent, title, message, author, date, content])
        oid = hashlib.sha1(identity.encode(), usedforsecurity=False).hexdigest()
        commit = Commit(oid, parent, title, message, author, date, dict(sorted(files.items())))
        self.commits[oid] = commit
        self.refs[ref] = oid
        return commit

    def discussion(self, num: int) -> Discussion:
        if not 1 <= num <= len(self.discussions):
            raise Refusal(404, f"Discussion {num} not found")
        return self.discussions[num - 1]

    def pull_request_of(self, ref: str) -> Discussion | None:
        return next((one for one in self.discussions if one.is_pull_request and one.ref == ref), None)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
