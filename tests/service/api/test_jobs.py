import base64
import dataclasses
import hashlib
import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from sqlalchemy import update

from hqq_core.recipe import Recipe
from service.app import create_app
from service.common.models import IdempotencyRecord
from service.common.queue import Broker
from service.common.storage import ArtifactStore
from service.schemas import JobCreate, RecipeBody

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def body(root):
    return {"source": {"type": "folder", "path": f"{root}/tiny"}}


@pytest.fixture
def submit(api, body):
    def submit(**changes):
        response = api.post("/v1/jobs", json=body | changes)
        assert response.status_code == 202, response.text
        return response.json()

    return submit


@pytest.fixture
def done(submit, api_hand, settings):
    """A job that has succeeded, its files in the store."""
    job = submit()
    api_hand.plan(10)
    api_hand.solve()
    store = ArtifactStore(settings.data_dir)
    store.create(job["id"])
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    for name, content in files.items():
        (store.output(job["id"]) / name).write_bytes(content)
    (store.output(job["id"]) / "private.tmp").write_bytes(b"not in the manifest")
    api_hand.finish(*({"name": n, "nbytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()))
    return job["id"]


# Submitting


def test_submitted_job_is_queued_and_sent(api, body, settings):
    response = api.post("/v1/jobs", json=body | {"labels": {"team": "search"}, "recipe": {"nbits": 4}})
    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert response.headers["retry-after"] == "2"
    assert job["object"] == "job"
    assert (job["status"], job["phase"], job["progress"], job["error"], job["result"]) == ("queued", *[None] * 4)
    assert job["recipes"] == [Recipe(nbits=4).to_dict()]
    assert job["labels"] == {"team": "search"}
    assert job["source"] == body["source"]
    assert api.get(response.headers["location"]).json() == job
    created = datetime.fromisoformat(job["created_at"])
    assert created.utcoffset() == timedelta(0)
    broker = Broker(settings)
    assert broker.depth() == 1
    broker.close()


def test_a_job_of_several_recipes_shows_them_in_order(api, body):
    recipes = [{"format": "mlx", "nbits": 6}, {"format": "hqq", "nbits": 3, "preset": "best"}]
    response = api.post("/v1/jobs", json=body | {"recipes": recipes})
    assert response.status_code == 202, response.text
    assert response.json()["recipes"] == [Recipe(**recipe).to_dict() for recipe in recipes]


def test_one_recipe_is_one_however_it_is_said(api, body):
    said = [{}, {"recipe": {}}, {"recipe": None}, {"recipes": [{}]}, {"recipes": None, "recipe": {"nbits": 4}}]
    answers = [api.post("/v1/jobs", json=body | recipe, headers={"Idempotency-Key": "k"}) for recipe in said]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert answers[0].json()["recipes"] == [Recipe().to_dict()]
    other = api.post("/v1/jobs", json=body | {"recipes": [{}, {"format": "mlx"}]}, headers={"Idempotency-Key": "k"})
    assert other.json()["code"] == "idempotency_key_reused"


def test_recipe_body_is_the_librarys_recipe():
    assert RecipeBody().model_dump() == Recipe().to_dict()
    assert set(RecipeBody.model_fields) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(("nbits", "shown"), [(3, "3"), (4.0, "4"), (1.58, "1.58")])
def test_bits_are_whole_or_ternary(submit, nbits, shown):
    assert json.dumps(submit(recipe={"format": "hqq", "nbits": nbits})["recipes"][0]["nbits"]) == shown


@pytest.mark.parametrize(
    ("change", "code", "pointer"),
    [
        ({"surprise": 1}, "extra_forbidden", "/surprise"),
        ({"recipe": {"bits": 4}}, "extra_forbidden", "/recipe/bits"),
        ({"recipe": {"nbits": "4"}}, "float_type", "/recipe/nbits"),
        ({"recipe": {"nbits": True}}, "float_type", "/recipe/nbits"),
        ({"recipe": {"nbits": 9}}, "invalid_setting", "/recipe/nbits"),
        ({"recipe": {"nbits": 1.5, "format": "hqq"}}, "invalid_setting", "/recipe/nbits"),
        ({"recipe": {"preset": "slow"}}, "literal_error", "/recipe/preset"),
        ({"recipe": {"energy": "solar"}}, "literal_error", "/recipe/energy"),
        ({"recipe": {"iters": 10}}, "extra_forbidden", "/recipe/iters"),
        ({"recipe": {"group_size": -1}}, "invalid_setting", "/recipe/group_size"),
        ({"recipe": {"nbits": 1, "format": "compressed-tensors"}}, "format_cannot_hold", "/recipe/nbits"),
        ({"recipe": {"format": "exl3"}}, "format_cannot_hold", "/recipe/format"),
        ({"recipe": {"skip_modules": [""]}}, "string_too_short", "/recipe/skip_modules/0"),
        ({"recipes": [{}, {"format": "hqq"}], "recipe": {}}, "conflict", "/recipes"),
        ({"recipes": []}, "too_short", "/recipes"),
        (
            {"recipes": [{"nbits": n, "format": "hqq"} for n in (1, 1.58, 2, 3, 4, 5, 6, 8)] + [{}]},
            "too_long",
            "/recipes",
        ),
        ({"recipes": [{}, {"nbits": 9}]}, "invalid_setting", "/recipes/1/nbits"),
        ({"recipes": [{}, {"nbits": "4"}]}, "float_type", "/recipes/1/nbits"),
        ({"recipes": [{"nbits": 1, "format": "awq"}, {}]}, "format_cannot_hold", "/recipes/0/nbits"),
        ({"recipes": [{}, {"format": "exl3"}]}, "format_cannot_hold", "/recipes/1/format"),
        ({"recipes": [{}, {"format": "mlx", "energy": "none"}]}, "invalid_setting", "/recipes/1/energy"),
        ({"recipes": [{}, {"format": "mlx"}, {}]}, "invalid_setting", "/recipes/2/format"),
        ({"recipes": [{}, {"skip_modules": ["o_proj"]}]}, "invalid_setting", "/recipes/1/skip_modules"),
        ({"labels": {"a b": "x"}}, "string_pattern_mismatch", "/labels/a b/[key]"),
        ({"labels": {"a/b~c": "x"}}, "string_pattern_mismatch", "/labels/a~1b~0c/[key]"),
        ({"labels": {"a": "x\0"}}, "string_pattern_mismatch", "/labels/a"),
        ({"labels": {str(i): "" for i in range(33)}}, "too_long", "/labels"),
        ({"priority": 10}, "less_than_equal", "/priority"),
        ({"source": {"type": "s3", "path": "/x"}}, "literal_error", "/source/type"),
        ({"source": {"type": "folder"}}, "missing", "/source/path"),
        ({"source": {"type": "folder", "path": "/etc"}}, "source_not_allowed", "/source/path"),
        ({"source": {"type": "folder", "path": "\0"}}, "source_not_allowed", "/source/path"),
    ],
)
def test_bad_field_is_named_and_nothing_is_left(api, body, change, code, pointer):
    response = api.post("/v1/jobs", json=body | change)
    problem = response.json()
    assert response.status_code == 422
    assert (problem["errors"][0]["code"], problem["errors"][0]["pointer"]) == (code, pointer)
    assert api.get("/v1/jobs").json()["data"] == []


def test_source_through_a_link_out_of_the_roots_is_refused(api, body, root, tmp_path):
    (root / "tiny").symlink_to(tmp_path)
    problem = api.post("/v1/jobs", json=body).json()
    assert (problem["code"], problem["type"]) == ("source_not_allowed", "urn:halfquad:problem:source_not_allowed")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"source": 1e999}', b"1" * 5000, b"nul\0"])
def test_body_that_is_no_object_is_a_problem(api, content):
    response = api.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json()["code"] in ("request_invalid", "bad_request")


def test_lone_surrogate_is_a_problem(api, body):
    content = b'{"source": {"type": "folder", "path": "/\\ud800"}, "recipe": {"skip_modules": ["\\ud800"]}}'
    response = api.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=6,
)


@settings_of_hypothesis(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=False
)
@given(
    section=st.sampled_from(["source", "recipe", "labels", ""]),
    field=st.sampled_from(["path", "type", *RecipeBody.model_fields, *JobCreate.model_fields]) | st.text(max_size=8),
    value=json_values,
)
def test_no_body_is_our_mistake(api, body, section, field, value):
    changed = json.loads(json.dumps(body))
    (changed.setdefault(section, {}) if section else changed)[field] = value
    content = json.dumps(changed).encode()
    response = api.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (202, 400, 422), response.text
    if response.status_code == 202:
        assert api.get(response.headers["location"]).json() == response.json()


def test_job_is_taken_while_the_broker_is_away(settings, migrated, body, tmp_path):
    away = settings.model_copy(update={"broker_url": f"redis+socket://{tmp_path}/nobody.sock"})
    with TestClient(create_app(away)) as api:
        assert api.post("/v1/jobs", json=body).status_code == 202
    with TestClient(create_app(settings)) as api:
        assert len(api.get("/v1/jobs").json()["data"]) == 1


# Waiting


def test_wait_answers_202_when_the_job_takes_longer(api, body):
    response = api.post("/v1/jobs", json=body, headers={"Prefer": "respond-async, wait=1"})
    assert response.status_code == 202
    assert "preference-applied" not in response.headers


def test_wait_answers_200_with_the_end(api, body, api_hand):
    answers = []

    def ask():
        answers.append(api.post("/v1/jobs", json=body, headers={"Prefer": "wait=30", "Idempotency-Key": "k"}))

    asking = threading.Thread(target=ask)
    asking.start()
    while not (found := api.get("/v1/jobs").json()["data"]):
        pass
    busy = api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})
    assert (busy.status_code, busy.json()["code"]) == (409, "idempotency_in_progress")
    assert busy.headers["retry-after"] == "1"
    assert api.post(f"/v1/jobs/{found[0]['id']}/cancel").status_code == 200
    asking.join()
    assert answers[0].status_code == 200
    assert answers[0].headers["preference-applied"] == "wait"
    assert answers[0].json()["status"] == "cancelled"
    replayed = api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})
    assert (replayed.status_code, replayed.json()) == (200, answers[0].json())


@pytest.mark.parametrize("prefer", ["wait=x", "wait", "wait=-1", "await=5", "return=minimal", "wait=0"])
def test_preference_that_cannot_be_read_is_none(api, body, prefer):
    assert api.post("/v1/jobs", json=body, headers={"Prefer": prefer}).status_code == 202


# Idempotency


def test_same_key_and_body_is_the_same_answer(api, body, api_hand):
    headers = {"Idempotency-Key": "order 66"}
    first = api.post("/v1/jobs", json=body, headers=headers)
    api_hand.plan(1)
    again = api.post("/v1/jobs", json=body | {"priority": 5, "labels": {}}, headers=headers)  # the defaults, said aloud
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert len(api.get("/v1/jobs").json()["data"]) == 1


@pytest.mark.parametrize("change", [{"source_roots": ()}, {"source_roots": (Path("/elsewhere"),)}])
def test_first_answer_stands_where_the_body_would_now_be_refused(api, body, settings, change):
    headers = {"Idempotency-Key": "k"}
    first = api.post("/v1/jobs", json=body, headers=headers)
    with TestClient(create_app(settings.model_copy(update=change))) as stricter:
        again = stricter.post("/v1/jobs", json=body, headers=headers)
        assert (again.status_code, again.json()) == (202, first.json())
        assert stricter.post("/v1/jobs", json=body).json()["code"] == "source_not_allowed"


def test_key_of_another_body_is_told_of_before_what_is_wrong_with_this_one(api, body):
    headers = {"Idempotency-Key": "k"}
    api.post("/v1/jobs", json=body, headers=headers)
    response = api.post("/v1/jobs", json=body | {"recipe": {"nbits": 9}}, headers=headers)
    assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")


def test_same_key_with_another_body_is_refused(api, body):
    headers = {"Idempotency-Key": "k"}
    api.post("/v1/jobs", json=body, headers=headers)
    response = api.post("/v1/jobs", json=body | {"priority": 6}, headers=headers)
    assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")


def test_refusal_does_not_use_up_the_key(api, body):
    headers = {"Idempotency-Key": "k"}
    assert api.post("/v1/jobs", json=body | {"priority": 99}, headers=headers).status_code == 422
    assert api.post("/v1/jobs", json=body, headers=headers).status_code == 202


def test_key_is_forgotten_in_time(api, body, migrated):
    headers = {"Idempotency-Key": "k"}
    first = api.post("/v1/jobs", json=body, headers=headers).json()
    with migrated.write() as session:
        session.execute(update(IdempotencyRecord).values(expires_at=datetime.now(UTC)))
    assert api.post("/v1/jobs", json=body, headers=headers).json()["id"] != first["id"]


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\t"])
def test_key_that_cannot_be_one_is_refused(api, body, key):
    response = api.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "header/idempotency-key"


def test_concurrent_requests_with_a_key_make_one_job(api, body):
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}))
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 202}) == 1
    assert len(api.get("/v1/jobs").json()["data"]) == 1


# Reading


def test_unchanged_job_is_not_sent_again(api, submit, api_hand):
    job = submit()
    url = f"/v1/jobs/{job['id']}"
    response = api.get(url)
    etag = response.headers["etag"]
    assert etag == 'W/"1"'
    assert response.headers["retry-after"] == "2"
    for header in (etag, f'"x", {etag}', "*", '"1"'):
        response = api.get(url, headers={"If-None-Match": header})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    api_hand.plan(1)
    response = api.get(url, headers={"If-None-Match": etag})
    assert response.status_code == 200
    assert response.json()["progress"] == {
        "phase": "quantizing",
        "completed": 0,
        "total": 1,
        "unit": "bytes",
        "percent": 0.0,
        "eta_seconds": None,
    }


@pytest.mark.parametrize("rest", ["", "/events", "/artifacts", "/artifacts/config.json", "/cancel"])
def test_unknown_job_is_not_found(api, rest):
    for job_id in ("job_01K8Z3V4TQ8M3W1B0G6C2N9R5A", "x", "%00", "job_%ff", "..%2f", "a" * 999):
        response = api.request("POST" if rest == "/cancel" else "GET", f"/v1/jobs/{job_id}{rest}")
        assert response.status_code == 404
        assert response.json()["code"] in ("job_not_found", "not_found")


def test_list_is_paged_by_links(api, submit):
    ids = [submit()["id"] for _ in range(5)][::-1]
    page = api.get("/v1/jobs?limit=2&status=queued")
    assert [job["id"] for job in page.json()["data"]] == ids[:2]
    assert (page.json()["first_id"], page.json()["last_id"], page.json()["has_more"]) == (ids[0], ids[1], True)
    assert "prev" not in page.links
    seen = ids[:2]
    while "next" in page.links:
        page = api.get(page.links["next"]["url"])
        seen += [job["id"] for job in page.json()["data"]]
    assert seen == ids
    assert page.json()["has_more"] is False
    back = api.get(page.links["prev"]["url"])
    assert [job["id"] for job in back.json()["data"]] == ids[2:4]
    assert back.links["next"]["url"].endswith(f"after={ids[3]}")


def test_empty_list(api):
    response = api.get("/v1/jobs")
    assert response.json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert "link" not in response.headers


def test_list_filters(api, submit):
    a = submit(labels={"team": "a:b"})["id"]
    b = submit()["id"]
    api.post(f"/v1/jobs/{b}/cancel")

    def found(**params):
        return [job["id"] for job in api.get("/v1/jobs", params=params).json()["data"]]

    assert found(label="team:a:b") == [a]
    assert found(status="cancelled") == [b]
    assert found(status=["cancelled", "queued"]) == [b, a]
    assert found(q="tiny", order="asc") == [a, b]
    assert found(created_after="2999-01-01T00:00:00Z") == []


@pytest.mark.parametrize(
    ("params", "pointer"),
    [
        ({"limit": 0}, "query/limit"),
        ({"limit": 101}, "query/limit"),
        ({"status": "done"}, "query/status/0"),
        ({"label": "team"}, "query/label/0"),
        ({"created_after": "2026-01-01"}, "query/created_after"),
        ({"created_after": "0001-01-01T00:00:00+14:00"}, "query/created_after"),
        ({"created_before": "9999-12-31T23:59:59-14:00"}, "query/created_before"),
        ({"after": "job_x", "before": "job_y"}, "query/before"),
        ({"after": "job_x"}, "query/after"),
        ({"after": "\0"}, "query/after"),
        ({"offset": 3}, "query/offset"),
        ({"q": "\0"}, "query/q"),
    ],
)
def test_list_refuses_what_it_does_not_know(api, params, pointer):
    response = api.get("/v1/jobs", params=params)
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize("rest", ["", "/events", "/artifacts", "/artifacts/config.json", "/cancel"])
def test_unknown_parameter_is_refused(api, done, rest):
    """Before anything is done."""
    response = api.request("POST" if rest == "/cancel" else "GET", f"/v1/jobs/{done}{rest}", params={"foo": 1})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (422, "request_invalid")
    assert [(error["pointer"], error["code"]) for error in problem["errors"]] == [("query/foo", "extra_forbidden")]


def test_job_with_an_unknown_parameter_is_not_submitted(api, body):
    assert api.post("/v1/jobs", json=body, params={"wait": 5}).status_code == 422
    assert api.get("/v1/jobs").json()["data"] == []


# Cancelling


def test_cancel(api, submit, api_hand):
    queued = api.post(f"/v1/jobs/{submit()['id']}/cancel")
    assert (queued.status_code, queued.json()["status"]) == (200, "cancelled")
    running = submit()["id"]
    claim = api_hand.claim()
    first, again = (api.post(f"/v1/jobs/{running}/cancel") for _ in range(2))
    assert (first.status_code, first.json()["status"], first.headers["retry-after"]) == (202, "cancelling", "2")
    assert (again.status_code, again.json()) == (200, first.json())
    assert claim.job_id == running


def test_cancel_of_an_ended_job_is_a_conflict(api, done):
    response = api.post(f"/v1/jobs/{done}/cancel")
    assert (response.status_code, response.json()["code"]) == (409, "job_terminal")


def test_cancelled_job_leaves_no_files(api, submit, settings):
    job_id = submit()["id"]
    store = ArtifactStore(settings.data_dir)
    store.create(job_id)
    api.post(f"/v1/jobs/{job_id}/cancel")
    assert list(store.job_ids()) == []


# Artifacts


def test_artifacts_are_listed(api, submit, done):
    listed = api.get(f"/v1/jobs/{done}/artifacts").json()["data"]
    assert [file["name"] for file in listed] == ["config.json", "model.safetensors"]
    assert listed[1] == {
        "name": "model.safetensors",
        "nbytes": len(WEIGHTS),
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
    }
    assert api.get(f"/v1/jobs/{done}").json()["result"]["artifacts"] == listed
    assert api.get(f"/v1/jobs/{submit()['id']}/artifacts").json()["data"] == []


def test_artifacts_of_several_outputs_lie_in_their_folders(api, api_hand, submit, settings):
    job = submit(recipes=[{"format": "mlx"}, {"format": "hqq"}])
    api_hand.plan(10), api_hand.solve()
    files = {"mlx-4bit-g64/config.json": b"{}", "hqq-4bit-g64/config.json": b'{"hqq": 1}'}
    for name, content in files.items():
        path = ArtifactStore(settings.data_dir).output(job["id"]) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    api_hand.finish(*({"name": n, "nbytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()))
    listed = api.get(f"/v1/jobs/{job['id']}/artifacts").json()["data"]
    assert [file["name"] for file in listed] == list(files)
    assert {name: api.get(f"/v1/jobs/{job['id']}/artifacts/{name}").content for name in files} == files
    assert api.get(f"/v1/jobs/{job['id']}/artifacts/config.json").status_code == 404


def test_download_is_whole_and_checkable(api, done):
    response = api.get(f"/v1/jobs/{done}/artifacts/model.safetensors")
    digest = hashlib.sha256(WEIGHTS)
    assert response.content == WEIGHTS
    assert response.headers["etag"] == f'"{digest.hexdigest()}"'
    assert response.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-disposition"] == 'attachment; filename="model.safetensors"'
    head = api.head(f"/v1/jobs/{done}/artifacts/model.safetensors")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(WEIGHTS)), b"")


@pytest.mark.parametrize(
    ("range", "expected"), [("0-9", WEIGHTS[:10]), ("100-", WEIGHTS[100:]), ("-7", WEIGHTS[-7:]), ("5-5", WEIGHTS[5:6])]
)
def test_download_by_range(api, done, range, expected):
    response = api.get(f"/v1/jobs/{done}/artifacts/model.safetensors", headers={"Range": f"bytes={range}"})
    assert (response.status_code, response.content) == (206, expected)
    assert response.headers["content-length"] == str(len(expected))
    assert response.headers["content-range"].endswith(f"/{len(WEIGHTS)}")


def test_range_outside_the_file_is_a_problem(api, done):
    response = api.get(f"/v1/jobs/{done}/artifacts/config.json", headers={"Range": "bytes=2-"})
    assert (response.status_code, response.json()["code"]) == (416, "range_not_satisfiable")
    assert response.headers["content-range"] == "bytes */2"


def test_range_needs_the_file_it_was_begun_with(api, done):
    url = f"/v1/jobs/{done}/artifacts/model.safetensors"
    etag = api.head(url).headers["etag"]
    assert api.get(url, headers={"Range": "bytes=1-2", "If-Range": etag}).status_code == 206
    assert api.get(url, headers={"Range": "bytes=1-2", "If-Range": '"other"'}).status_code == 200
    assert api.get(url, headers={"If-None-Match": etag}).status_code == 304


@pytest.mark.parametrize(
    "name", ["private.tmp", "..%2Fplan.json", "../output/config.json", "%2Fetc%2Fpasswd", "config.json/", "%00"]
)
def test_only_listed_names_are_served(api, done, name):
    response = api.get(f"/v1/jobs/{done}/artifacts/{name}")
    assert response.status_code == 404
