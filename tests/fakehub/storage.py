"""Contents on disk, named by their hash: git blobs by sha1, LFS objects by sha256."""

import hashlib
import hmac
import secrets
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from tests.fakehub.errors import Refusal
from tests.fakehub.history import Entry, git_oid


class Storage:
    """Below one folder; what is written appears whole, under its name, or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder / "partial"
        self._secret = secrets.token_bytes(16)
        for name in ("git", "lfs", "partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def path(self, entry: Entry) -> Path:
        """Where a file's content lies."""
        return self.lfs_path(entry.sha256) if entry.sha256 else self.folder / "git" / entry.oid

    def lfs_path(self, sha256: str) -> Path:
        return self.folder / "lfs" / sha256

    def add_blob(self, content: bytes) -> Entry:
        entry = Entry(git_oid(content), len(content))
        partial = self.partial / uuid.uuid4().hex
        partial.write_bytes(content)
        partial.replace(self.path(entry))
        return entry

    def add_object(self, partial: Path, announced: str | None = None) -> str:
        """An LFS object, moved here, by its sha256; refused where another was announced."""
        with partial.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if announced not in (None, sha256):
            partial.unlink()
            raise Refusal(422, f"Uploaded bytes have sha256 {sha256}, announced was {announced}")
        partial.replace(self.lfs_path(sha256))
        return sha256

    def part_path(self, sha256: str, upload: str, number: int) -> Path:
        return self.partial / f"{sha256}-{upload}-{number}"

    def join(self, parts: Iterable[Path]) -> Path:
        """One file of the parts, which are gone then."""
        joined = self.partial / uuid.uuid4().hex
        with joined.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target)
                part.unlink()
        return joined

    def signature(self, method: str, path: str) -> str:
        """What makes a storage URL valid without a token, for one method and path."""
        return hmac.new(self._secret, f"{method} {path}".encode(), "sha256").hexdigest()
