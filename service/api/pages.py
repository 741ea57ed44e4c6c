"""Where a list goes on, either way, as RFC 8288 says it."""

from typing import Any

from fastapi import Request, Response

from service.common.repository import Page
from service.schemas import PageQuery


def add_links(response: Response, request: Request, query: PageQuery, page: Page[Any]) -> None:
    """The header `Link`, where there is more."""
    if links := _links(request, query, page):
        response.headers["Link"] = ", ".join(links)


def _links(request: Request, query: PageQuery, page: Page[Any]) -> list[str]:
    if not page.rows:
        return []
    backwards = query.before is not None
    url = request.url.remove_query_params(["after", "before"])
    links = []
    if backwards or page.has_more:
        links.append(f'<{url.include_query_params(after=page.last_id)}>; rel="next"')
    if query.after is not None or (backwards and page.has_more):
        links.append(f'<{url.include_query_params(before=page.first_id)}>; rel="prev"')
    return links
