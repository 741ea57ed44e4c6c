"""Where a checkpoint comes from and where its result goes, as requests say it."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not listed
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, StrictBool, StringConstraints, Tag

from service.common.target_urls import TargetUrl

PLACES = ("source", "target")  # fields of a body that may hold one of several models
TAGS = ("folder", "hub", "url")  # of those models


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _repo_id(repo_id: str) -> str:
    validate_repo_id(repo_id)  # the Hub's own rules: no "--", no "..", no ".git" at the end
    return repo_id


def _git_name(name: str) -> str:
    if any(part.startswith(".") or part.endswith((".", ".lock")) for part in name.split("/")) or ".." in name:
        raise ValueError('no part of it may begin or end with ".", end with ".lock", or have ".."')
    if name.endswith("/") or "//" in name:
        raise ValueError("no part of it may be empty")
    return name


def _branch(name: str) -> str:
    if name.startswith("refs/"):
        raise ValueError('wanted the name of a branch, without "refs/"; create_pr opens a pull request')
    return name


NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
RepoId = Annotated[str, StringConstraints(pattern=rf"^({NAME}/)?{NAME}$"), AfterValidator(_repo_id)]
OwnedRepoId = Annotated[str, StringConstraints(pattern=rf"^{NAME}/{NAME}$"), AfterValidator(_repo_id)]
Revision = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,254}$"), AfterValidator(_git_name)
]
Branch = Annotated[Revision, AfterValidator(_branch)]
CredentialName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]


class FolderSource(Place):
    type: Literal["folder"]
    path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    """Absolute path of a safetensors checkpoint below one of the service's source roots."""


class HubSource(Place):
    """A repository of the service's Hub."""

    type: Literal["hub"] = "hub"
    repo_id: RepoId
    """`namespace/name`."""
    revision: Revision = "main"
    """A branch, tag or commit; what it stands for is settled once, when the job begins."""
    credential: CredentialName | None = None
    """Name of a credential of the service; null: its default, or nobody's."""
    keep: StrictBool = True
    """Keep weight files for later jobs, while there is room."""


class HubTarget(Place):
    """A repository of the service's Hub, made where it is not there."""

    repo_id: OwnedRepoId
    """`namespace/name`."""
    branch: Branch = "main"
    create_pr: StrictBool = False
    """Open a pull request in place of a commit to the branch."""
    private: StrictBool = False
    """Of a repository that is made."""
    credential: CredentialName | None = None
    """Name of a credential of the service; null: its default."""
    overwrite: StrictBool = False
    """Commit to a repository that has files already."""


class UrlTarget(Place):
    """A folder or bucket below one of the service's target URLs."""

    url: TargetUrl
    """Such as `s3://bucket/prefix` or `file:///srv/models/x`."""
    overwrite: StrictBool = False
    """Write where files are already."""


def _kind_of(known: dict[str, str], other: str) -> Callable[[Any], str]:
    """The tag of a place: its `type` if that is one, else by the field that one of them alone has."""

    def kind(value: Any) -> str:
        fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        if fields.get("type") in (*known.values(), other):
            return str(fields["type"])
        return next((tag for field, tag in known.items() if field in fields), other)

    return kind


Source = Annotated[
    Annotated[FolderSource, Tag("folder")] | Annotated[HubSource, Tag("hub")],
    Discriminator(_kind_of({"path": "folder"}, "hub")),
]
kind_of_target = _kind_of({"url": "url"}, "hub")
Target = Annotated[Annotated[HubTarget, Tag("hub")] | Annotated[UrlTarget, Tag("url")], Discriminator(kind_of_target)]
