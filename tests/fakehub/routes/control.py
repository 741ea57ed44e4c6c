"""Faults and the log for other processes: what tests in this process do by `faults` and `requests`."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from tests.fakehub.access import JsonBody
from tests.fakehub.faults import Armed, Faults
from tests.fakehub.requests import RequestLog

router = APIRouter(prefix="/_control")


@router.get("/faults")
def faults(request: HttpRequest) -> list[dict[str, Any]]:
    return [_described(armed) for armed in _faults(request).all()]


@router.post("/faults")
def add_fault(body: JsonBody, request: HttpRequest) -> dict[str, Any]:
    return _described(_faults(request).add(**body))


@router.delete("/faults")
def clear_faults(request: HttpRequest) -> dict[str, Any]:
    _faults(request).clear()
    return {}


@router.get("/requests")
def requests(request: HttpRequest, path: str = "", method: str = "") -> list[dict[str, Any]]:
    log: RequestLog = request.app.state.requests
    return [asdict(one) for one in log.find(path, method)]


@router.delete("/requests")
def clear_requests(request: HttpRequest) -> dict[str, Any]:
    log: RequestLog = request.app.state.requests
    log.clear()
    return {}


def _faults(request: HttpRequest) -> Faults:
    found: Faults = request.app.state.faults
    return found


def _described(armed: Armed) -> dict[str, Any]:
    return {**asdict(armed.fault), "met": armed.met, "fired": armed.fired}
