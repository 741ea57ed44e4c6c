import re

import pytest
import uvicorn
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from service import jobs
from service.app import create_app
from service.common.errors import NotMigrated
from service.common.settings import Settings
from service.schemas import Problem


@pytest.fixture
def lenient(settings, migrated):
    """Answers 500 as a server does, instead of raising into the test."""
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def assert_problem(response, status, code):
    body = response.json()
    assert response.status_code == body["status"] == status
    assert response.headers["content-type"] == "application/problem+json"
    assert set(body) == set(Problem.model_fields)
    assert body["code"] == code
    assert body["type"] == f"urn:halfquad:problem:{code}"
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["instance"] == response.request.url.path
    return body


def test_start_is_refused_below_head(tmp_path, redis_url):
    settings = Settings(data_dir=tmp_path, broker_url=redis_url)
    with pytest.raises(NotMigrated, match="halfquad migrate"), TestClient(create_app(settings)):
        pass


def test_unknown_route_is_a_problem(api):
    assert_problem(api.get("/nowhere"), 404, "not_found")
    assert_problem(api.get("/v1/jobs/"), 404, "not_found")


def test_wrong_method_is_a_problem(api):
    response = api.delete("/v1/jobs")
    assert_problem(response, 405, "method_not_allowed")
    assert "POST" in response.headers["allow"]


def test_invalid_request_is_a_problem(api):
    body = assert_problem(api.post("/v1/jobs", json={"a": 1, "b": 2}), 422, "request_invalid")
    assert {error["pointer"] for error in body["errors"]} == {"/source", "/a", "/b"}
    assert body["retryable"] is False
    assert "and 2 more" in body["detail"]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_body_is_a_problem(api, settings, chunked):
    content = b" " * (settings.max_body_nbytes + 1)
    headers = {"Content-Type": "application/json"}
    response = api.post("/v1/jobs", content=iter([content]) if chunked else content, headers=headers)
    assert_problem(response, 413, "body_too_large")


def test_body_of_the_limit_is_read(api, settings):
    content = b"{}" + b" " * (settings.max_body_nbytes - 2)
    response = api.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert response.json()["errors"][0]["pointer"] == "/source"


def test_own_mistake_is_a_problem_without_its_trace(lenient, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(jobs, "find", fail)
    response = lenient.get("/v1/jobs")
    body = assert_problem(response, 500, "internal_error")
    assert body["retryable"] is True
    assert "secret" not in response.text


def test_database_away_is_a_problem_to_retry(lenient, monkeypatch):
    def fail(*_):
        raise OperationalError("SELECT secret", {}, Exception("gone"))

    monkeypatch.setattr(jobs, "find", fail)
    response = lenient.get("/v1/jobs")
    body = assert_problem(response, 503, "unavailable")
    assert (body["retryable"], response.headers["retry-after"]) == (True, "2")
    assert "secret" not in response.text


def test_every_response_has_a_request_id(api):
    assert re.fullmatch(r"req_[0-9A-Z]{26}", api.get("/livez").headers["x-request-id"])
    assert api.get("/livez", headers={"X-Request-Id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"
    for odd in ("a b", "x" * 129, "\xe9", '"'):
        assert api.get("/livez", headers={"X-Request-Id": odd.encode("latin-1")}).headers["x-request-id"] != odd


def test_every_response_forbids_sniffing(api):
    assert api.get("/docs").headers["x-content-type-options"] == "nosniff"


def test_openapi_documents_the_problems(api):
    schema = api.get("/openapi.json").json()
    assert {"Problem", "FieldProblem"} <= set(schema["components"]["schemas"])
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            refused = [status for status in operation["responses"] if status >= "400" and path != "/readyz"]
            assert refused or path in ("/livez", "/readyz")
            for status in refused:
                content = operation["responses"][status]["content"]
                assert content == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}


def test_openapi_references_resolve(api):
    schema = api.get("/openapi.json").json()
    for name in re.findall(r'"#/components/schemas/([^"]+)"', api.get("/openapi.json").text):
        assert name in schema["components"]["schemas"]


def test_docs_can_be_switched_off(settings, migrated):
    with TestClient(create_app(settings.model_copy(update={"docs": False}))) as api:
        assert api.get("/docs").status_code == api.get("/openapi.json").status_code == 404


def test_uvicorn_can_load_it():
    config = uvicorn.Config("service.app:create_app", factory=True, log_config=None)
    config.load()
    assert config.loaded
