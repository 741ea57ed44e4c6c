import json

import pytest
from sqlalchemy import update

from hqq_core.recipe import Recipe
from service.common import repository
from service.common.errors import HubUnavailable, describe
from service.common.models import Watch
from tests.service.test_app import assert_problem

CANARY = "hf_canary_TheApiNeverShowsIt"
SOURCE = {"type": "hub", "repo_id": "acme/tiny", "revision": "main", "credential": None, "keep": True}
TARGET = {
    "repo_id": "team-a/tiny-4bit",
    "branch": "main",
    "create_pr": True,
    "private": False,
    "credential": "team-a",
    "overwrite": False,
}
BODY = {"source": {"repo_id": "acme/tiny"}, "target": {"repo_id": "team-a/tiny-4bit", "credential": "team-a"}}
UNKNOWN = "watch_01K8Z3V4TQ8M3W1B0G6C2N9R5A"


@pytest.fixture
def settings(settings, tmp_path):
    path = tmp_path / "credentials.json"
    path.write_text(json.dumps({"team-a": {"token": CANARY, "namespaces": ["team-a"]}, "b": {"token": CANARY + "B"}}))
    path.chmod(0o600)
    return settings.model_copy(update={"credentials_file": path, "target_urls": ("s3://bucket",)})


@pytest.fixture
def add(api):
    def add(**changes):
        response = api.post("/v1/watches", json=BODY | changes)
        assert response.status_code == 201, response.text
        return response.json()

    return add


def take(database):
    with database.write() as session:
        return repository.take_due_watch(session, hold_s=100)


def test_a_new_watch_is_shown_and_due(api, add, migrated):
    response = api.post(
        "/v1/watches", json=BODY | {"labels": {"team": "search"}, "recipe": {"nbits": 3, "format": "hqq"}}
    )
    watch = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/v1/watches/{watch['id']}"
    assert watch["id"].startswith("watch_")
    assert (watch["object"], watch["enabled"], watch["run_now"], watch["version"]) == ("watch", True, False, 1)
    assert (watch["source"], watch["target"]) == (SOURCE, TARGET)
    assert watch["recipes"] == [Recipe(nbits=3, format="hqq").to_dict()]
    assert (watch["labels"], watch["priority"], watch["interval_s"]) == ({"team": "search"}, 5, 900)
    assert [watch[name] for name in ("last_commit", "last_job_id", "last_checked_at", "last_error")] == [None] * 4
    assert api.get(response.headers["location"]).json() == watch
    taken = take(migrated)
    assert taken.id == watch["id"]
    assert api.get("/v1/jobs").json()["data"] == [], "the Hub is not asked here"


def test_what_a_worker_wrote_is_shown(api, add, migrated):
    watch = add(run_now=True)
    with migrated.write() as session:
        job = repository.watch_seen(
            session, repository.take_due_watch(session, hold_s=1), repo_id="acme/tiny", commit="1" * 40, max_attempts=3
        )
    shown = api.get(f"/v1/watches/{watch['id']}").json()
    assert (shown["last_commit"], shown["last_job_id"], shown["n_failures"]) == ("1" * 40, job.id, 0)
    assert shown["version"] > watch["version"]
    assert [job["id"] for job in api.get("/v1/jobs", params={"label": f"watch:{watch['id']}"}).json()["data"]] == [
        job.id
    ]
    with migrated.write() as session:
        session.execute(update(Watch).values(next_check_at=repository.now(session)))
    with migrated.write() as session:
        taken = repository.take_due_watch(session, hold_s=1)
        repository.watch_failed(session, taken, describe(HubUnavailable("busy")), backoff_s=1)
    shown = api.get(f"/v1/watches/{watch['id']}").json()
    assert shown["last_error"] == {
        "code": "hub_unavailable",
        "type": "upstream",
        "message": "busy",
        "retryable": True,
    }


@pytest.mark.parametrize(
    ("changes", "code", "pointer"),
    [
        ({"source": {"type": "folder", "path": "/models/tiny"}}, "request_invalid", "/source/repo_id"),
        ({"source": {"repo_id": "a/b/c"}}, "request_invalid", "/source/repo_id"),
        ({"source": {"repo_id": "acme/tiny", "credential": "x"}}, "credential_unknown", "/source/credential"),
        ({"target": None}, "request_invalid", "/target"),
        ({"target": {"repo_id": "team-a/x", "credential": "x"}}, "credential_unknown", "/target/credential"),
        ({"target": {"repo_id": "team-a/x"}}, "credential_unknown", "/target/credential"),
        ({"target": {"repo_id": "other/x", "credential": "team-a"}}, "namespace_not_allowed", "/target/repo_id"),
        ({"target": {"url": "s3://other/x", "overwrite": True}}, "target_not_allowed", "/target/url"),
        ({"target": {"url": "s3://bucket/x"}}, "request_invalid", "/target/overwrite"),
        ({"target": TARGET | {"create_pr": False}}, "request_invalid", "/target/overwrite"),
        ({"target": TARGET | {"branch": "int4"}}, "request_invalid", "/target/branch"),
        ({"target": TARGET | {"endpoint": "http://evil"}}, "request_invalid", "/target/endpoint"),
        ({"source": {"repo_id": "team-a/Tiny-4bit"}}, "request_invalid", "/target/repo_id"),
        ({"recipe": {"format": "awq", "nbits": 3}}, "format_cannot_hold", "/recipe/nbits"),
        ({"recipe": {}, "recipes": [{}]}, "request_invalid", "/recipes"),
        ({"interval_s": 59}, "request_invalid", "/interval_s"),
        ({"every_s": 60}, "request_invalid", "/every_s"),
    ],
)
def test_what_cannot_be_watched_is_refused_with_its_field(api, changes, code, pointer):
    body = assert_problem(api.post("/v1/watches", json=BODY | changes), 422, code)
    assert pointer in [error["pointer"] for error in body["errors"]]
    assert api.get("/v1/watches").json()["data"] == []


@pytest.mark.parametrize(
    "target",
    [
        {"repo_id": "team-a/x", "credential": "team-a", "create_pr": False, "overwrite": True, "branch": "int4"},
        {"url": "s3://bucket/x", "overwrite": True},
    ],
)
def test_results_may_replace_each_other(add, target):
    watch = add(target=target)
    assert watch["target"].items() >= target.items()


def test_a_branch_of_the_same_repository_may_be_the_target(add, api):
    source = {"repo_id": "team-a/tiny", "credential": "team-a"}
    target = {"repo_id": "team-a/tiny", "credential": "team-a", "create_pr": False, "overwrite": True}
    assert add(source=source, target=target | {"branch": "int4"})["target"]["branch"] == "int4"
    assert_problem(api.post("/v1/watches", json={"source": source, "target": target}), 422, "request_invalid")


def test_a_change_is_kept_and_makes_it_due(api, add, migrated):
    watch = add()
    assert take(migrated).id == watch["id"]
    assert take(migrated) is None
    path = f"/v1/watches/{watch['id']}"
    paused = api.patch(path, json={"enabled": False}).json()
    assert (paused["enabled"], paused["interval_s"]) == (False, 900)
    assert take(migrated) is None
    slower = api.patch(path, json={"interval_s": 3600}).json()
    assert (slower["enabled"], slower["interval_s"]) == (False, 3600)
    again = api.patch(path, json={"enabled": True}).json()
    assert (again["enabled"], again["interval_s"]) == (True, 3600)
    assert take(migrated).id == watch["id"]
    assert_problem(api.patch(path, json={"interval_s": 1}), 422, "request_invalid")
    assert_problem(api.patch(path, json={"source": SOURCE}), 422, "request_invalid")


def test_a_removed_watch_is_gone_and_its_jobs_are_not(api, add, migrated):
    watch = add(run_now=True)
    with migrated.write() as session:
        taken = repository.take_due_watch(session, hold_s=1)
        job = repository.watch_seen(session, taken, repo_id="acme/tiny", commit="1" * 40, max_attempts=3)
    response = api.delete(f"/v1/watches/{watch['id']}")
    assert (response.status_code, response.content) == (204, b"")
    assert_problem(api.get(f"/v1/watches/{watch['id']}"), 404, "watch_not_found")
    assert_problem(api.delete(f"/v1/watches/{watch['id']}"), 404, "watch_not_found")
    assert api.get(f"/v1/jobs/{job.id}").json()["status"] == "queued"


@pytest.mark.parametrize("watch_id", [UNKNOWN, "nothing", "%00"])
def test_an_unknown_watch_is_not_found(api, watch_id):
    for method, body in (("GET", None), ("PATCH", {}), ("DELETE", None)):
        response = api.request(method, f"/v1/watches/{watch_id}", json=body)
        assert_problem(response, 404, "watch_not_found")


def test_lists_go_on_either_way(api, add):
    ids = [add()["id"] for _ in range(5)][::-1]
    first = api.get("/v1/watches", params={"limit": 2})
    page = first.json()
    assert [watch["id"] for watch in page["data"]] == ids[:2]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", *ids[:2], True)
    second = api.get(first.links["next"]["url"])
    assert [watch["id"] for watch in second.json()["data"]] == ids[2:4]
    third = api.get(second.links["next"]["url"])
    assert ([watch["id"] for watch in third.json()["data"]], third.json()["has_more"]) == (ids[4:], False)
    assert api.get(second.links["prev"]["url"]).json()["data"] == page["data"]
    rising = api.get("/v1/watches", params={"order": "asc", "limit": 1}).json()
    assert rising["data"][0]["id"] == ids[-1]
    for query in ({"after": UNKNOWN}, {"after": "a", "before": "b"}, {"limit": 0}, {"status": "queued"}):
        assert_problem(api.get("/v1/watches", params=query), 422, "request_invalid")


def test_the_token_is_in_no_answer_and_no_row(api, add, migrated):
    add()
    assert CANARY not in api.get("/v1/watches").text
    raw = migrated.engine.raw_connection()
    assert CANARY not in "\n".join(raw.iterdump())
    raw.close()
