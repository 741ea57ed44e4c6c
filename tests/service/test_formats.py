import itertools

import pytest

from hqq_core.formats import FORMATS, check_recipe
from hqq_core.recipe import Recipe
from service.client import Client
from service.schemas import FormatList


def test_the_list_has_every_format_as_declared(api):
    response = api.get("/v1/formats")
    body = response.json()
    assert response.status_code == 200
    assert (body["object"], body["has_more"]) == ("list", False)
    assert [entry["name"] for entry in body["data"]] == list(FORMATS)
    assert [entry["name"] for entry in body["data"] if entry["default"]] == [Recipe().format]
    for entry in body["data"]:
        held = FORMATS[entry["name"]].capabilities
        assert entry["nbits"] == list(held.nbits)
        assert [(one["name"], one["version"]) for one in entry["runtimes"]] == [
            (runtime.name, runtime.version) for runtime in held.runtimes
        ]


def test_a_job_can_be_drawn_from_the_list(api):
    """The first size, axis and zero of each width make a recipe that its format holds; where there are types, each is one."""
    for entry in api.get("/v1/formats").json()["data"]:
        for name in entry["types"]:
            assert check_recipe(Recipe(format=entry["name"], type=name)).zero in itertools.chain(
                *entry["zeros"].values()
            )
        if entry["types"]:
            continue
        for nbits, zeros in entry["zeros"].items():
            width = float(nbits)
            size = (entry["group_sizes"] or [entry["group_multiple"]])[0]
            recipe = Recipe(
                format=entry["name"],
                nbits=int(width) if width.is_integer() else width,
                group_size=size,
                axis=entry["axes"][0],
                zero=zeros[0],
            )
            assert check_recipe(recipe).zero == zeros[0]


def test_parameters_are_refused(api):
    assert api.get("/v1/formats?limit=3").status_code == 422


def test_its_response_is_in_the_schema(api):
    schema = api.get("/openapi.json").json()
    content = schema["paths"]["/v1/formats"]["get"]["responses"]["200"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/FormatList"}
    assert set(schema["components"]["schemas"]["FormatBody"]["properties"]) >= {"name", "nbits", "zeros", "runtimes"}


@pytest.mark.parametrize("field", ["name", "zeros", "experimental"])
def test_the_client_returns_it(api_url, field):
    with Client(api_url) as client:
        listed = client.formats()
    assert all(field in entry for entry in listed)
    assert FormatList(data=listed).data


def test_a_job_that_keeps_weights_as_they_are_is_not_weighed(api, root):
    body = {
        "source": {"type": "folder", "path": str(root)},
        "recipe": {"format": "bitnet", "nbits": 1.58, "group_size": None},
    }
    recipe = api.post("/v1/jobs", json=body).json()["recipes"][0]
    assert (recipe["energy"], recipe["fold"]) == ("none", False)
    body |= {"recipe": None, "recipes": [body["recipe"], {"format": "mlx"}]}
    assert [recipe["energy"] for recipe in api.post("/v1/jobs", json=body).json()["recipes"]] == ["none", "auto"]
