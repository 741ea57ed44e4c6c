"""Each way a Hub says no, with its code and what to do about it."""

import socket
from pathlib import Path

import pytest

from hqq_core.errors import CheckpointError
from service.common.errors import (
    HubRefused,
    HubUnavailable,
    RepoDisabled,
    RepoGated,
    RepoNotFound,
    RevisionNotFound,
    TokenRefused,
    describe,
    is_final,
)
from tests.fakehub.server import FakeHub
from tests.worker.hub.conftest import REPO, look
from worker.hub import Endpoint, Hub


def test_a_private_repo_is_read_with_a_members_token_only(
    fakehub: FakeHub, hub: Hub, stranger: Hub, source: Path
) -> None:
    fakehub.add_repo(REPO, source, private=True)
    assert hub.resolve(REPO, "main", look=look).private
    other = Hub(hub.endpoint, fakehub.other_token, "mallory")
    for asking, who in ((stranger, "no credential"), (other, "credential 'mallory'")):
        for repo_id in (REPO, "team-a/missing"):
            with pytest.raises(
                RepoNotFound, match=rf"shows no model {repo_id}: it is missing or private.*asked with {who}"
            ):
                asking.resolve(repo_id, "main", look=look)


@pytest.mark.parametrize("token", [None, "hf_canary_unknown"])
def test_a_bare_401_over_http_is_told_apart_by_whether_there_was_a_token(token: str | None, fakehub: FakeHub) -> None:
    """The client leaves it as it is: its own rule looks for https."""
    fakehub.faults.add("/api/models/", status=401, message="Unauthorized")
    with pytest.raises(TokenRefused if token else RepoNotFound):
        Hub(Endpoint(fakehub.endpoint, xet=False), token).resolve(REPO, "main", look=look)


def test_a_gated_repo_says_where_its_terms_are(fakehub: FakeHub, stranger: Hub, source: Path) -> None:
    fakehub.add_repo(REPO, source, gated="manual")
    other = Hub(stranger.endpoint, fakehub.other_token, "mallory")
    for asking in (stranger, other):
        with pytest.raises(RepoGated, match=f"accept its terms at {fakehub.endpoint}/{REPO} with the account of"):
            asking.resolve(REPO, "main", look=look)
    fakehub.repo(REPO).granted.add("mallory")
    assert other.resolve(REPO, "main", look=look).commit == fakehub.commits(REPO)[0].oid


def test_disabled_unknown_revision_wrong_token_and_misnamed(fakehub: FakeHub, hub: Hub, source: Path) -> None:
    fakehub.add_repo("team-a/closed", disabled=True)
    fakehub.add_repo(REPO, source)
    with pytest.raises(RepoDisabled, match="team-a/closed is disabled"):
        hub.resolve("team-a/closed", "main", look=look)
    with pytest.raises(RevisionNotFound, match=f"{REPO} has no branch, tag or commit 'v9'"):
        hub.resolve(REPO, "v9", look=look)
    with pytest.raises(TokenRefused, match="does not know the token of credential 'old'"):
        Hub(hub.endpoint, "hf_canary_expired", "old").resolve(REPO, "main", look=look)
    with pytest.raises(HubRefused, match="Repo id must"):
        hub.resolve("a/b/c", "main", look=look)
    fakehub.faults.add("/api/models/", status=403, message="Not with this token")
    with pytest.raises(TokenRefused, match="Not with this token: use a token with more rights"):
        hub.resolve(REPO, "main", look=look)


def test_users_errors_are_final_and_the_hubs_are_not() -> None:
    final = [RepoNotFound, RepoGated, RepoDisabled, RevisionNotFound, TokenRefused, HubRefused]
    assert all(is_final(each("")) and describe(each("")).type == "user" for each in final)
    unavailable = describe(HubUnavailable("", retry_after_s=3))
    assert (unavailable.type, unavailable.retryable, is_final(HubUnavailable(""))) == ("upstream", True, False)


def test_a_renamed_repo_is_followed_and_known_by_its_new_name(
    fakehub: FakeHub, hub: Hub, source: Path, tmp_path: Path
) -> None:
    fakehub.add_repo("team-a/before", source)
    fakehub.rename("team-a/before", REPO)
    snapshot = hub.resolve("team-a/before", "main", look=look)
    assert snapshot.repo_id == REPO
    fakehub.requests.clear()
    hub.download(snapshot, snapshot.weights[0], tmp_path / "w", look=look)
    assert not fakehub.requests.find("team-a/before")


def test_what_is_no_source_is_refused_with_advice(fakehub: FakeHub, hub: Hub) -> None:
    fakehub.add_repo(REPO)
    refusals = [
        ({"pytorch_model.bin": b"pickled"}, r"no config\.json"),
        ({"config.json": "{}"}, r"pytorch_model\.bin: pickled weights are never opened: .* refs/pr/<number>"),
        ({"pytorch_model.bin": None}, r"no model\.safetensors and no model\.safetensors\.index\.json"),
        ({"a.safetensors": b"a", "b.safetensors": b"b"}, "2 safetensors files and no"),
    ]
    for files, message in refusals:
        fakehub.commit(REPO, files)
        with pytest.raises(CheckpointError, match=message):
            hub.resolve(REPO, "main", look=look)


def test_nobody_there_is_worth_another_try(stranger: Hub) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(HubUnavailable, match=f"{url} cannot be reached: ConnectError"):
            Hub(Endpoint(url, xet=False), None).resolve(REPO, "main", look=look)
