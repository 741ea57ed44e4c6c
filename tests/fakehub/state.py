"""What a Hub knows: repos, tokens, limits. Kept as JSON below its folder, so that a Hub run by hand can be started again."""

import fnmatch
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from tests.fakehub.errors import Refusal
from tests.fakehub.history import MAIN, Commit, Entry, Repo, lfs_entry
from tests.fakehub.storage import Storage
from tests.fakehub.xet import XetStore

_REPO = TypeAdapter(Repo)

GIT_ATTRIBUTES = Path(__file__).parent / "default.gitattributes"  # those of a new model repo at the Hub


@dataclass(frozen=True)
class Account:
    """Whom a token stands for: a user, the organizations it belongs to, and whether this token may write."""

    user: str
    organizations: tuple[str, ...] = ()
    writes: bool = True

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.user, *self.organizations)


@dataclass
class Limits:
    """What the Hub decides about sizes; tests make them small."""

    page_nitems: int = 1000
    regular_nbytes: int = 5 * 2**20  # larger files go to LFS
    multipart_nbytes: int = 16 * 2**20  # larger objects are uploaded in parts
    part_nbytes: int = 8 * 2**20


@dataclass
class Hub:
    """All of it; `lock` is held while anything is changed."""

    folder: Path
    xet: bool = False
    endpoint: str = ""
    storage_endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, Account] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.storage = Storage(self.folder / "objects")
        self.xet_store = XetStore(self.folder / "xet") if self.xet else None
        (self.folder / "repos").mkdir(exist_ok=True)
        for path in (self.folder / "repos").glob("*.json"):
            repo = _REPO.validate_json(path.read_bytes())
            self.repos[repo.id] = repo

    def create(self, repo: Repo, author: str) -> Repo:
        """A repo with its first commit, which the Hub makes by itself."""
        with self.lock:
            if repo.id in self.repos:
                raise Refusal(409, "You already created this model repo", url=f"{self.endpoint}/{repo.id}")
            self.renamed.pop(repo.id, None)
            attributes = self.storage.add_blob(GIT_ATTRIBUTES.read_bytes())
            repo.append(MAIN, {".gitattributes": attributes}, author, "initial commit")
            self.repos[repo.id] = repo
            self.save(repo)
        return repo

    def remove(self, repo: Repo) -> None:
        with self.lock:
            del self.repos[repo.id]
            self._path(repo.id).unlink()

    def rename(self, old: str, new: str) -> None:
        """The old id goes on as a redirect."""
        with self.lock:
            repo = self.repos.pop(old)
            self._path(old).unlink()
            repo.id = new
            self.repos[new] = repo
            self.renamed = {name: new if target == old else target for name, target in self.renamed.items()} | {
                old: new
            }
            self.save(repo)

    def save(self, repo: Repo) -> None:
        self._path(repo.id).write_bytes(_REPO.dump_json(repo))

    def add(self, repo: Repo, path: str, content: bytes | Path) -> Entry:
        """A file's content, put where the repo's rules want it."""
        nbytes = len(content) if isinstance(content, bytes) else content.stat().st_size
        if not nbytes or not self.wants_lfs(repo, path, nbytes):
            return self.storage.add_blob(content if isinstance(content, bytes) else content.read_bytes())
        partial = self.storage.partial / uuid.uuid4().hex
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            shutil.copyfile(content, partial)  # its owner may change it
        return self._own(repo, partial)

    def object(self, repo: Repo, sha256: str) -> Entry | None:
        """What a commit may name: an LFS object of the repo, or one that came by Xet."""
        partial = self.storage.partial / uuid.uuid4().hex
        if sha256 not in repo.objects and self.xet_store and self.xet_store.fetch(sha256, partial):
            return self._own(repo, partial)
        return repo.objects.get(sha256)

    def _own(self, repo: Repo, partial: Path) -> Entry:
        """Make a file an LFS object of the repo, in Xet, too, where that is offered."""
        nbytes, xet_hash = partial.stat().st_size, self.xet_store.add(partial) if self.xet_store else None
        sha256 = self.storage.add_object(partial)
        entry = repo.objects[sha256] = lfs_entry(sha256, nbytes, xet_hash)
        return entry

    def commit(
        self, repo: Repo, ref: str, changes: Mapping[str, Entry | None], author: str, title: str, message: str = ""
    ) -> Commit:
        """A commit at the head of `ref`; None deletes."""
        with self.lock:
            files = {**repo.commits[repo.refs[ref]].files, **changes}
            kept = {path: entry for path, entry in files.items() if entry is not None}
            commit = repo.append(ref, kept, author, title, message)
            self.save(repo)
        return commit

    def wants_lfs(self, repo: Repo, path: str, nbytes: int, sample: bytes = b"") -> bool:
        """By the repo's .gitattributes, by size, and for anything that is no text."""
        attributes = repo.at("main").files.get(".gitattributes")
        lines = self.storage.path(attributes).read_text().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line.split()]
        named = any(fnmatch.fnmatch(path, each) or fnmatch.fnmatch(Path(path).name, each) for each in patterns)
        return named or nbytes > self.limits.regular_nbytes or b"\0" in sample

    def _path(self, repo_id: str) -> Path:
        return self.folder / "repos" / f"{repo_id.replace('/', '--')}.json"
