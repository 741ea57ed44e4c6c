"""Pull requests, from a commit and opened first."""

import pytest
from huggingface_hub import CommitOperationAdd, DiscussionComment, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
)

from tests.fakehub.server import FakeHub

REPO = "team-a/model"


def test_a_pull_request_from_a_commit_is_merged(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.add_repo(REPO)
    offer = api.create_commit(
        REPO,
        [CommitOperationAdd("w.safetensors", b"weights")],
        commit_message="Better weights",
        commit_description="Halfquad-Job: 1",
        create_pr=True,
        token=fakehub.other_token,  # who may not write here
    )
    assert (offer.pr_num, offer.pr_revision) == (1, "refs/pr/1")
    assert fakehub.contents(REPO) == {}
    assert api.list_repo_commits(REPO, revision="refs/pr/1")[0].message == "Halfquad-Job: 1"
    (found,) = api.get_repo_discussions(REPO, discussion_type="pull_request", discussion_status="open")
    assert (found.title, found.author, found.git_reference) == ("Better weights", "mallory", "refs/pr/1")
    events = api.get_discussion_details(REPO, 1).events
    assert [event.type for event in events] == ["comment", "commit"]
    assert isinstance(events[0], DiscussionComment)
    assert events[0].content == "Halfquad-Job: 1"
    api.merge_pull_request(REPO, 1)
    assert fakehub.contents(REPO) == {"w.safetensors": b"weights"}
    assert api.get_discussion_details(REPO, 1).status == "merged"


def test_a_pull_request_opened_first_takes_commits_and_tells_conflicts(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.add_repo(REPO)
    opened = api.create_pull_request(REPO, "Offer", description="why")
    assert (opened.status, opened.git_reference, opened.target_branch) == ("draft", "refs/pr/1", "refs/heads/main")
    api.create_commit(REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="x", revision="refs/pr/1")
    assert fakehub.contents(REPO, "refs/pr/1") == {"a.txt": b"a"}
    fakehub.commit(REPO, {"a.txt": "other"})
    api.change_discussion_status(REPO, 1, "open")
    assert api.get_discussion_details(REPO, 1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match=r"Conflicting files: a\.txt"):
        api.merge_pull_request(REPO, 1)
    assert api.comment_discussion(REPO, 1, "so be it").content == "so be it"
    assert fakehub.contents(REPO) == {"a.txt": b"other"}
