"""Named credentials of the Hub. Requests, rows, events and logs have names; tokens are here and in the Hub's client only."""

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from service.common.errors import CredentialsInvalid, CredentialUnknown
from service.common.settings import Settings

DEFAULT = "default"  # what a request that names none gets, where it exists
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
TOKEN = re.compile(r"[\x21-\x7e]+")
FIELDS = frozenset({"token", "namespaces"})
FILE_LIMIT = 1024**2


@dataclass(frozen=True)
class Credential:
    """Who asks a Hub; without a token, nobody in particular."""

    name: str | None
    token: SecretStr | None
    namespaces: tuple[str, ...] | None = None  # that results may go to; None: those of the token

    def may_write_to(self, namespace: str) -> bool:
        return self.namespaces is None or namespace.lower() in map(str.lower, self.namespaces)


class Credentials:
    """Those of the settings and of their file, as it is now: a token that was mended needs no restart.

    CredentialsInvalid where the file cannot be used; a message has its name, neither where it lies nor any of its content.
    """

    def __init__(self, settings: Settings) -> None:
        self._known = _read(settings.credentials_file) if settings.credentials_file else {}
        if settings.hub_token is not None:
            if DEFAULT in self._known:
                raise CredentialsInvalid(f"the credential {DEFAULT!r} is given twice: in the file and as hub_token")
            if not TOKEN.fullmatch(settings.hub_token.get_secret_value()):
                raise CredentialsInvalid("hub_token: the token must be text without spaces")
            self._known[DEFAULT] = Credential(DEFAULT, settings.hub_token)

    def get(self, name: str | None) -> Credential:
        """The credential of a name; of none, the default or else nobody's. CredentialUnknown where there is none."""
        found = self._known.get(name or DEFAULT)
        if found is None and name is not None:
            # not its name: a token may have been written in its place
            raise CredentialUnknown("this service has no credential of that name")
        return found or Credential(None, None)


def _read(path: Path) -> dict[str, Credential]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IRWXO:
                raise CredentialsInvalid(f"{path.name} is open to everybody: chmod o= it")
            entries = json.loads(file.read(FILE_LIMIT))
    except OSError as error:
        raise CredentialsInvalid(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError:
        raise CredentialsInvalid(f"{path.name} is not JSON") from None  # the error has the content
    if not isinstance(entries, dict):
        raise CredentialsInvalid(f"{path.name}: wanted an object with a credential for each name")
    return {name: _credential(path, name, entry) for name, entry in entries.items()}


def _credential(path: Path, name: str, entry: Any) -> Credential:
    if not NAME.fullmatch(name):
        raise CredentialsInvalid(f"{path.name}: names are up to 63 letters, digits, dots, dashes and underscores")
    if not isinstance(entry, dict) or not entry.keys() <= FIELDS:
        raise CredentialsInvalid(
            f'{path.name}: {name}: wanted "token" and, if results may not go everywhere, "namespaces"'
        )
    token, namespaces = entry.get("token"), entry.get("namespaces")
    if not isinstance(token, str) or not TOKEN.fullmatch(token):
        raise CredentialsInvalid(f"{path.name}: {name}: the token must be text without spaces")
    if "namespaces" in entry and not (
        isinstance(namespaces, list) and all(isinstance(item, str) and item for item in namespaces)
    ):
        raise CredentialsInvalid(f"{path.name}: {name}: namespaces must be a list of names")
    return Credential(name, SecretStr(token), None if namespaces is None else tuple(namespaces))
