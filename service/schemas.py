"""Request and response bodies."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from hqq_core.recipe import DEFAULT_MAX_SHARD_NBYTES
from service.common.models import DEFAULT_OWNER
from service.common.status import JobStatus, Phase
from service.job_places import Source, Target

# no control characters: they are never meant, and PostgreSQL refuses NUL
LabelKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,255}$")]
ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=512)]
ModuleNames = Annotated[list[ModuleName], Field(max_length=4096)]


def _utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("in UTC it lies outside the years 1 to 9999") from None


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number


Nbits = Annotated[StrictFloat, AfterValidator(_whole)]  # 1.58 has no integer
Time = Annotated[AwareDatetime, AfterValidator(_utc)]


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ResponseBody(BaseModel):
    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)


class RecipeBody(RequestBody):
    """The library's recipe; what a format can hold is the library's to say."""

    format: Annotated[str, StringConstraints(min_length=1, max_length=64)] = "compressed-tensors"
    nbits: Nbits = 4
    group_size: StrictInt | None = 64
    axis: StrictInt = 1
    zero: Literal["float", "offset", "int", "none"] | None = None
    """Null: what the format holds best."""
    type: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    """Of format gguf a file type as llama.cpp names it, such as Q4_K_M; of format mlx a mix of widths as mlx-lm names it, such
    as mixed_4_6. `GET /v1/formats` says which settings follow from it."""
    preset: Literal["fast", "balanced", "best"] = "balanced"
    """How long the solver searches."""
    energy: Literal["auto", "synthetic", "analytic", "none"] = "auto"
    """Where the weights of the columns come from; auto takes the first of the others that can be had."""
    fold: StrictBool = True
    """Even out columns where norms or rows before can take it back; adapters made for the source do not fit then."""
    include_modules: ModuleNames = []
    skip_modules: ModuleNames = []
    max_shard_nbytes: StrictInt = DEFAULT_MAX_SHARD_NBYTES


class JobCreate(RequestBody):
    source: Source
    recipe: RecipeBody | None = None
    """What to make of it; without one, a recipe of defaults."""
    recipes: Annotated[list[RecipeBody], Field(min_length=1, max_length=8)] | None = None
    """Several at once, each with a folder of its own; in place of `recipe`."""
    target: Target | None = None
    """Where the result goes; null: it stays to be downloaded."""
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32)] = {}
    owner: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] = DEFAULT_OWNER
    """Whose job it is: of the same priority, owners take turns."""
    priority: Annotated[StrictInt, Field(ge=0, le=9)] = 5
    """Higher runs first."""

    @field_validator("recipes")
    @classmethod
    def _alone(cls, recipes: list[RecipeBody] | None, info: ValidationInfo) -> list[RecipeBody] | None:
        if recipes is not None and info.data.get("recipe") is not None:
            raise PydanticCustomError("conflict", "recipe and recipes exclude each other")
        return recipes

    @property
    def asked(self) -> dict[str, RecipeBody]:
        """The recipes, by where they stand in the body."""
        if self.recipes is None:
            return {"/recipe": self.recipe or RecipeBody()}
        return {f"/recipes/{index}": recipe for index, recipe in enumerate(self.recipes)}


class JobRetry(RequestBody):
    """What a retry of an upload changes."""

    target: Target | None = None
    """In place of the job's; null: the same again."""


class PageQuery(RequestBody):
    """Which stretch of a list."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: Annotated[str, StringConstraints(max_length=64)] | None = None
    """What follows this id in the list."""
    before: Annotated[str, StringConstraints(max_length=64)] | None = None
    """What comes before this id in the list."""
    order: Literal["asc", "desc"] = "desc"

    @field_validator("before")
    @classmethod
    def _one_cursor(cls, before: str | None, info: ValidationInfo) -> str | None:
        if before is not None and info.data.get("after") is not None:
            raise PydanticCustomError("conflict", "after and before exclude each other")
        return before


class JobQuery(PageQuery):
    """Which jobs a list holds, and which stretch of it."""

    status: list[JobStatus] = []
    label: Annotated[list[Annotated[str, StringConstraints(pattern=r"^[^:\x00-\x1f]+:[^\x00-\x1f]*$")]], Field()] = []
    """`key:value`; all must match."""
    created_after: Time | None = None
    created_before: Time | None = None
    q: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{1,255}$")] | None = None
    """Part of an id, of a source's path or repo_id, or of a target's repo_id or url."""


class EventQuery(RequestBody):
    """Which events of a job."""

    after: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Events that follow this sequence number."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    """Of a list; a stream has no limit."""
    last_event_id: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Of a stream: as the header, where a client cannot set one."""


class NoQuery(RequestBody):
    """No parameters."""


class Progress(ResponseBody):
    phase: Phase
    completed: int
    total: int | None
    unit: Literal["bytes"]
    percent: float | None
    eta_seconds: float | None


class Durations(ResponseBody):
    """Seconds; null until the phase is over."""

    queued: float | None
    plan: float | None
    profile: float | None
    quantize: float | None
    verify: float | None
    upload: float | None


class JobErrorBody(ResponseBody):
    code: str
    type: Literal["user", "system", "upstream"]
    message: str
    retryable: bool


class Artifact(ResponseBody):
    name: str
    nbytes: int
    sha256: str


class Output(ResponseBody):
    """What one recipe gave."""

    folder: str
    """Where its artifacts are; empty where the job has one recipe."""
    format: str
    metrics: dict[str, Any]


class Pushed(ResponseBody):
    """Where the result went."""

    url: str
    commit: str | None = None
    """Of a Hub."""
    pull_request: str | None = None
    """Its URL, where one was opened."""


class JobResult(ResponseBody):
    outputs: list[Output]
    """One for each recipe."""
    artifacts: list[Artifact]
    pushed: Pushed | None = None
    """Null before the upload has ended, or where the job has no target."""


class JobBody(ResponseBody):
    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    phase: Phase | None
    attempt: int
    max_attempts: int
    progress: Progress | None
    source: dict[str, Any]
    recipes: list[dict[str, Any]]
    target: dict[str, Any] | None
    owner: str
    priority: int
    labels: dict[str, str]
    error: JobErrorBody | None
    result: JobResult | None
    created_at: datetime
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    durations: Durations
    version: int


class JobList(ResponseBody):
    object: Literal["list"] = "list"
    data: list[JobBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EventBody(ResponseBody):
    object: Literal["event"] = "event"
    seq: int
    type: str
    data: dict[str, Any]
    created_at: datetime


class EventList(ResponseBody):
    object: Literal["list"] = "list"
    data: list[EventBody]
    has_more: bool


class RuntimeBody(ResponseBody):
    """Software that loads a format."""

    name: str
    version: str
    note: str
    """What it needs beside, or which settings alone it takes."""


class FormatBody(ResponseBody):
    """What one format holds."""

    object: Literal["format"] = "format"
    name: str
    default: bool
    """Taken where a recipe names none."""
    nbits: list[float]
    zeros: dict[str, list[Literal["float", "offset", "int", "none"]]]
    """By nbits; the first is taken where a recipe leaves it open."""
    group_sizes: list[int]
    group_multiple: int | None
    """Multiples of it are held too."""
    whole_channel: bool
    """`group_size` null is held too."""
    axes: list[int]
    types: list[str]
    """What a recipe may give as its type."""
    typed_settings: list[str]
    """Settings that follow from a type."""
    exactness: str
    runtimes: list[RuntimeBody]
    lossless: bool
    """Weights that are on its grid already are kept as they are, all others refused."""
    experimental: bool
    """Never run by its readers here."""
    library: str
    """`library_name` of the model cards of its results."""


class FormatList(ResponseBody):
    object: Literal["list"] = "list"
    data: list[FormatBody]
    has_more: bool = False


class ArtifactList(ResponseBody):
    object: Literal["list"] = "list"
    data: list[Artifact]
    has_more: bool = False


class FieldProblem(ResponseBody):
    pointer: str
    """JSON pointer into the body, or `query/<name>`, `header/<name>`, `path/<name>`."""
    code: str
    detail: str


class Problem(ResponseBody):
    """RFC 9457, and what programs need beyond it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    """Stable; switch on this."""
    request_id: str
    errors: list[FieldProblem] = []
    retryable: bool


class Check(ResponseBody):
    ok: bool
    detail: str


class Liveness(ResponseBody):
    status: Literal["ok"] = "ok"


class Readiness(ResponseBody):
    status: Literal["ok", "degraded", "unavailable"]
    checks: dict[str, Check]
