"""Jobs from a Hub and to a Hub or URL, as far as the API goes."""

import hashlib
import json
import sqlite3

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.common.storage import ArtifactStore
from service.jobs import _fingerprint
from service.schemas import JobCreate
from tests.service.conftest import PUSHED

CANARY = "hf_canary_TheApiNeverShowsIt"
HUB = {"repo_id": "acme/tiny"}
SOURCE = {"type": "hub", "repo_id": "acme/tiny", "revision": "main", "credential": None, "keep": True}
TARGET = {
    "repo_id": "acme/tiny-4bit",
    "branch": "main",
    "create_pr": False,
    "private": False,
    "credential": None,
    "overwrite": False,
}


@pytest.fixture
def credentials(tmp_path):
    path = tmp_path / "credentials.json"
    path.write_text(
        json.dumps({"default": {"token": CANARY}, "team-a": {"token": CANARY + "A", "namespaces": ["team-a"]}})
    )
    path.chmod(0o600)
    return path


@pytest.fixture
def settings(settings, credentials):
    changes = {"credentials_file": credentials, "target_urls": ("s3://bucket/models", "file:///srv/models")}
    return settings.model_copy(update=changes)


@pytest.fixture
def submit(api):
    def submit(**body):
        response = api.post("/v1/jobs", json={"source": HUB} | body)
        assert response.status_code == 202, response.text
        return response.json()

    return submit


@pytest.fixture
def uploading(submit, api_hand, settings):
    """A job whose result is whole and waits for its upload."""
    job = submit(target={"repo_id": "acme/tiny-4bit"})
    api_hand.plan(10)
    api_hand.solve()
    store = ArtifactStore(settings.data_dir)
    store.create(job["id"])
    (store.output(job["id"]) / "config.json").write_bytes(b"{}")
    api_hand.finish({"name": "config.json", "nbytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()})
    return job["id"]


def shown(api, job_id):
    return api.get(f"/v1/jobs/{job_id}").json()


# What is taken


@pytest.mark.parametrize("type", [{}, {"type": "hub"}])
def test_a_repository_is_a_source(submit, type):
    job = submit(source=HUB | type)
    assert (job["source"], job["target"]) == (SOURCE, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"repo_id": "gpt2"},
        {"repo_id": "Acme_1/Tiny.v2-Instruct"},
        {"revision": "refs/pr/7"},
        {"revision": "a" * 40},
        {"revision": "v1.0+x/y_z"},
        {"credential": "team-a", "keep": False},
    ],
)
def test_what_a_hub_has_is_taken(submit, changes):
    assert submit(source=HUB | changes)["source"] == SOURCE | changes


def test_a_target_is_shown_whole(submit, api):
    job = submit(target={"repo_id": "acme/tiny-4bit"})
    assert job["target"] == TARGET
    assert shown(api, job["id"])["target"] == TARGET
    there = {"url": "s3://bucket/models/tiny/"}
    assert submit(target=there)["target"] == {"url": "s3://bucket/models/tiny", "overwrite": False}


def test_a_credential_may_write_to_its_namespaces(submit):
    target = {"repo_id": "Team-A/tiny", "credential": "team-a", "branch": "int4/x", "create_pr": True}
    assert submit(target=target)["target"] == TARGET | target


# What is refused


@pytest.mark.parametrize(
    ("change", "code", "pointer"),
    [
        ({"source": {}}, "missing", "/source/repo_id"),
        ({"source": None}, "model_attributes_type", "/source"),
        ({"source": "acme/tiny"}, "model_attributes_type", "/source"),
        ({"source": {"path": "/x"}}, "missing", "/source/type"),
        ({"source": {"type": "s3", "repo_id": "a/b"}}, "literal_error", "/source/type"),
        ({"source": {"type": ["hub"], "repo_id": "a/b"}}, "literal_error", "/source/type"),
        ({"source": HUB | {"token": "x"}}, "extra_forbidden", "/source/token"),
        ({"source": HUB | {"endpoint": "http://127.0.0.1"}}, "extra_forbidden", "/source/endpoint"),
        ({"source": HUB | {"path": "/x"}}, "missing", "/source/type"),
        ({"source": {"repo_id": "a/b/c"}}, "string_pattern_mismatch", "/source/repo_id"),
        ({"source": {"repo_id": "../etc"}}, "string_pattern_mismatch", "/source/repo_id"),
        ({"source": {"repo_id": "acme/tiny\n"}}, "string_pattern_mismatch", "/source/repo_id"),
        ({"source": {"repo_id": "acme/" + "x" * 97}}, "string_pattern_mismatch", "/source/repo_id"),
        ({"source": {"repo_id": "acme/a..b"}}, "value_error", "/source/repo_id"),
        ({"source": {"repo_id": "acme/a--b"}}, "value_error", "/source/repo_id"),
        ({"source": {"repo_id": "acme/tiny.git"}}, "value_error", "/source/repo_id"),
        ({"source": HUB | {"revision": ""}}, "string_pattern_mismatch", "/source/revision"),
        ({"source": HUB | {"revision": "-x"}}, "string_pattern_mismatch", "/source/revision"),
        ({"source": HUB | {"revision": "a b"}}, "string_pattern_mismatch", "/source/revision"),
        ({"source": HUB | {"revision": "a/../b"}}, "value_error", "/source/revision"),
        ({"source": HUB | {"revision": "a//b"}}, "value_error", "/source/revision"),
        ({"source": HUB | {"revision": "x.lock"}}, "value_error", "/source/revision"),
        ({"source": HUB | {"revision": None}}, "string_type", "/source/revision"),
        ({"source": HUB | {"credential": CANARY}}, "credential_unknown", "/source/credential"),
        ({"source": HUB | {"credential": "a b"}}, "string_pattern_mismatch", "/source/credential"),
        ({"source": HUB | {"keep": 1}}, "bool_type", "/source/keep"),
        ({"target": {}}, "missing", "/target/repo_id"),
        ({"target": "acme/tiny"}, "model_attributes_type", "/target"),
        ({"target": {"repo_id": "tiny"}}, "string_pattern_mismatch", "/target/repo_id"),
        ({"target": {"repo_id": "a/b", "branch": "refs/pr/1"}}, "value_error", "/target/branch"),
        ({"target": {"repo_id": "a/b", "token": "x"}}, "extra_forbidden", "/target/token"),
        ({"target": {"repo_id": "a/b", "url": "s3://bucket/models"}}, "extra_forbidden", "/target/repo_id"),
        ({"target": {"repo_id": "a/b", "credential": "team-b"}}, "credential_unknown", "/target/credential"),
        ({"target": {"repo_id": "a/b", "credential": "team-a"}}, "namespace_not_allowed", "/target/repo_id"),
        ({"target": {"url": "s3://bucket/other"}}, "target_not_allowed", "/target/url"),
        ({"target": {"url": "file:///srv/models/../x"}}, "value_error", "/target/url"),
        ({"target": {"url": "s3://k:s@bucket/models"}}, "string_pattern_mismatch", "/target/url"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(api, change, code, pointer):
    response = api.post("/v1/jobs", json={"source": HUB} | change)
    problem = response.json()
    assert response.status_code == 422, problem
    assert (problem["errors"][0]["code"], problem["errors"][0]["pointer"]) == (code, pointer)
    assert problem["code"] in (code, "request_invalid")
    assert api.get("/v1/jobs").json()["data"] == []


def test_a_target_needs_a_token(settings, migrated):
    with TestClient(create_app(settings.model_copy(update={"credentials_file": None}))) as api:
        problem = api.post("/v1/jobs", json={"source": HUB, "target": {"repo_id": "acme/tiny"}}).json()
        assert (problem["code"], problem["errors"][0]["pointer"]) == ("credential_unknown", "/target/credential")
        assert api.post("/v1/jobs", json={"source": HUB}).status_code == 202


def test_the_service_has_no_target_urls_unless_it_is_told(settings, migrated):
    with TestClient(create_app(settings.model_copy(update={"target_urls": ()}))) as api:
        problem = api.post("/v1/jobs", json={"source": HUB, "target": {"url": "s3://bucket/models"}}).json()
        assert problem["code"] == "target_not_allowed"


def test_schema_has_both_kinds_of_each(api):
    schemas = api.get("/openapi.json").json()["components"]["schemas"]

    def kinds(field):
        union = schemas["JobCreate"]["properties"][field]
        options = [option for outer in union.get("anyOf", [union]) for option in outer.get("oneOf", [outer])]
        return [option["$ref"].rsplit("/", 1)[1] for option in options if "$ref" in option]

    assert kinds("source") == ["FolderSource", "HubSource"]
    assert kinds("target") == ["HubTarget", "UrlTarget"]
    assert schemas["HubSource"]["required"] == ["repo_id"]
    assert {name: schemas[name]["additionalProperties"] for name in ("HubSource", "HubTarget", "UrlTarget")} == {
        "HubSource": False,
        "HubTarget": False,
        "UrlTarget": False,
    }


# Keys


@pytest.mark.parametrize(
    ("changes", "sha256"),
    [
        ({}, "b95b2289085e32e6cae216106eabcfd671d2fa7f2a9c6ad203d189a3efd5564b"),
        (
            {"recipes": [{"format": "mlx"}, {"nbits": 3}], "labels": {"a": "b"}, "priority": 9},
            "5029b942d7f5213688acd6fede57ece2e89964f9df6e4eeb836cd3ea3258a9ed",
        ),
    ],
)
def test_keys_of_bodies_from_before_targets_still_find_them(changes, sha256):
    """As they were computed then."""
    body = {"source": {"type": "folder", "path": "/models/tiny"}} | changes
    for same in (body, body | {"target": None}):
        assert _fingerprint(JobCreate.model_validate(same)) == sha256


def test_defaults_said_aloud_are_the_same_body(api):
    bodies = [
        {"source": HUB, "target": {"repo_id": "acme/tiny-4bit"}},
        {"source": SOURCE, "target": TARGET},
    ]
    answers = [api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}) for body in bodies]
    assert len({answer.json()["id"] for answer in answers}) == 1
    for other in ({"target": TARGET | {"overwrite": True}}, {"source": HUB | {"revision": "v2"}}, {"target": None}):
        answer = api.post("/v1/jobs", json=bodies[0] | other, headers={"Idempotency-Key": "k"})
        assert answer.json()["code"] == "idempotency_key_reused"


# Uploads


def test_result_can_be_had_while_it_is_uploaded(api, api_hand, uploading):
    job = shown(api, uploading)
    assert (job["status"], job["phase"], job["result"]["pushed"]) == ("running", "uploading", None)
    assert api.get(f"/v1/jobs/{uploading}/artifacts/config.json").content == b"{}"
    api_hand.push()
    job = shown(api, uploading)
    assert (job["status"], job["result"]["pushed"]) == ("succeeded", PUSHED)
    assert job["durations"]["upload"] >= 0


def test_failed_upload_keeps_its_files_and_is_tried_again(api, api_hand, uploading):
    api_hand.fail()
    job = shown(api, uploading)
    assert (job["status"], job["error"]["code"], job["error"]["type"]) == ("failed", "token_refused", "user")
    assert api.get(f"/v1/jobs/{uploading}/artifacts/config.json").content == b"{}"
    again = api.post(f"/v1/jobs/{uploading}/retry")
    assert (again.status_code, again.headers["retry-after"]) == (202, "2")
    assert (again.json()["status"], again.json()["phase"], again.json()["error"]) == ("running", "uploading", None)
    refused = api.post(f"/v1/jobs/{uploading}/retry")
    assert (refused.status_code, refused.json()["code"]) == (409, "job_not_retryable")
    api_hand.push()
    assert shown(api, uploading)["status"] == "succeeded"
    assert api.post(f"/v1/jobs/{uploading}/retry").status_code == 409


def test_retry_may_name_another_target_which_is_checked(api, api_hand, uploading):
    api_hand.fail()
    for target, code in (
        ({"repo_id": "acme/x", "credential": "team-a"}, "namespace_not_allowed"),
        ({"url": "s3://elsewhere/x"}, "target_not_allowed"),
        ({"repo_id": "acme"}, "string_pattern_mismatch"),
    ):
        refused = api.post(f"/v1/jobs/{uploading}/retry", json={"target": target})
        assert (refused.status_code, refused.json()["errors"][0]["code"]) == (422, code)
        assert refused.json()["errors"][0]["pointer"].startswith("/target/")
    assert shown(api, uploading)["status"] == "failed"
    target = {"url": "file:///srv/models/tiny", "overwrite": True}
    assert api.post(f"/v1/jobs/{uploading}/retry", json={"target": target}).json()["target"] == target


def test_cancel_of_an_upload_takes_the_files_along(api, settings, uploading):
    job = api.post(f"/v1/jobs/{uploading}/cancel").json()
    assert (job["status"], job["result"]) == ("cancelled", None)
    assert api.get(f"/v1/jobs/{uploading}/artifacts").json()["data"] == []
    assert not ArtifactStore(settings.data_dir).folder(uploading).exists()
    assert api.post(f"/v1/jobs/{uploading}/retry").json()["code"] == "job_not_retryable"


def test_cancel_leaves_what_is_not_to_be_kept_to_the_workers(api, submit, settings):
    """Only they can throw its weight files out, which its folder names."""
    store = ArtifactStore(settings.data_dir)
    kept, dropped = (submit(source=HUB | {"keep": keep})["id"] for keep in (True, False))
    for job_id in (kept, dropped):
        store.create(job_id)
        assert api.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    assert list(store.job_ids()) == [dropped]


def test_retry_of_no_job_is_404(api):
    assert api.post("/v1/jobs/job_unknown/retry").status_code == 404


def test_a_stream_goes_on_behind_a_retry(api, api_hand, uploading):
    api_hand.fail()
    api.post(f"/v1/jobs/{uploading}/retry")
    api_hand.push()
    with api.stream("GET", f"/v1/jobs/{uploading}/events", headers={"Accept": "text/event-stream"}) as stream:
        types = [line for line in stream.iter_lines() if line.startswith("event: ")]
    assert types.count("event: done") == 2
    assert types[-1] == "event: done"


def test_repositories_are_found_by_their_names(api, submit):
    ids = [submit(target={"repo_id": "acme/zebra"})["id"], submit(target={"url": "s3://bucket/models/quagga"})["id"]]
    for q, found in (("zebra", ids[:1]), ("quagga", ids[1:]), ("acme/tiny", ids[::-1])):
        assert [job["id"] for job in api.get("/v1/jobs", params={"q": q}).json()["data"]] == found


# Tokens


def test_no_token_is_ever_seen(api, api_hand, settings, uploading, caplog, capsys):
    said = [api.get(f"/v1/jobs/{uploading}{path}").text for path in ("", "/events", "/artifacts")]
    bodies = [
        {"source": HUB, "target": {"repo_id": "acme/x", "credential": "team-a"}},
        {"source": HUB | {"credential": CANARY}},
        {"source": HUB | {"credential": CANARY + " "}},
        {"source": HUB, "target": {"repo_id": "team-a/x", "credential": "team-a"}},
    ]
    said += [api.post("/v1/jobs", json=body).text for body in bodies]
    settings.credentials_file.write_text(f'{{"default": {{"token": "{CANARY}"')
    broken = api.post("/v1/jobs", json={"source": HUB, "target": {"repo_id": "acme/x"}})
    assert (broken.status_code, broken.json()["code"]) == (500, "credentials_invalid")
    api_hand.fail()
    said += [broken.text, api.get("/v1/jobs").text, api.get("/openapi.json").text]
    with sqlite3.connect(settings.data_dir / "halfquad.db") as database:
        said += database.iterdump()
    said += [caplog.text, *capsys.readouterr()]
    assert "namespace_not_allowed" in "".join(said)
    assert CANARY not in "".join(said)
    assert b"hf_canary" not in b"".join(path.read_bytes() for path in settings.data_dir.rglob("*") if path.is_file())
