"""How the client speaks: within limits of time, redirects and waiting, over https where it began so, the token to one host."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._http import default_client_factory, hf_raise_for_status, set_client_factory

from service.common.errors import HubUnavailable
from worker.hub.faults import BUSY, HubFault, describe_error, wanted_wait_s

ANSWER_S = 30.0  # without a byte
EFFECT_S = 300.0  # the same, where the Hub has something to do first: a commit of many files
MAX_REDIRECTS = 5
TRIES = 4
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60  # what waits longer gives its place to another job meanwhile

Answer = TypeVar("Answer")


def begin_session(endpoint: str, token: str | None) -> None:
    """Have all of huggingface_hub use a client of our making."""
    home = httpx2.URL(endpoint)

    def stay_safe(request: httpx2.Request) -> None:
        """Whatever address an answer names: of a redirect, of a next page, of storage."""
        if home.scheme == "https" and request.url.scheme != "https":
            raise HubFault("hub_unavailable", f"{endpoint} leads to {request.url.host} without https: not followed")
        if token and _origin(request.url) != _origin(home) and token in request.headers.get("Authorization", ""):
            del request.headers["Authorization"]

    def limit_time(request: httpx2.Request) -> None:
        """The client asks for no limit at all in many places."""
        wanted = request.extensions.get("timeout") or {}
        if wanted.get("read") is None:
            read_s = ANSWER_S if request.method in ("GET", "HEAD") else EFFECT_S
            request.extensions["timeout"] = httpx2.Timeout(ANSWER_S, read=read_s).as_dict()

    def wait_no_longer(response: httpx2.Response) -> None:
        """The client sleeps as long as it is told to: a longer wait is an error at once, and the caller's to plan."""
        if response.status_code in BUSY and (wanted_wait_s(response) or 0) > LONGEST_WAIT_S:
            hf_raise_for_status(response)

    def make_client() -> httpx2.Client:
        client = default_client_factory()
        client.max_redirects = MAX_REDIRECTS
        hooks = client.event_hooks
        client.event_hooks = {"request": [*hooks["request"], stay_safe, limit_time], "response": [wait_no_longer]}
        return client

    set_client_factory(make_client)


@contextmanager
def understood(endpoint: str, repo_id: str) -> Iterator[None]:
    """Read an answer of the API: where the client stumbles over it, it is not one of a Hub's."""
    try:
        yield
    except HFValidationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubFault(
            "hub_unavailable", f"{endpoint} answers for {repo_id} what no Hub does ({type(error).__name__}): is it one?"
        ) from error


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def patiently(call: Callable[[], Answer]) -> Answer:
    """The answer to a call that the client does not try again by itself, and that may be made twice."""
    # tenacity would want these same lines, as its wait function
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:
            fault = describe_error(error)
            wait_s = fault.retry_after_s if fault.retry_after_s is not None else FIRST_WAIT_S * 2**attempt
            if fault.code != HubUnavailable.code or attempt == TRIES - 1 or wait_s > LONGEST_WAIT_S:
                raise
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")
