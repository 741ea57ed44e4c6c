"""halfquad watch: follow branches of the service's Hub."""

from itertools import islice
from typing import Annotated, Any

import typer

from service.gathered_options import takes
from service.place_options import source_of, target
from service.printing import print_json, print_table, print_watch, watch_row
from service.recipe_options import fields_of, recipes
from service.service_options import DEFAULT_URL, Json, Label, Owner, Priority, Url, connected, labels_of

app = typer.Typer(no_args_is_help=True, help="Follow branches: each new head becomes a job.")

WatchId = Annotated[str, typer.Argument(help="A watch's id.")]
Interval = Annotated[int | None, typer.Option("--interval", metavar="SECONDS", help="Time between two looks.")]


@app.command()
@takes(recipes, target)
def add(
    source: Annotated[str, typer.Argument(metavar="REPO_ID", help="A repository of the service's Hub.")],
    recipes: list[dict[str, Any]],
    target: dict[str, Any] | None,
    revision: Annotated[str | None, typer.Option(help="Branch to follow; main unless given.")] = None,
    credential: Annotated[
        str | None, typer.Option(help="Name of the service's credential; also to upload with, unless that has its own.")
    ] = None,
    commit: Annotated[
        bool, typer.Option("--commit", help="Commit to the target's branch in place of a pull request.")
    ] = False,
    interval_s: Interval = None,
    run_now: Annotated[bool, typer.Option("--run-now", help="Make a job for the head that is there, too.")] = False,
    label: Label = None,
    owner: Owner = None,
    priority: Priority = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Follow a branch; each result goes to a pull request at the target unless told otherwise."""
    if target is None:
        raise typer.BadParameter("a watch needs it, or --push-url", param_hint="--push-to")
    if "repo_id" in target:
        target = {"credential": credential, "create_pr": not commit, **target}
    elif commit:
        raise typer.BadParameter("needs --push-to", param_hint="--commit")
    with connected(url) as client:
        watch = client.add_watch(
            source_of(source, revision, credential, False),
            **fields_of(recipes),
            target=target,
            labels=labels_of(label),
            owner=owner,
            priority=priority,
            interval_s=interval_s,
            run_now=run_now,
        )
    print_watch(watch, as_json)


@app.command("list")
def list_watches(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 20,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """List watches, the newest first."""
    with connected(url) as client:
        found = list(islice(client.watches(), limit))
    if as_json:
        print_json(found)
        return
    print_table([("ID", "STATE", "LAST COMMIT", "LAST LOOK", "SOURCE", "TARGET"), *map(watch_row, found)])


@app.command()
def info(watch_id: WatchId, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show one watch."""
    with connected(url) as client:
        print_watch(client.get_watch(watch_id), as_json)


@app.command()
def change(
    watch_id: WatchId,
    enabled: Annotated[bool | None, typer.Option("--enable/--disable", help="Go on with it, or pause it.")] = None,
    interval_s: Interval = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Change a watch, and look at once."""
    with connected(url) as client:
        print_watch(client.change_watch(watch_id, enabled=enabled, interval_s=interval_s), as_json)


@app.command()
def remove(watch_id: WatchId, url: Url = DEFAULT_URL) -> None:
    """Follow a branch no longer; jobs that were made go on."""
    with connected(url) as client:
        client.remove_watch(watch_id)
