"""The routes, and the gate before them."""

from fastapi import FastAPI
from starlette.types import ASGIApp

from tests.fakehub.connections import Connections
from tests.fakehub.errors import Refusal, answer_refusal
from tests.fakehub.faults import Faults
from tests.fakehub.gate import Gate
from tests.fakehub.requests import RequestLog
from tests.fakehub.routes import account, commits, control, discussions, lfs, repos, resolve, tree, xet
from tests.fakehub.state import Hub


def create_app(hub: Hub, faults: Faults, requests: RequestLog, connections: Connections) -> ASGIApp:
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.hub, app.state.faults, app.state.requests = hub, faults, requests
    app.add_exception_handler(Refusal, answer_refusal)
    for module in (control, account, repos, tree, commits, discussions, lfs, xet, resolve):
        app.include_router(module.router)
    return Gate(app, hub, faults, requests, connections)
