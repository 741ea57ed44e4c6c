"""Who may see, have and write what."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.fakehub.server import FakeHub

REPO = "team-a/model"


def test_whoami_tells_user_organizations_and_role(fakehub: FakeHub, api: HfApi) -> None:
    me = api.whoami()
    assert (me["name"], [one["name"] for one in me["orgs"]]) == ("alice", ["team-a", "team-b"])
    assert api.whoami(token=fakehub.read_token)["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as error:
        api.whoami(token="hf_unknown")
    assert error.value.response.status_code == 401


def test_private_repos_are_there_for_members_only(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    fakehub.add_repo(REPO, private=True)
    fakehub.commit(REPO, {"a.txt": "a"})
    assert Path(api.hf_hub_download(REPO, "a.txt", cache_dir=tmp_path, token=fakehub.read_token)).read_text() == "a"
    for token in (False, fakehub.other_token):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(REPO, token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(REPO, "a.txt", cache_dir=tmp_path / "none", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("team-a/missing", token=token)


def test_gated_repos_show_their_names_and_keep_their_files(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    fakehub.add_repo(REPO, gated="manual")
    fakehub.commit(REPO, {"a.txt": "a"})
    assert api.model_info(REPO, token=False).gated == "manual"
    for token in (False, fakehub.other_token):
        with pytest.raises(GatedRepoError):
            api.hf_hub_download(REPO, "a.txt", cache_dir=tmp_path, token=token)
        with pytest.raises(GatedRepoError):
            api.auth_check(REPO, token=token)
    fakehub.repo(REPO).granted.add("mallory")
    got = api.hf_hub_download(REPO, "a.txt", cache_dir=tmp_path, token=fakehub.other_token)
    assert Path(got).read_text() == "a"


def test_disabled_missing_and_misnamed(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    fakehub.add_repo(REPO)
    fakehub.add_repo("team-a/closed", disabled=True)
    with pytest.raises(DisabledRepoError):
        api.model_info("team-a/closed")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v9")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "a.txt", revision="0" * 40, cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "a.txt", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        api.model_info(REPO, token="hf_unknown")
    assert type(error.value) is HfHubHTTPError


WRITES: dict[str, Callable[[HfApi, str], Any]] = {
    "create": lambda api, token: api.create_repo("team-a/new", token=token),
    "delete": lambda api, token: api.delete_repo(REPO, token=token),
    "branch": lambda api, token: api.create_branch(REPO, branch="x", token=token),
    "commit": lambda api, token: api.create_commit(
        REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="x", token=token
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_needs_a_writing_token_of_a_member(write: str, fakehub: FakeHub, api: HfApi) -> None:
    head = fakehub.add_repo(REPO)
    for token in (fakehub.read_token, fakehub.other_token):
        with pytest.raises(HfHubHTTPError) as error:
            WRITES[write](api, token)
        assert error.value.response.status_code == 403
    assert (list(fakehub.state.repos), fakehub.commits(REPO)[0].oid) == ([REPO], head)


def test_a_renamed_repo_answers_to_its_old_name(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    fakehub.add_repo("team-a/before")
    fakehub.commit("team-a/before", {"w.safetensors": b"weights"})
    api.move_repo("team-a/before", REPO)
    assert api.model_info("team-a/before").id == REPO
    got = api.hf_hub_download("team-a/before", "w.safetensors", cache_dir=tmp_path)
    assert Path(got).read_bytes() == b"weights"
    api.create_commit("team-a/before", [CommitOperationAdd("v.safetensors", b"more")], commit_message="x")
    assert fakehub.contents(REPO) == {"w.safetensors": b"weights", "v.safetensors": b"more"}


def test_tokens_are_kept_nowhere(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    fakehub.add_repo(REPO)
    api.create_commit(REPO, [CommitOperationAdd("w.safetensors", b"weights")], commit_message="x")
    assert any(request.authorized for request in fakehub.requests.find())
    assert fakehub.write_token not in repr(fakehub.requests.find())
    kept = [path.read_bytes() for path in fakehub.state.folder.rglob("*") if path.is_file()]
    assert not any(fakehub.write_token.encode() in content for content in kept)
