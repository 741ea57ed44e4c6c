"""Every fault once, as the real client takes it."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import huggingface_hub.constants
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import BadRequestError, HfHubHTTPError

from tests.fakehub.faults import Faults
from tests.fakehub.server import FakeHub

REPO = "team-a/model"
COMMIT = "/api/models/.*/commit/"
INFO = "^/api/models/team-a/model$"


@pytest.fixture(autouse=True)
def repo(fakehub: FakeHub) -> str:
    fakehub.add_repo(REPO)
    return REPO


def push(api: HfApi, files: dict[str, bytes], description: str = "") -> None:
    operations = [CommitOperationAdd(*each) for each in files.items()]
    api.create_commit(REPO, operations, commit_message="push", commit_description=description)


@contextmanager
def process(fakehub: FakeHub, home: Path, call: str) -> Iterator[subprocess.Popen[str]]:
    """A client in a process of its own, killed at the end if it is still there."""
    script = f"import sys; from huggingface_hub import *; api = HfApi(token=sys.stdin.readline()); {call}"
    environment = fakehub.environment(home)
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, text=True, **pipes) as client:  # type: ignore[call-overload]
        assert client.stdin is not None
        client.stdin.write(fakehub.write_token)
        client.stdin.close()
        client.stdin = None
        try:
            yield client
        finally:
            client.kill()


@pytest.mark.parametrize("status", [401, 403, 404, 408, 409, 412, 429, 500, 502, 503])
def test_a_status_comes_once_and_nothing_was_done(status: int, fakehub: FakeHub, api: HfApi) -> None:
    fakehub.faults.add(COMMIT, status=status, message="Not now")
    with pytest.raises(HfHubHTTPError) as error:
        push(api, {"a.txt": b"a"})
    assert error.value.response.status_code == status
    assert len(fakehub.commits(REPO)) == 1
    push(api, {"a.txt": b"a"})
    assert len(fakehub.commits(REPO)) == 2


def test_a_status_with_the_code_of_a_class(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.faults.add(INFO, status=400, message="So not")
    with pytest.raises(BadRequestError, match="So not"):
        api.model_info(REPO)


def test_too_many_requests_tell_when_to_come_again(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.faults.add(INFO, status=429, retry_after_s=7, count=1)
    with pytest.raises(HfHubHTTPError, match="Retry after 7 seconds") as error:
        api.model_info(REPO)
    assert error.value.response.headers["Retry-After"] == "7"
    fakehub.faults.add("/tree/", status=429, retry_after_s=1)
    assert [each.path for each in api.list_repo_tree(REPO)] == [".gitattributes"]  # where the client waits by itself
    assert [request.status for request in fakehub.requests.find("/tree/")] == [429, 200]


def test_a_commit_that_was_taken_and_whose_answer_is_lost(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.faults.add(COMMIT, status=500, after=True)
    with pytest.raises(HfHubHTTPError) as error:
        push(api, {"a.txt": b"a"}, description="Halfquad-Job: 1")
    assert error.value.response.status_code == 500
    assert [commit.message for commit in fakehub.commits(REPO)] == ["Halfquad-Job: 1", ""]
    assert len(fakehub.requests.find(COMMIT, "POST")) == 1


@pytest.mark.parametrize("after", [False, True])
def test_a_connection_reset_before_and_after_the_commit(after: bool, fakehub: FakeHub, api: HfApi) -> None:
    fakehub.faults.add(COMMIT, reset=True, after=after)
    with pytest.raises(httpx2.TransportError):  # which of them depends on whether the body was sent already
        push(api, {"a.txt": b"a"})
    assert len(fakehub.commits(REPO)) == 1 + after
    (request,) = fakehub.requests.find(COMMIT)
    assert request.status is None or after


def test_a_body_cut_short_is_fetched_on_from_there(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    kept = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE  # the client keeps whole chunks only
    weights = os.urandom(kept + 1_000_000)
    fakehub.commit(REPO, {"w.safetensors": weights})
    fakehub.faults.add("^/storage/", truncate_at=kept + 1000)
    assert Path(api.hf_hub_download(REPO, "w.safetensors", cache_dir=tmp_path)).read_bytes() == weights
    first, second = fakehub.requests.find("^/storage/", "GET")
    assert (first.status, first.sent_nbytes) == (200, kept + 1000)
    assert (second.status, second.range) == (206, f"bytes={kept}-")


def test_a_body_cut_short_each_time_is_an_error(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.faults.add(INFO, truncate_at=10, count=None)
    with pytest.raises(httpx2.RemoteProtocolError, match="without sending complete message body"):
        api.model_info(REPO)


def test_a_slow_download_goes_on_while_others_are_served(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    fakehub.commit(REPO, {"w.safetensors": bytes(3_000_000)})
    fakehub.faults.add("^/storage/", download_rate=10_000)
    with process(fakehub, tmp_path / "home", f"api.hf_hub_download('{REPO}', 'w.safetensors')"):
        (request,) = fakehub.requests.wait("^/storage/", "GET")
        api.model_info(REPO)
    assert request.status == 200
    assert request.sent_nbytes < 3_000_000  # the client was killed with most of it to come
    assert Path(api.hf_hub_download(REPO, "w.safetensors", cache_dir=tmp_path)).stat().st_size == 3_000_000


@pytest.mark.parametrize("shared", [True, False])
def test_requests_share_a_line_or_have_one_each(shared: bool) -> None:
    faults = Faults()
    faults.add("/storage/", upload_rate=100.0, shared=shared, count=None)
    lines = [faults.meeting("PUT", "/storage/x")[0].line("upload_rate") for _ in range(2)]
    waits_s = [line.take(10_000) for line in lines if line is not None]
    assert [round(wait_s / 100) for wait_s in waits_s] == [1, 2 if shared else 1]
    assert faults.meeting("PUT", "/storage/x")[0].line("download_rate") is None


def test_a_slow_upload_that_is_killed_leaves_nothing(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(os.urandom(3_000_000))
    fakehub.faults.add("^/storage/", upload_rate=50_000)
    call = f"api.upload_file(path_or_fileobj=r'{tmp_path / 'w.safetensors'}', path_in_repo='w.safetensors', repo_id='{REPO}')"
    with process(fakehub, tmp_path / "home", call):
        (request,) = fakehub.requests.wait("^/storage/", "PUT")
        api.model_info(REPO)
    assert request.received_nbytes < 3_000_000
    assert len(fakehub.commits(REPO)) == 1
    push(api, {"w.safetensors": (tmp_path / "w.safetensors").read_bytes()})
    assert fakehub.files(REPO)["w.safetensors"].read_bytes() == (tmp_path / "w.safetensors").read_bytes()


def test_a_delay_after_the_commit_outlasts_a_killed_client(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    fakehub.faults.add(COMMIT, delay_s=600, after=True)
    call = f"api.upload_file(path_or_fileobj=b'a', path_in_repo='a.txt', repo_id='{REPO}')"
    with process(fakehub, tmp_path / "home", call) as client:
        (request,) = fakehub.requests.wait(COMMIT)
        while len(fakehub.commits(REPO)) == 1:
            assert client.poll() is None
        assert request.status is None
    assert len(fakehub.commits(REPO)) == 2


def test_the_nth_request_and_so_many_of_them(fakehub: FakeHub, api: HfApi) -> None:
    fault = fakehub.faults.add(INFO, method="GET", nth=2, count=2, status=503)
    answers = []
    for _ in range(5):
        try:
            answers.append(api.model_info(REPO).id)
        except HfHubHTTPError as error:
            answers.append(str(error.response.status_code))
    assert answers == [REPO, "503", "503", REPO, REPO]
    assert (fault.met, fault.fired) == (5, 2)


def test_chance_repeats_with_its_seed() -> None:
    def pattern(seed: int) -> list[bool]:
        faults = Faults()
        faults.add("x", status=500, count=None, probability=0.3, seed=seed)
        return [bool(faults.meeting("GET", "/x")) for _ in range(1000)]

    assert pattern(1) == pattern(1) != pattern(2)
    assert 250 < sum(pattern(1)) < 350


WRONG: dict[str, Callable[[Faults], object]] = {
    "without an effect": lambda faults: faults.add("x"),
    "begin at 1": lambda faults: faults.add("x", status=500, nth=0),
    "above 0 bytes": lambda faults: faults.add("x", download_rate=-1),
}


@pytest.mark.parametrize("words", WRONG)
def test_faults_that_mean_nothing_are_refused(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WRONG[words](Faults())


def test_other_processes_set_faults_and_read_the_log_by_the_control_route(fakehub: FakeHub, api: HfApi) -> None:
    def control(method: str, path: str, body: dict[str, object] | None = None) -> object:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{fakehub.endpoint}/_control/{path}", data, method=method)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    control("POST", "faults", {"path": INFO, "status": 503})
    with pytest.raises(HfHubHTTPError):
        api.model_info(REPO)
    (told,) = control("GET", "faults")  # type: ignore[misc]
    assert (told["status"], told["fired"]) == (503, 1)  # type: ignore[has-type]
    (request,) = control("GET", "requests?method=GET")  # type: ignore[misc]
    assert (request["path"], request["status"], request["authorized"]) == ("/api/models/team-a/model", 503, True)  # type: ignore[has-type]
    control("DELETE", "faults")
    assert fakehub.faults.all() == []
