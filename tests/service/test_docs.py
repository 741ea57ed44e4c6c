import re
from pathlib import Path

import pytest

from hqq_core.errors import Cancelled, HalfquadError
from service import client
from service.app import create_app
from service.common.errors import LeaseLost, NotMigrated, Refused, ServiceError
from service.common.events import EventType
from service.common.settings import Settings
from service.common.status import JobStatus, Phase
from service.schemas import EventQuery, FormatBody, JobCreate, JobQuery, Problem, RecipeBody, RuntimeBody
from service.watch_schemas import WatchBody, WatchChange, WatchCreate

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()

NEVER_SHOWN = {error.code for error in (HalfquadError, Cancelled, Refused, NotMigrated, LeaseLost)}


def all_errors(kind):
    return {kind, *(found for child in kind.__subclasses__() for found in all_errors(child))}


def codes():
    return {error.code for error in all_errors(ServiceError) | all_errors(HalfquadError)} - NEVER_SHOWN


def routes(tmp_path):
    schema = create_app(Settings(data_dir=tmp_path)).openapi()
    return [(method.upper(), path) for path, methods in schema["paths"].items() for method in methods]


def test_every_route_is_there(tmp_path):
    shown = {f"`{method} {re.sub('{(job|watch)_id}', '{id}', path)}`" for method, path in routes(tmp_path)}
    assert {route for route in shown if route not in API} == set()


@pytest.mark.parametrize(
    "words",
    [
        codes(),
        set(JobStatus),
        set(Phase),
        set(EventType),
        set(RecipeBody.model_fields),
        set(JobCreate.model_fields),
        {*WatchCreate.model_fields, *WatchChange.model_fields, *WatchBody.model_fields} - {"object"},
        {*FormatBody.model_fields, *RuntimeBody.model_fields} - {"object"},
    ],
    ids=["codes", "statuses", "phases", "event types", "recipe", "job", "watch", "formats"],
)
def test_every_word_is_there(words):
    assert {word for word in words if f"`{word}`" not in API} == set()


@pytest.mark.parametrize("model", [Problem, JobQuery, EventQuery], ids=["problem", "query", "events"])
def test_every_field_is_there(model):
    assert {field for field in model.model_fields if field not in API} == set()


def test_every_error_of_the_client_is_there():
    errors = {name for name in client.__all__ if name.endswith(("Error", "Failed"))} - {"HalfquadClientError"}
    assert {name for name in errors if f"`{name}`" not in API} == set()
