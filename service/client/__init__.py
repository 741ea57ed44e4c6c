"""The Python SDK: httpx and nothing else of ours."""

from service.client.client import Client
from service.client.errors import (
    ApiError,
    ConflictError,
    ConnectionFailed,
    DownloadError,
    HalfquadClientError,
    InvalidRequestError,
    NotFoundError,
    ServerError,
)
from service.client.events import Event

__all__ = [
    "ApiError",
    "Client",
    "ConflictError",
    "ConnectionFailed",
    "DownloadError",
    "Event",
    "HalfquadClientError",
    "InvalidRequestError",
    "NotFoundError",
    "ServerError",
]
