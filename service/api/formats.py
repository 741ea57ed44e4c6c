"""/v1/formats"""

from fastapi import APIRouter, Depends

from hqq_core.formats import described
from service.api.problems import responses
from service.deps import no_query
from service.schemas import FormatBody, FormatList

router = APIRouter(prefix="/v1/formats", tags=["formats"], responses=responses(422, 500))


@router.get("", dependencies=[Depends(no_query)])
async def list_formats() -> FormatList:
    """What each format holds, and what loads it."""
    return FormatList(data=[FormatBody(**fields) for fields in described()])
