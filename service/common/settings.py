"""One Settings, read once from HALFQUAD_* variables and passed in."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.common.target_urls import TargetUrl

SOCKET_PATH_LIMIT = 100  # sun_path holds 108 bytes on Linux, 104 on macOS


def broker_socket(data_dir: Path) -> Path:
    """The embedded broker's socket: in the data directory, or in a short one named after it where that is too long."""
    near = data_dir / "run" / "valkey.sock"
    if len(os.fsencode(near)) <= SOCKET_PATH_LIMIT:
        return near
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(runtime_dir) / f"halfquad-{os.getuid()}-{name}" / "valkey.sock"


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))  # Path.absolute() keeps ".."


def _split_paths(value: Any) -> Any:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _split_words(value: Any) -> Any:
    return re.split(r"[,\s]+", value.strip(", \t\n")) if isinstance(value, str) and value.strip() else value or ()


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("wanted http:// or https:// and a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("neither user nor query has a place in an endpoint: tokens are credentials")
    return url.rstrip("/")


def _token(value: Any) -> Any:
    """Without the newline that files and secrets end with; an empty one is none."""
    return value.strip() or None if isinstance(value, str) else value


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """Every knob of API and worker; all processes of one installation share the first three."""

    model_config = SettingsConfigDict(
        env_prefix="HALFQUAD_", frozen=True, extra="ignore", validate_default=True, use_attribute_docstrings=True
    )

    data_dir: AbsolutePath = Path(".halfquad")
    """Jobs, results and the embedded services' files."""
    database_url: str = Field(default_factory=lambda data: f"sqlite:///{data['data_dir']}/halfquad.db")
    """SQLAlchemy URL; SQLite in the data directory unless set, `postgresql://` for many machines."""
    broker_url: str = Field(default_factory=lambda data: f"redis+socket://{broker_socket(data['data_dir'])}")
    """Redis or Valkey; the embedded broker's unix socket unless set."""

    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: Port = 8000
    """Port the API listens on."""
    docs: bool = True
    """Serve /docs and /openapi.json."""
    max_body_nbytes: PositiveInt = 1024**2
    """Larger request bodies are refused with 413."""
    source_roots: Annotated[tuple[AbsolutePath, ...], NoDecode, BeforeValidator(_split_paths)] = ()
    """Folders that local sources may come from, separated like PATH; none: local sources are off."""
    hub_endpoint: Annotated[str, AfterValidator(_endpoint)] = "https://huggingface.co"
    """The one Hub that repositories come from and go to; never named by a request."""
    hub_xet: bool | None = None
    """Transfer large files by Xet; unless set, where the endpoint is huggingface.co."""
    hub_token: Annotated[SecretStr | None, BeforeValidator(_token)] = None
    """Token of the credential `default`, which is taken where a request names none."""
    credentials_file: AbsolutePath | None = None
    """JSON with more credentials by name, closed to others on the machine."""
    target_urls: Annotated[tuple[TargetUrl, ...], NoDecode, BeforeValidator(_split_words)] = ()
    """URLs below which results may be written, separated by spaces or commas; none: only the Hub is."""
    source_cache_nbytes: NonNegativeInt = 32 * 1024**3
    """Disk space for weight files of Hub sources that later units and jobs may use."""
    idempotency_s: PositiveFloat = 24 * 3600
    """How long an Idempotency-Key is remembered."""
    events_kept_s: PositiveFloat = 30 * 24 * 3600
    """How long a job's events, its log among them, are kept after its end; how it ended is kept with the job."""

    threads: PositiveInt = Field(default_factory=lambda: os.cpu_count() or 1)
    """Solver threads of one unit; all cores unless set."""
    min_free_nbytes: NonNegativeInt = 1024**3
    """Disk space that results leave free."""
    energy_cache_nbytes: NonNegativeInt = 4 * 1024**3
    """Disk space for input energies that later jobs on the same source may use."""
    lease_s: PositiveFloat = 90
    """A running unit not heard of for this long is taken from its worker."""
    heartbeat_s: PositiveFloat = 20
    """How often a worker renews the lease of its unit."""
    cancel_poll_s: PositiveFloat = 1
    """How often a running unit writes its progress and looks for a cancel."""
    housekeeping_s: PositiveFloat = 5
    """How often a worker sends due units and looks for lost ones."""
    redispatch_s: PositiveFloat = 30
    """A unit that was sent but not claimed for this long is sent again."""
    max_attempts: PositiveInt = 3
    """Starts of one unit before its job fails."""
    backoff_s: NonNegativeFloat = 5
    """Wait before a unit's second start; doubles with each further one."""
    backoff_limit_s: NonNegativeFloat = 300
    """Longest wait between two starts of a unit."""
    visibility_timeout_s: PositiveInt = 300
    """The broker redelivers a message that was not renewed for this long."""
    soft_shutdown_s: NonNegativeFloat = 60
    """How long a stopping worker goes on with its unit before it hands it back; 0 under `halfquad up`."""
    max_child_nbytes: PositiveInt = 4 * 1024**3
    """A worker's pool child that ever held more memory than this is replaced after its unit."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level that is logged."""

    @property
    def embedded_socket(self) -> Path | None:
        """Where the embedded broker listens; None with a broker of one's own."""
        socket = broker_socket(self.data_dir)
        return socket if self.broker_url == f"redis+socket://{socket}" else None
