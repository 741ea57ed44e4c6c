"""halfquad: one command. Data goes to stdout, talk to stderr; commands load what they need when they run.

Exit codes: 0 done, 1 failed (also a result that is not sound, or where the system refuses a file), 2 bad input, 130 interrupted.
"""

import json
import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from service import watch_commands
from service.gathered_options import takes
from service.place_options import source_of, target
from service.printing import bytes_bar, job_row, print_job, print_json, print_metrics, print_table, sentence
from service.recipe_options import fields_of, recipes
from service.service_options import DEFAULT_URL, Json, Label, Owner, Priority, Url, connected, labels_of

if TYPE_CHECKING:
    from service.client import Client
    from service.common.settings import Settings

API_STOP_S = 5  # open event streams are cut after this

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
jobs = typer.Typer(no_args_is_help=True, help="Look at jobs and stop them.")
app.add_typer(jobs, name="jobs")
app.add_typer(watch_commands.app, name="watch")

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
    from service.common.credentials import Credentials
    from service.common.logs import configure_logging
    from service.common.session import Database

    _set(HOST=host, PORT=port)
    settings = _settings()
    configure_logging(settings.log_level)
    Credentials(settings)  # what is wrong is said in one line here, in a trace from uvicorn
    database = Database(settings.database_url)
    schema.check_head(database)
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
@takes(recipes)
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
    result: Annotated[
        str,
        typer.Argument(metavar="RESULT", help="A folder: of `quantize`, or of a job; or OWNER/NAME on the Hub."),
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="SRC", help="The checkpoint it was made of, in a folder or on the Hub.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="All cores unless given.")] = None,
    as_json: Json = False,
) -> None:
    """Read a result again and compare it with what was solved, and with its source; exits with 1 where it is not sound."""
    from service.verifying import verify_results

    verify_results(result, revision, against, threads=threads, as_json=as_json, stopping=_stopping_on_signals)


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
@takes(recipes, target)
def submit(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A repo_id of the service's Hub, or a folder as the service sees it: what begins with / or ., or is one here.",
        ),
    ],
    recipes: list[dict[str, Any]],
    target: dict[str, Any] | None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the repository; main unless given.")
    ] = None,
    credential: Annotated[
        str | None, typer.Option(help="Name of the service's credential; also to upload with, unless that has its own.")
    ] = None,
    drop_source: Annotated[
        bool, typer.Option("--drop-source", help="Keep no weight files of the repository for later jobs.")
    ] = False,
    label: Label = None,
    owner: Owner = None,
    priority: Priority = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Submit a job."""
    if credential is not None and target is not None and "repo_id" in target:
        target = {"credential": credential, **target}
    with connected(url) as client:
        job = client.submit(
            source=source_of(source, revision, credential, drop_source),
            target=target,
            **fields_of(recipes),
            labels=labels_of(label),
            owner=owner,
            priority=priority,
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

    with connected(url) as client:
        found = list(islice(client.list(**({"status": status} if status else {})), limit))
    if as_json:
        print_json(found)
        return
    print_table([("ID", "STATUS", "DONE", "FORMAT", "BITS", "CREATED", "SOURCE"), *map(job_row, found)])


@jobs.command()
def info(job_id: JobId, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show one job."""
    with connected(url) as client:
        print_job(client.get(job_id), as_json)


@jobs.command()
def watch(job_id: JobId, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Follow a job to its end; exits with 1 unless it succeeds."""
    with connected(url) as client:
        _follow(client, job_id, as_json)


@jobs.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Stop a job."""
    with connected(url) as client:
        print_job(client.cancel(job_id), as_json)


@jobs.command()
@takes(target)
def retry(job_id: JobId, target: dict[str, Any] | None, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Begin a failed upload again, to the same place or another."""
    with connected(url) as client:
        print_job(client.retry(job_id, target=target), as_json)


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
