"""URLs that results may be written to: which are well formed, and which are below an allowed one."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from service.common.errors import TargetNotAllowed

# no user, query or fragment: what a bucket needs beside its name, the worker has from its environment
PATTERN = r"^[a-z][a-z0-9+.-]{0,31}://[A-Za-z0-9._~/=+:-]{1,2048}$"


def _plain(url: str) -> str:
    """The URL without a slash at its end; every part of its path is a name."""
    url = url.rstrip("/")
    place, *names = url.partition("://")[2].split("/")
    if not (place or names) or "::" in url or any(name in ("", ".", "..") for name in names):
        raise ValueError('wanted a path below the root, no "::", and no part of the path empty, "." or ".."')
    return url


TargetUrl = Annotated[str, StringConstraints(pattern=PATTERN), AfterValidator(_plain)]


def check_target_url(url: str, allowed: Iterable[str]) -> None:
    """TargetNotAllowed unless the URL is below an allowed one, or is one."""
    if not any(url == prefix or url.startswith(f"{prefix}/") for prefix in allowed):
        raise TargetNotAllowed("the target is not below a URL that this service may write to")
