"""halfquad: one command. Data goes to stdout, talk to stderr; commands load what they need when they run.

Exit codes: 0 done, 1 failed (also a result that is not sound, or where the system refuses a file), 2 bad input, 130 interrupted.
"""

import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from service.printing import bytes_bar, job_row, print_job, print_json, print_metrics, print_table, sentence
from service.recipe_options import takes_recipes

if TYPE_CHECKING:
    from service.client import Client
    from service.common.settings import Settings

DEFAULT_URL = "http://127.0.0.1:8000"
API_STOP_S = 5  # open event streams are cut after this

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
jobs = typer.Typer(no_args_is_help=True, help="Look at jobs and stop them.")
app.add_typer(jobs, name="jobs")

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Url = Annotated[str, typer.Option(envvar="HALFQUAD_URL", help="Where the service answers.")]
JobId = Annotated[str, typer.Argument(help="A job's id.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder for jobs, results and the embedded services.")]
SourceRoot = Annotated[
    list[Path] | None, typer.Option(help="Folder that local sources may come from; may be given again.")
]


def main() -> NoReturn:
    """Entry point: errors become one line on stderr and an exit code."""
    try:
        app()
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(code)
    sys.exit(0)


def _exit_code(error: Exception) -> int | None:
    """What an error of ours, or of the system, ends the command with; None for a bug."""
    from hqq_core.errors import HalfquadError, StorageFullError, VerificationError
    from service.client import HalfquadClientError, InvalidRequestError, NotFoundError
    from service.common.errors import ServiceError

    match error:
        case StorageFullError() | VerificationError():
            return 1
        case HalfquadError() | InvalidRequestError() | NotFoundError():
            return 2
        case HalfquadClientError() | ServiceError() | OSError():
            return 1
        case _:
            return None


# The service


@app.command()
def up(host: Host = None, port: Port = None, data_dir: DataDir = None, source_root: SourceRoot = None) -> None:
    """Run everything here: API, worker and, unless HALFQUAD_BROKER_URL is set, an embedded broker."""
    _set(HOST=host, PORT=port, DATA_DIR=data_dir, SOURCE_ROOTS=_joined(source_root))
    _become("worker.embedded")


@app.command()
def api(host: Host = None, port: Port = None) -> None:
    """Run the REST API."""
    import uvicorn

    from service.app import create_app
    from service.common import schema
    from service.common.logs import configure_logging
    from service.common.session import Database

    _set(HOST=host, PORT=port)
    settings = _settings()
    configure_logging(settings.log_level)
    database = Database(settings.database_url)
    schema.check_head(database)  # in one line here, in a trace from uvicorn
    database.close()
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=API_STOP_S,
    )


@app.command()
def worker(
    name: Annotated[
        str | None,
        typer.Option(help="Stays the same over restarts, unique on its host: what was lost with it is found at once."),
    ] = None,
) -> None:
    """Run one worker; start as many as there are devices."""
    _become("worker", "--hostname", f"{name or f'worker-{secrets.token_hex(4)}'}@%h")


@app.command()
def migrate() -> None:
    """Bring the database to the schema of this version."""
    from service.common import schema
    from service.common.logs import configure_logging
    from service.common.session import Database

    settings = _settings()
    configure_logging(settings.log_level)
    database = Database(settings.database_url)
    schema.migrate(database)
    database.close()


def _settings() -> "Settings":
    from pydantic import ValidationError

    from service.common.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        for wrong in error.errors():
            typer.echo(f"error: HALFQUAD_{str(wrong['loc'][0]).upper()}: {wrong['msg']}", err=True)
        raise typer.Exit(2) from None


def _set(**options: Any) -> None:
    """Options are settings: this process and its children read them as such."""
    os.environ.update({f"HALFQUAD_{name}": str(value) for name, value in options.items() if value is not None})


def _joined(paths: list[Path] | None) -> str | None:
    return os.pathsep.join(map(str, paths)) if paths else None


def _become(module: str, *arguments: str) -> NoReturn:
    """Run a module in place of this process: its signals and its exit code are ours."""
    _settings()
    # -P: a folder named worker in the current directory is not ours
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


# Without a service


@app.command()
@takes_recipes
def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder with a safetensors checkpoint.")],
    output: Annotated[Path, typer.Option(help="New folder for the result.")],
    recipes: list[dict[str, Any]],
    threads: Annotated[int | None, typer.Option(min=1, help="Solver threads; all cores unless given.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint into a new folder, or for several formats into a folder each below it; needs no service."""
    from hqq_core.convert import quantize_checkpoint
    from hqq_core.outputs import output_folders
    from hqq_core.recipe import Recipe

    settings = [Recipe.from_dict(recipe) for recipe in recipes]
    with bytes_bar(source.name) as report:
        progress = _stopping_on_signals(report)
        manifests = quantize_checkpoint(
            source, output, *settings, threads=threads or os.cpu_count() or 1, progress=progress
        )
    outputs = [
        {"folder": folder, "format": recipe.format, **manifest.to_dict()}
        for folder, recipe, manifest in zip(output_folders(settings), settings, manifests, strict=True)
    ]
    if as_json:
        print_json({"output": str(output), "outputs": outputs})
        return
    for made in outputs:
        print_metrics(made["metrics"])
        typer.echo(f"{'written to':18} {output / made['folder']}")


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A result: of `quantize`, or downloaded from a job.")
    ],
    against: Annotated[Path | None, typer.Option(metavar="SRC", help="The checkpoint it was made of.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="All cores unless given.")] = None,
    as_json: Json = False,
) -> None:
    """Read a result again and compare it with what was solved, and with its source; exits with 1 where it is not sound."""
    from hqq_core.checkpoint import Checkpoint
    from hqq_core.errors import VerificationError
    from hqq_core.verify import verify_folder

    source = Checkpoint.open(against) if against else None
    try:
        with bytes_bar(folder.name) as report:
            found = verify_folder(folder, source, threads=threads, progress=_stopping_on_signals(report))
    except VerificationError as error:
        if as_json:
            print_json({"sound": False, "name": error.name, "message": str(error)})
        raise
    if as_json:
        print_json({"sound": True, **found.to_dict()})
        return
    compared = f"and with {against}" if against else "(give --against SRC to compare with the source too)"
    typer.echo(f"{'sound':18} {found.files} files, {found.nbytes / 1e6:.1f} MB")
    typer.echo(f"{'quantized':18} {found.tensors_quantized} tensors, compared with what was solved {compared}")
    typer.echo(f"{'copied':18} {found.tensors_copied} tensors")


@app.command()
def formats(as_json: Json = False) -> None:
    """List the formats: what each holds, and what loads it."""
    from hqq_core.formats import FORMATS, described

    if as_json:
        print_json(described())
        return
    held = {name: writer.capabilities.words() for name, writer in FORMATS.items()}
    head = ("format", *next(iter(held.values())))
    print_table([tuple(map(str.upper, head)), *((name, *words.values()) for name, words in held.items())])


def _stopping_on_signals(report: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """`report`, which also ends the command after Ctrl-C or SIGTERM: raised elsewhere, they could leave a lock held for ever."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))

    def progress(nbytes_done: int, nbytes_total: int) -> None:
        if received:
            sys.exit(128 + received[0])  # what was half written goes
        report(nbytes_done, nbytes_total)

    return progress


# Against a service


@app.command()
@takes_recipes
def submit(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder with a safetensors checkpoint, as the service sees it.")
    ],
    recipes: list[dict[str, Any]],
    label: Annotated[list[str] | None, typer.Option(help="key:value; may be given again.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Submit a job."""
    with _client(url) as client:
        job = client.submit(
            source=os.path.abspath(source),
            **({"recipe": recipes[0]} if len(recipes) == 1 else {"recipes": recipes}),
            labels=dict(_label(text) for text in label or ()),
        )
        if watch:
            _follow(client, job["id"], as_json)
        else:
            print_job(job, as_json)


@jobs.command("ls")
def list_jobs(
    status: Annotated[list[str] | None, typer.Option(help="Only these; may be given again.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 20,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """List jobs, the newest first."""
    from itertools import islice

    with _client(url) as client:
        found = list(islice(client.list(**({"status": status} if status else {})), limit))
    if as_json:
        print_json(found)
        return
    print_table([("ID", "STATUS", "DONE", "FORMAT", "BITS", "CREATED", "SOURCE"), *map(job_row, found)])


@jobs.command()
def info(job_id: JobId, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show one job."""
    with _client(url) as client:
        print_job(client.get(job_id), as_json)


@jobs.command()
def watch(job_id: JobId, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Follow a job to its end; exits with 1 unless it succeeds."""
    with _client(url) as client:
        _follow(client, job_id, as_json)


@jobs.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Stop a job."""
    with _client(url) as client:
        print_job(client.cancel(job_id), as_json)


@contextmanager
def _client(url: str) -> "Iterator[Client]":
    from service.client import Client

    with Client(base_url=url) as client:
        yield client


def _label(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not colon:
        raise typer.BadParameter(f"{text!r} is not key:value", param_hint="--label")
    return key, value


def _follow(client: "Client", job_id: str, as_json: bool) -> None:
    for event in client.events(job_id):
        if as_json:
            typer.echo(json.dumps({"seq": event.seq, "type": event.type, "data": event.data}))
        elif line := sentence(event):
            typer.echo(line, err=True)
    job = client.get(job_id)
    if not as_json:
        print_job(job, as_json)
    if job["status"] != "succeeded":
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
