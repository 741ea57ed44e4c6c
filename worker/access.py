"""The one Hub of the settings, with the token of a credential that is known by its name."""

from service.common.credentials import Credentials
from service.common.errors import NamespaceNotAllowed
from service.common.settings import Settings
from worker.hub import Endpoint, Hub

PUBLIC = "https://huggingface.co"


def hub_of(settings: Settings, credential: str | None, *, writes_to: str | None = None) -> Hub:
    """CredentialUnknown where there is none of that name, NamespaceNotAllowed where it may not write to that repository."""
    found = Credentials(settings).get(credential)
    namespace = (writes_to or "").partition("/")[0]
    if writes_to and not found.may_write_to(namespace):
        raise NamespaceNotAllowed(f"credential {found.name!r} may not write to {namespace}")
    url = settings.hub_endpoint
    xet = url == PUBLIC if settings.hub_xet is None else settings.hub_xet
    return Hub(Endpoint(url, xet), found.token.get_secret_value() if found.token else None, found.name)
