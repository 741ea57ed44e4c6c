"""Who am I, and is this model card in order."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from tests.fakehub.access import Downloadable, JsonBody, Known
from tests.fakehub.card import check_card

router = APIRouter()


@router.get("/api/whoami-v2")
def whoami(account: Known) -> dict[str, Any]:
    role = "write" if account.writes else "read"
    return {
        "type": "user",
        "id": account.user,
        "name": account.user,
        "fullname": account.user,
        "isPro": False,
        "orgs": [
            {"type": "org", "name": name, "fullname": name, "roleInOrg": "write"} for name in account.organizations
        ],
        "auth": {"type": "access_token", "accessToken": {"displayName": role, "role": role}},
    }


@router.post("/api/validate-yaml")
def validate_yaml(body: JsonBody) -> JSONResponse:
    errors, warnings = check_card(body["content"])
    content = {"errors": [{"message": one} for one in errors], "warnings": [{"message": one} for one in warnings]}
    return JSONResponse(content, 400 if errors else 200)


@router.get("/api/models/{namespace}/{name}/auth-check")
def auth_check(repo: Downloadable) -> dict[str, Any]:
    return {}
