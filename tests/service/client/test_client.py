import hashlib
import inspect
import subprocess
import sys

import httpx
import pytest

import service.client
from service.client import (
    ApiError,
    Client,
    ConflictError,
    ConnectionFailed,
    DownloadError,
    HalfquadClientError,
    InvalidRequestError,
    NotFoundError,
    ServerError,
    client,
    events,
)
from service.common.storage import ArtifactStore

WEIGHTS = bytes(range(256)) * 100


@pytest.fixture
def sdk(api_url):
    with Client(api_url) as sdk:
        yield sdk


@pytest.fixture
def submitted(sdk, root):
    return sdk.submit(root / "tiny", {"nbits": 4}, labels={"team": "search"}, priority=7)


@pytest.fixture
def done(sdk, submitted, api_hand, settings):
    api_hand.plan(10)
    api_hand.solve()
    store = ArtifactStore(settings.data_dir)
    store.create(submitted["id"])
    (store.output(submitted["id"]) / "model.safetensors").write_bytes(WEIGHTS)
    api_hand.finish(
        {"name": "model.safetensors", "nbytes": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    )
    return submitted["id"]


def test_public_names_are_all_there():
    public = {name for name, value in vars(service.client).items() if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(service.client, name))}
    assert public - modules == set(service.client.__all__)
    assert list(service.client.__all__) == sorted(service.client.__all__)


def test_several_recipes_are_one_job(sdk, root):
    job = sdk.submit(root / "tiny", recipes=[{"format": "mlx"}, {"format": "metal"}])
    assert [recipe["format"] for recipe in job["recipes"]] == ["mlx", "metal"]
    with pytest.raises(InvalidRequestError, match="recipe and recipes exclude each other"):
        sdk.submit(root / "tiny", {}, recipes=[{}])


def test_watches_come_and_go(hub_token, sdk):
    watches = [sdk.add_watch("acme/tiny", target=f"acme/tiny-{i}", interval_s=60 + i) for i in range(3)]
    assert [watch["target"]["create_pr"] for watch in watches] == [True] * 3
    assert [watch["id"] for watch in sdk.watches(limit=2)] == [watch["id"] for watch in watches[::-1]]
    changed = sdk.change_watch(watches[0]["id"], interval_s=600)
    assert (changed["interval_s"], changed["enabled"]) == (600, True)
    assert sdk.get_watch(watches[0]["id"]) == changed
    assert sdk.remove_watch(watches[0]["id"]) is None
    with pytest.raises(NotFoundError, match="there is no watch"):
        sdk.get_watch(watches[0]["id"])
    with pytest.raises(InvalidRequestError, match="recipe and recipes exclude each other"):
        sdk.add_watch("acme/tiny", {}, recipes=[{}], target="acme/x")


def test_client_loads_nothing_heavy():
    code = (
        "import service.client, sys; print({'torch', 'sqlalchemy', 'celery', 'pydantic', 'fastapi'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_every_error_is_a_client_error():
    errors = [
        value for value in vars(service.client).values() if inspect.isclass(value) and issubclass(value, Exception)
    ]
    assert all(issubclass(error, HalfquadClientError) for error in errors)


def test_submit_and_get(sdk, submitted):
    assert (submitted["status"], submitted["priority"], submitted["labels"]) == ("queued", 7, {"team": "search"})
    assert sdk.get(submitted["id"]) == submitted


def test_submit_with_a_key_makes_one_job(sdk, root):
    first, again = (sdk.submit(root / "tiny", idempotency_key="k") for _ in range(2))
    assert first == again


def test_submit_may_wait(sdk, root):
    assert sdk.submit(root / "tiny", wait_s=1)["status"] == "queued"


def test_list_goes_through_all_pages(sdk, root):
    ids = [sdk.submit(root / "tiny")["id"] for _ in range(5)]
    assert [job["id"] for job in sdk.list(limit=2)] == ids[::-1]
    assert [job["id"] for job in sdk.list(limit=2, order="asc", status=["queued"])] == ids


def test_cancel(sdk, submitted):
    assert sdk.cancel(submitted["id"])["status"] == "cancelled"
    assert [event.type for event in sdk.events(submitted["id"])] == ["status", "status", "done"]


def test_errors_are_typed(sdk, done):
    with pytest.raises(InvalidRequestError, match="source_not_allowed") as refusal:
        sdk.submit("/etc")
    assert refusal.value.errors[0].pointer == "/source/path"
    assert refusal.value.request_id.startswith("req_")
    with pytest.raises(NotFoundError, match="job_not_found"):
        sdk.get("job_x")
    with pytest.raises(ConflictError) as refusal:
        sdk.cancel(done)
    assert (refusal.value.code, refusal.value.status, refusal.value.retryable) == ("job_terminal", 409, False)


def test_no_service_is_no_connection():
    with Client("http://127.0.0.1:9") as sdk, pytest.raises(ConnectionFailed):
        sdk.get("job_x")


def test_answer_of_a_proxy_is_an_error_too():
    transport = httpx.MockTransport(lambda request: httpx.Response(502, text="<html>bad gateway"))
    with Client("http://proxy", transport=transport) as sdk, pytest.raises(ServerError, match="http_502") as error:
        sdk.get("job_x")
    assert isinstance(error.value, ApiError)
    assert error.value.retryable


def test_events_end_with_done(sdk, done):
    seen = list(sdk.events(done))
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert (seen[-1].type, seen[-1].data["status"]) == ("done", "succeeded")
    assert [event.seq for event in sdk.events(done, after=3)] == list(range(4, len(seen) + 1))
    assert list(sdk.events(done, after=len(seen))) == []
    assert sdk.wait(done)["status"] == "succeeded"


def test_events_come_back_after_the_connection_was_lost(sdk, done, monkeypatch):
    """The stream breaks off after two events, the service is away twice, then it goes on."""
    monkeypatch.setattr(client, "RECONNECT_S", 0)
    whole = list(sdk.events(done))
    parse, calls = events.parse, []

    def breaking(lines):
        calls.append(None)
        if len(calls) in (2, 3):
            raise httpx.ConnectError("away")
        for i, event in enumerate(parse(lines)):
            if len(calls) == 1 and i == 2:
                raise httpx.ReadError("broken off")
            yield event

    monkeypatch.setattr(client, "parse", breaking)
    assert list(sdk.events(done)) == whole
    assert len(calls) == 4


def test_events_give_up_in_time(monkeypatch):
    monkeypatch.setattr(client, "RECONNECT_S", 0)
    with Client("http://127.0.0.1:9") as sdk, pytest.raises(ConnectionFailed):
        list(sdk.events("job_x", give_up_s=0.05))


def test_events_of_no_job_are_not_waited_for(sdk):
    with pytest.raises(NotFoundError):
        list(sdk.events("job_x"))


def test_download_is_checked(sdk, done, tmp_path):
    (file,) = sdk.artifacts(done)
    target = sdk.download(done, file["name"], tmp_path / "out" / file["name"])
    assert target.read_bytes() == WEIGHTS
    assert [path.name for path in target.parent.iterdir()] == [file["name"]]


@pytest.mark.parametrize("nbytes", [1, 5000, len(WEIGHTS)])
def test_download_goes_on_where_it_was_cut_off(sdk, done, tmp_path, nbytes):
    (tmp_path / ".model.safetensors.part").write_bytes(WEIGHTS[:nbytes])
    assert sdk.download(done, "model.safetensors", tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_download_that_differs_is_refused(sdk, done, tmp_path, settings):
    path = ArtifactStore(settings.data_dir).output(done) / "model.safetensors"
    path.write_bytes(WEIGHTS[::-1])
    with pytest.raises(DownloadError, match="sha256"):
        sdk.download(done, "model.safetensors", tmp_path / "model.safetensors")
    assert [p.name for p in tmp_path.iterdir() if "safetensors" in p.name] == []


def test_download_of_nothing_leaves_nothing(sdk, done, tmp_path):
    with pytest.raises(NotFoundError):
        sdk.download(done, "gone.json", tmp_path / "out" / "gone.json")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def pushing(sdk, settings, api_hand):
    """A job from Hub to Hub whose result is whole."""
    job = sdk.submit("acme/tiny", target="acme/tiny-4bit")
    api_hand.plan(10)
    api_hand.solve()
    api_hand.finish()
    return job


@pytest.mark.usefixtures("hub_token")
def test_a_repository_is_a_source_and_a_target(sdk, root):
    job = sdk.submit("acme/tiny", target="acme/tiny-4bit")
    assert (job["source"]["repo_id"], job["target"]["repo_id"]) == ("acme/tiny", "acme/tiny-4bit")
    given = sdk.submit({"repo_id": "acme/tiny", "revision": "v2"}, target={"repo_id": "acme/x", "private": True})
    assert (given["source"]["revision"], given["target"]["private"]) == ("v2", True)
    assert sdk.submit(str(root / "tiny"))["source"] == {"type": "folder", "path": str(root / "tiny")}
    with pytest.raises(InvalidRequestError, match="target_not_allowed"):
        sdk.submit("acme/tiny", target="s3://bucket/x")


@pytest.mark.usefixtures("hub_token")
def test_a_failed_upload_is_tried_again(sdk, pushing, api_hand):
    api_hand.fail()
    assert sdk.wait(pushing["id"])["status"] == "failed"
    again = sdk.retry(pushing["id"], target="acme/other")
    assert (again["status"], again["target"]["repo_id"]) == ("running", "acme/other")
    with pytest.raises(ConflictError, match="job_not_retryable"):
        sdk.retry(pushing["id"])
    api_hand.push()
    events = list(sdk.events(pushing["id"]))
    assert [event.type for event in events].count("done") == 2
    assert events[-1].data["pushed"]["url"].startswith("https://hub.example/")
    assert sdk.wait(pushing["id"])["status"] == "succeeded"
