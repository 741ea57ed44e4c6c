"""Where a command finds a model: a folder, or a repository on the Hub, which is downloaded first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A folder, and the repository and commit that it was downloaded from, if it was."""

    folder: Path
    repo_id: str | None = None
    commit: str | None = None

    @property
    def origin(self) -> dict[str, str]:
        """For machines; empty for a folder."""
        return {"repo_id": self.repo_id, "commit": self.commit} if self.repo_id and self.commit else {}

    def results(self) -> list[str]:
        """Folders of the results: "" where there is one here, else those below, where there are such."""
        from hqq_core.checkpoint import MANIFEST

        if (self.folder / MANIFEST).is_file():
            return [""]
        return sorted(path.parent.name for path in self.folder.glob(f"*/{MANIFEST}")) or [""]


@contextmanager
def found(name: str, revision: str | None = None, patterns: list[str] | None = None) -> Iterator[Place]:
    """The folder of that name; where there is none, the repository, whose copy is gone afterwards.

    Of a repository only files that match `patterns` come; None: all. Endpoint and token are those of the user's environment, as
    the Hub's own client takes them.

    Raises
    ------
    CheckpointError
        There is neither, or the repository may not be read.
    OSError
        The Hub does not answer as it should.
    """
    from hqq_core.errors import CheckpointError

    if Path(name).is_dir() or not _is_repo_id(name):
        if revision is not None:
            raise CheckpointError(f"{name}: a revision is one of a repository on the Hub: wanted OWNER/NAME")
        yield Place(Path(name))
        return
    with tempfile.TemporaryDirectory(prefix="halfquad-") as folder:
        yield Place(Path(folder), name, _download(name, revision, folder, patterns))


def _is_repo_id(name: str) -> bool:
    """By the Hub's own rules, and with an owner: a name alone is a folder that is not there."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not listed

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _download(repo_id: str, revision: str | None, folder: str, patterns: list[str] | None) -> str:
    """Into a new folder; the commit that this is."""
    from huggingface_hub import HfApi, errors

    from hqq_core.errors import CheckpointError

    api = HfApi()
    try:
        commit = api.model_info(repo_id, revision=revision).sha
        if commit is None:
            raise OSError(f"{repo_id}: the Hub told no commit")
        api.snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=patterns)
        return commit
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{repo_id}: gated: accept its terms at {api.endpoint}/{repo_id}") from error
    except errors.RepositoryNotFoundError as error:
        told = (
            "no such folder here, and no such repository on the Hub, or none that your token (`hf auth login`) may read"
        )
        raise CheckpointError(f"{repo_id}: {told}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id}: no revision {revision!r}: wanted a branch, a tag or a commit") from error
    except errors.DisabledRepoError as error:
        raise CheckpointError(f"{repo_id}: disabled by the Hub") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # of the HTTP client, whichever the Hub's has
        raise OSError(f"{repo_id}: cannot be downloaded: {' '.join(str(error).split())}") from error
