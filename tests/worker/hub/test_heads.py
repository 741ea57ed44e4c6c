import pytest

from service.common.errors import HubUnavailable, RepoGated, RepoNotFound, RevisionNotFound
from tests.fakehub.server import FakeHub
from tests.worker.hub.conftest import REPO, look
from worker.hub import Head, Hub


def test_the_head_is_that_of_the_branch_and_moves_with_it(fakehub: FakeHub, hub: Hub) -> None:
    first = fakehub.add_repo(REPO, private=True)
    assert hub.head(REPO, "main", look=look) == Head(REPO, first)
    second = fakehub.commit(REPO, {"config.json": "{}"})
    assert hub.head(REPO, "main", look=look).commit == second != first
    assert {request.path.split("/")[1] for request in fakehub.requests.find()} == {"api"}, "no file is asked for"


def test_an_old_name_leads_to_the_new_one(fakehub: FakeHub, hub: Hub) -> None:
    commit = fakehub.add_repo(REPO)
    fakehub.rename(REPO, "team-a/new")
    assert hub.head(REPO, "main", look=look) == Head("team-a/new", commit)


def test_what_cannot_be_read_has_no_head(fakehub: FakeHub, hub: Hub, stranger: Hub) -> None:
    fakehub.add_repo(REPO, private=True)
    fakehub.add_repo("team-b/gated", gated="manual")
    with pytest.raises(RevisionNotFound, match="no branch, tag or commit 'other'"):
        hub.head(REPO, "other", look=look)
    with pytest.raises(RepoNotFound, match="missing or private"):
        stranger.head(REPO, "main", look=look)
    with pytest.raises(RepoGated, match="accept its terms"):
        stranger.head("team-b/gated", "main", look=look)


def test_an_answer_without_a_commit_is_none(fakehub: FakeHub, hub: Hub) -> None:
    fakehub.add_repo(REPO)
    fakehub.faults.add("/api/models/", truncate_at=10, count=None)
    with pytest.raises(HubUnavailable):
        hub.head(REPO, "main", look=look)
