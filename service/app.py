"""The web application: the only place where its parts meet."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp

from service.api import formats, health, jobs, problems, watches
from service.api.envelope import Envelope
from service.common.logs import configure_logging
from service.common.schema import check_head
from service.common.settings import Settings
from service.jobs import Service
from service.news import News
from service.schemas import Problem


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API over the settings given, or those of the environment."""
    settings = settings or Settings()
    configure_logging(settings.log_level)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(settings)
        app.state.news = News(service)
        try:
            check_head(service.database)
            yield
        finally:
            service.close()

    app = App(
        title="Halfquad",
        version=version("halfquad"),
        summary="Calibration-free quantization of safetensors checkpoints",
        lifespan=lifespan,
        max_body_size=settings.max_body_nbytes,
        generate_unique_id_function=_operation_id,
        redirect_slashes=False,
        openapi_url="/openapi.json" if settings.docs else None,  # /docs goes with it
        redoc_url=None,
    )
    problems.install(app)
    app.include_router(jobs.router)
    app.include_router(watches.router)
    app.include_router(formats.router)
    app.include_router(health.router)
    return app


class App(FastAPI):
    """FastAPI in our envelope, its schema with our problems."""

    def build_middleware_stack(self) -> ASGIApp:
        # outermost: FastAPI's own 413 and 500 are plain text that is sent outside all user middleware
        return Envelope(super().build_middleware_stack())

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        _, models = models_json_schema([(Problem, "serialization")], ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= models["$defs"]
        return schema


def _operation_id(route: APIRoute) -> str:
    return route.name
