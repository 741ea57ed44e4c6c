"""One shape for every error: RFC 9457, whoever raised it."""

import http
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy import exc
from starlette.exceptions import HTTPException

from service.common.errors import FieldError, RequestInvalid, ServiceError, Unavailable
from service.job_places import PLACES, TAGS
from service.schemas import FieldProblem, Problem

MEDIA_TYPE = "application/problem+json"

# what the framework refuses by itself
CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    416: "range_not_satisfiable",
    500: "internal_error",
}


def problem(
    request: Request,
    *,
    status: int,
    code: str,
    detail: str,
    errors: tuple[FieldError, ...] = (),
    retryable: bool = False,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    body = Problem(
        type=f"urn:halfquad:problem:{code}",
        title=code.replace("_", " ").capitalize(),
        status=status,
        detail=detail,
        instance=request.url.path,
        code=code,
        request_id=request.state.request_id,
        errors=[FieldProblem.model_validate(error) for error in errors],
        retryable=retryable,
    )
    return JSONResponse(body.model_dump(), status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def framework_problem(request: Request, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A refusal that has only its status to say."""
    phrase = http.HTTPStatus(status).phrase
    code = CODES.get(status, phrase.lower().replace(" ", "_"))
    return problem(request, status=status, code=code, detail=phrase, retryable=status >= 500, headers=headers)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems of a route, for OpenAPI."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": http.HTTPStatus(status).phrase, "content": content} for status in statuses}


def install(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(exc.OperationalError, _database_error)
    app.add_exception_handler(exc.TimeoutError, _database_error)  # no connection came free


def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    return problem(
        request,
        status=error.status,
        code=error.code,
        detail=error.detail,
        errors=error.errors,
        retryable=error.retryable,
        headers=headers,
    )


def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = tuple(FieldError(_pointer(item["loc"]), item["type"], item["msg"]) for item in error.errors())
    detail = f"{found[0].pointer or 'the body'}: {found[0].detail}"
    if len(found) > 1:
        detail += f" (and {len(found) - 1} more)"
    return _service_error(request, RequestInvalid(detail, errors=found))


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return framework_problem(request, error.status_code, error.headers)


def _database_error(request: Request, _error: Exception) -> Response:
    return _service_error(request, Unavailable("the database does not answer", retry_after_s=2))


def _pointer(location: tuple[int | str, ...]) -> str:
    """A JSON pointer (RFC 6901) into the body; a parameter by its kind and name."""
    place, *path = location
    if place != "body":
        return "/".join(map(str, location))
    if path and isinstance(path[0], int):  # JSON that cannot be parsed: the place is an offset
        return ""
    if path and path[0] in PLACES and path[1:2] and path[1] in TAGS:
        del path[1]  # which model it was taken for, no part of the body
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
