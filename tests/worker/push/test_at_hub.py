"""One commit on a Hub, whatever goes wrong around it: the real client, a real server, faults on demand."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from hqq_core.errors import Cancelled
from service.common.errors import HubError, HubUnavailable, LeaseLost, NamespaceNotAllowed, RepoExists, TokenRefused
from tests.fakehub.server import FakeHub
from tests.worker.push.conftest import MakeFiles
from worker.hub import Endpoint, Hub
from worker.hub.child import _error
from worker.hub.faults import describe
from worker.hub.operations import OPERATIONS
from worker.push.at_hub import TRIES, HubPush, HubTarget, Watch
from worker.push.files import PushFile

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
JOB = "job_01JAAAAAAAAAAAAAAAAAAAAAAA"
REPO = "team-a/tiny"
CARD = b"---\nlicense: mit\n---\n# tiny\n"


class InProcess(Hub):
    """The child's operations without a child: the same client, many times faster."""

    def call(self, op: str, *, look: Callable[[], None], progress: Any = None, **arguments: Any) -> Any:
        look()
        try:
            api = HfApi(self.endpoint.url, token=self._token or False)
            return OPERATIONS[op](api, progress=progress or (lambda nbytes: None), **arguments)
        except Exception as error:
            raise _error(**describe(error, {"token": self._token, **arguments})) from error


@pytest.fixture
def hub(fakehub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> InProcess:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    return InProcess(Endpoint(fakehub.endpoint, xet=False), fakehub.write_token)


class Bench:
    """A result, and pushes of it."""

    def __init__(self, fakehub: FakeHub, hub: Hub, files: list[PushFile]) -> None:
        self.fakehub = fakehub
        self.hub = hub
        self.files = files
        self.pauses: list[float | None] = []
        self.told: list[int] = []

    def push(self, job_id: str = JOB, *, fence: Callable[[], None] = lambda: None, **target: Any) -> HubPush:
        watch = Watch(lambda: None, self.told.append, fence, lambda attempt, asked: self.pauses.append(asked))
        return HubPush(self.hub, HubTarget(REPO, **target), job_id, watch)

    def run(self, job_id: str = JOB, **options: Any) -> dict[str, Any]:
        return self.push(job_id, **options).run(self.files, ["hqq"])

    def landed(self, job_id: str = JOB) -> int:
        """Commits of this job, on all branches and pull requests, each counted once."""
        repo = self.fakehub.repo(REPO)
        return sum(f"Halfquad-Job: {job_id}" in commit.message.splitlines() for commit in repo.commits.values())

    def there(self, revision: str = "main") -> dict[str, bytes]:
        files = {name: path.read_bytes() for name, path in self.fakehub.files(REPO, revision).items()}
        return {name: content for name, content in files.items() if name != ".gitattributes"}

    def expected(self) -> dict[str, bytes]:
        return {file.name: Path(file.path).read_bytes() for file in self.files}


def contents(made: str = "new", **more: bytes) -> dict[str, bytes]:
    files = {"model.safetensors": made.encode() * 1000, "config.json": b"{}", "README.md": CARD, **more}
    manifest = {"files": [{"name": name} for name in files], "made": made}
    return {**files, "halfquad_manifest.json": json.dumps(manifest).encode()}


@pytest.fixture
def bench(fakehub: FakeHub, hub: InProcess, make_files: MakeFiles) -> Bench:
    return Bench(fakehub, hub, make_files("new", contents()))


def test_one_commit_holds_everything(bench: Bench) -> None:
    told = bench.run()
    newest, initial = bench.fakehub.commits(REPO)
    assert told == {"url": f"{bench.fakehub.endpoint}/{REPO}", "commit": newest.oid, "pull_request": None}
    assert newest.parent == initial.oid
    assert bench.there() == bench.expected()
    assert bench.told[-1] == sum(file.nbytes for file in bench.files)
    assert bench.run() == told, "again: found, nothing sent"
    assert bench.landed() == 1


def test_folders_of_several_recipes(bench: Bench, make_files: MakeFiles) -> None:
    several = {f"{folder}/{name}": content for folder in ("hqq", "mlx") for name, content in contents().items()}
    bench.files = make_files("several", {**several, "README.md": CARD})
    bench.run(private=True)
    assert bench.there() == bench.expected()
    assert bench.fakehub.repo(REPO).private


def test_branch_of_its_own_begins_empty(bench: Bench, make_files: MakeFiles) -> None:
    bench.run("job_01JBBBBBBBBBBBBBBBBBBBBBBB")
    bench.files = make_files("other", {"other.txt": b"other"})
    told = bench.run(branch="4-bit")
    assert told["url"].endswith(f"{REPO}/tree/4-bit")
    assert bench.there("4-bit") == {"other.txt": b"other"}
    assert "other.txt" not in bench.there()


COMMIT = rf"/{REPO}/commit/"
FAULTS: dict[str, dict[str, Any]] = {
    "500 after it was taken": {"status": 500, "after": True},
    "reset after it was taken": {"reset": True, "after": True},
    "500 before": {"status": 500},
    "reset before": {"reset": True},
    "409": {"status": 409, "message": "Another commit operation is in progress"},
    "412": {"status": 412, "message": "A commit has happened since"},
    "429": {"status": 429, "retry_after_s": 7},
    "503": {"status": 503, "retry_after_s": 2},
}


ALONE = [*itertools.product(FAULTS)]
PAIRS = [pair for pair in itertools.product(FAULTS, FAULTS) if "taken" not in pair[0]]
OF_PULL_REQUESTS = [*ALONE, *(pair for pair in PAIRS if pair[1] == "500 after it was taken")]


@pytest.mark.parametrize(
    ("create_pr", "faults"),
    [*itertools.product([False], [*ALONE, *PAIRS]), *itertools.product([True], OF_PULL_REQUESTS)],
    ids=lambda value: " then ".join(value) if isinstance(value, tuple) else "pull request" if value else "branch",
)
def test_commit_lands_once_under_faults(bench: Bench, faults: tuple[str, ...], create_pr: bool) -> None:
    if create_pr:
        bench.fakehub.add_repo(REPO)
    for nth, name in enumerate(faults, 1):
        bench.fakehub.faults.add(COMMIT, method="POST", nth=nth, **FAULTS[name])
    told = bench.run(create_pr=create_pr)
    assert bench.landed() == 1
    revision = "refs/pr/1" if create_pr else "main"
    assert bench.there(revision) == bench.expected()
    assert told["commit"] == bench.fakehub.commits(REPO, revision)[0].oid
    sent = len(bench.fakehub.requests.find(COMMIT, "POST"))
    assert len(bench.pauses) == sent - 1
    asked = {"429": 7, "503": 2}
    taken = next((index for index, name in enumerate(faults) if "taken" in name), len(faults))
    assert bench.pauses == [asked.get(name) for name in faults[:taken]]


def test_hub_that_stays_down_is_given_up_with_what_it_asked_for(bench: Bench) -> None:
    bench.fakehub.faults.add(COMMIT, method="POST", count=None, status=429, retry_after_s=9)
    with pytest.raises(HubUnavailable) as raised:
        bench.run()
    assert raised.value.retry_after_s == 9
    assert len(bench.pauses) == TRIES - 1
    bench.fakehub.faults.clear()
    bench.run()
    assert bench.landed() == 1


def test_refused_commit_is_not_tried_again(bench: Bench) -> None:
    bench.fakehub.faults.add(COMMIT, method="POST", count=None, status=403, message="no")
    with pytest.raises(HubError) as raised:
        bench.run()
    assert not raised.value.retryable
    assert len(bench.fakehub.requests.find(COMMIT, "POST")) == 1


def test_somebody_commits_in_between(bench: Bench) -> None:
    """The head moves after it was looked at: refused by the Hub, looked at again."""
    moved = iter([True])

    def fence() -> None:
        if next(moved, False):
            bench.fakehub.commit(REPO, {"theirs.txt": b"theirs"})

    with pytest.raises(RepoExists, match=r"1 files that are not this job's"):
        bench.run(fence=fence)
    moved = iter([True])
    bench.run(fence=fence, overwrite=True)
    assert bench.landed() == 1
    assert bench.there() == {**bench.expected(), "theirs.txt": b"theirs"}


@pytest.mark.parametrize("create_pr", [False, True], ids=["branch", "pull request"])
def test_zombie_that_passed_the_fence_lands_nothing(bench: Bench, create_pr: bool) -> None:
    """A start that was taken over wakes between its fence and its commit, when the other has published."""
    bench.fakehub.add_repo(REPO)
    others: list[dict[str, Any]] = []

    def taken_over() -> None:
        if not others:
            others.append({})
            others[0] = bench.run(create_pr=create_pr)

    assert bench.run(fence=taken_over, create_pr=create_pr)["commit"] == others[0]["commit"]
    assert bench.landed() == 1
    if create_pr:
        assert [one.status for one in bench.fakehub.repo(REPO).discussions] == ["open", "closed"], "the second is empty"


@pytest.mark.parametrize("stop", [LeaseLost("taken over"), Cancelled("cancelled")], ids=["lease lost", "cancelled"])
def test_fence_that_does_not_hold_publishes_nothing(bench: Bench, stop: Exception) -> None:
    def fence() -> None:
        raise stop

    with pytest.raises(type(stop)):
        bench.run(fence=fence)
    assert bench.landed() == 0


@pytest.mark.parametrize("lost", [{"status": 500, "after": True}, {"reset": True, "after": True}], ids=["500", "reset"])
def test_pull_request_whose_answer_was_lost_is_found(bench: Bench, lost: dict[str, Any]) -> None:
    bench.fakehub.add_repo(REPO)
    bench.fakehub.faults.add("/discussions$", method="POST", **lost)
    with pytest.raises(HubUnavailable):
        bench.run(create_pr=True)
    told = bench.run(create_pr=True)
    (pull_request,) = bench.fakehub.repo(REPO).discussions
    assert told["pull_request"].endswith("/discussions/1")
    assert pull_request.status == "open"
    assert bench.there("refs/pr/1") == bench.expected()
    assert bench.there() == {}


def test_merged_pull_request_is_not_made_again(bench: Bench) -> None:
    bench.fakehub.add_repo(REPO)
    told = bench.run(create_pr=True)
    HfApi(bench.fakehub.endpoint, token=bench.fakehub.write_token).merge_pull_request(REPO, 1, repo_type="model")
    assert bench.run(create_pr=True) == told
    assert len(bench.fakehub.repo(REPO).discussions) == 1


def test_others_are_in_the_way_unless_told(bench: Bench, make_files: MakeFiles) -> None:
    files = bench.files
    bench.files = make_files("old", contents("old", **{"gone.safetensors": b"gone", "sub": b"sub"}))
    bench.run("job_01JBBBBBBBBBBBBBBBBBBBBBBB")
    bench.fakehub.commit(REPO, {"notes.txt": b"mine"})
    bench.files = files
    with pytest.raises(RepoExists, match=r"7 files that are not this job's"):
        bench.run()
    with pytest.raises(RepoExists):
        bench.push().check()
    bench.run(create_pr=True)
    assert bench.there("refs/pr/1") == {**bench.expected(), "notes.txt": b"mine"}
    bench.run("job_01JCCCCCCCCCCCCCCCCCCCCCCC", overwrite=True)
    assert bench.there() == {**bench.expected(), "notes.txt": b"mine"}, "only what the earlier manifest named is gone"
    assert ".gitattributes" in bench.fakehub.files(REPO)


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 404}], ids=str)
def test_earlier_manifest_that_does_not_come_is_not_taken_for_none(
    bench: Bench, make_files: MakeFiles, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what the earlier result had and the new one has not would stay."""
    monkeypatch.setattr("worker.hub.session.FIRST_WAIT_S", 0.0)
    files = bench.files
    bench.files = make_files("old", contents("old", **{"gone.safetensors": b"gone"}))
    bench.run("job_01JBBBBBBBBBBBBBBBBBBBBBBB")
    bench.files = files
    armed = bench.fakehub.faults.add(r"/resolve/.*/halfquad_manifest\.json$", count=None, **fault)
    with pytest.raises(HubError):
        bench.run(overwrite=True)
    assert armed.fired
    assert bench.landed() == 0
    bench.fakehub.faults.clear()
    bench.run(overwrite=True)
    assert bench.there() == bench.expected()


def test_looking_at_a_target_leaves_no_file(bench: Bench, tmp_path: Path) -> None:
    """A cache of the client's would outlive a worker that is killed."""
    bench.run()
    bench.run("job_01JBBBBBBBBBBBBBBBBBBBBBBB", overwrite=True)
    assert not (tmp_path / "cache").exists()


def test_private_result_does_not_go_to_a_public_repo(bench: Bench) -> None:
    bench.fakehub.add_repo(REPO)
    for options in ({}, {"overwrite": True}, {"create_pr": True}):
        with pytest.raises(RepoExists, match="public"):
            bench.run(private=True, **options)


def test_early_check(bench: Bench) -> None:
    bench.push().check()
    bench.hub = InProcess(bench.hub.endpoint, bench.fakehub.read_token)
    with pytest.raises(TokenRefused, match="only read"):
        bench.push().check()
    bench.hub = InProcess(bench.hub.endpoint, bench.fakehub.other_token)
    with pytest.raises(NamespaceNotAllowed, match="mallory"):
        bench.push().check()
    bench.hub = InProcess(bench.hub.endpoint, "hf_canary_wrong")
    with pytest.raises(HubError) as raised:
        bench.push().check()
    assert raised.value.code == "token_refused"
    assert not bench.fakehub.requests.find(method="POST"), "a check leaves nothing behind"
    with pytest.raises(KeyError):
        bench.fakehub.repo(REPO)


def test_upload_that_was_cut_off_sends_only_what_is_missing(bench: Bench, make_files: MakeFiles) -> None:
    shards = {f"model-{i}.safetensors": bytes([i]) * 1000 for i in range(4)}
    bench.files = make_files("shards", {**shards, "README.md": CARD})
    bench.fakehub.faults.add("/storage/", method="PUT", nth=3, count=None, status=403)
    with pytest.raises(HubError):
        bench.run()
    bench.fakehub.faults.clear()
    done = sum(request.status == 200 for request in bench.fakehub.requests.find("/storage/", "PUT"))
    bench.fakehub.requests.clear()
    bench.run()
    assert done == 2
    assert len(bench.fakehub.requests.find("/storage/", "PUT")) == len(shards) - done
    assert bench.there() == bench.expected()


def test_repository_that_has_moved_is_not_written_to(bench: Bench) -> None:
    bench.fakehub.add_repo(REPO)
    bench.fakehub.rename(REPO, "team-b/elsewhere")
    with pytest.raises(RepoExists, match="has moved to team-b/elsewhere"):
        bench.push(overwrite=True).check()


def test_cancel_after_a_pull_request_has_its_commit_comes_too_late(bench: Bench) -> None:
    bench.fakehub.add_repo(REPO)
    cancelled = []

    def look() -> None:
        if bench.landed():
            cancelled.append(True)
            raise Cancelled("the job is cancelling")

    watch = Watch(look, bench.told.append, lambda: None, lambda attempt, asked: None)
    told = HubPush(bench.hub, HubTarget(REPO, create_pr=True), JOB, watch).run(bench.files, ["hqq"])
    assert cancelled
    assert told["commit"]
    assert told["pull_request"]
