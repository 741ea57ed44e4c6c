"""What commands show: JSON for programs, and columns for people. Data goes to stdout, talk to stderr."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from service.client import Event

TERMINAL = ("succeeded", "failed", "cancelled")


def print_json(value: Any) -> None:
    """One value, indented."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows in columns; the first has their names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_job(job: dict[str, Any], as_json: bool) -> None:
    """One job."""
    if as_json:
        print_json(job)
        return
    lines = {
        "job": job["id"],
        "status": " ".join(filter(None, (job["status"], job["phase"] if job["status"] not in TERMINAL else ""))),
        "done": _percent(job),
        "source": _place(job["source"]),
        **{f"recipe {i}".removesuffix(" 0"): _settings_of(recipe) for i, recipe in enumerate(job["recipes"])},
        "target": job["target"] and _place(job["target"]),
        **_pushed((job["result"] or {}).get("pushed")),
        "error": job["error"] and f"{job['error']['code']}: {job['error']['message']}",
    }
    for name, value in lines.items():
        if value:
            typer.echo(f"{name:18} {value}")
    for output in (job["result"] or {"outputs": []})["outputs"]:
        if output["folder"]:
            typer.echo(f"{'folder':18} {output['folder']}")
        print_metrics(output["metrics"])


def print_watch(watch: dict[str, Any], as_json: bool) -> None:
    """One watch."""
    if as_json:
        print_json(watch)
        return
    lines = {
        "watch": watch["id"],
        "state": _state(watch),
        "source": _place(watch["source"]),
        **{f"recipe {i}".removesuffix(" 0"): _settings_of(recipe) for i, recipe in enumerate(watch["recipes"])},
        "target": _place(watch["target"]),
        "every": f"{watch['interval_s']} s",
        "last commit": watch["last_commit"],
        "last job": watch["last_job_id"],
        "last look": watch["last_checked_at"],
        "error": watch["last_error"] and f"{watch['last_error']['code']}: {watch['last_error']['message']}",
    }
    for name, value in lines.items():
        if value:
            typer.echo(f"{name:18} {value}")


def watch_row(watch: dict[str, Any]) -> tuple[str, ...]:
    """A watch as a row of a table."""
    looked = (watch["last_checked_at"] or "").partition(".")[0]
    places = _place(watch["source"]), _place(watch["target"])
    return watch["id"], _state(watch), (watch["last_commit"] or "")[:12], looked, *places


def _state(watch: dict[str, Any]) -> str:
    if not watch["enabled"]:
        return "disabled"
    return str(watch["last_error"]["code"]) if watch["last_error"] else "enabled"


def _place(place: dict[str, Any]) -> str:
    """A source or target in a few words."""
    name = place.get("repo_id") or place.get("path") or place["url"]
    return " ".join(filter(None, (name, place.get("commit") or place.get("revision") or place.get("branch"))))


def _pushed(pushed: dict[str, Any] | None) -> dict[str, Any]:
    if not pushed:
        return {}
    return {"uploaded to": pushed["url"], "commit": pushed["commit"], "pull request": pushed["pull_request"]}


def _settings_of(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in recipe.items() if value not in (None, []))


def print_metrics(metrics: dict[str, Any]) -> None:
    """Figures of one result."""
    typer.echo(f"{'source':18} {metrics['nbytes_in'] / 1e6:.1f} MB")
    typer.echo(f"{'result':18} {metrics['nbytes_out'] / 1e6:.1f} MB")
    typer.echo(f"{'bits per weight':18} {metrics['bits_per_weight']:.3f}")
    typer.echo(f"{'relative error':18} {metrics['relative_error']:.5f}")
    for tensor in metrics["worst_tensors"]:
        typer.echo(f"{'':18} {tensor['relative_error']:.5f} {tensor['name']}")


def job_row(job: dict[str, Any]) -> tuple[str, ...]:
    """A job as a row of a table."""
    formats, nbits = (",".join(dict.fromkeys(str(r[key]) for r in job["recipes"])) for key in ("format", "nbits"))
    created = job["created_at"].partition(".")[0]
    return job["id"], job["status"], _percent(job), formats, nbits, created, _place(job["source"])


def _percent(job: dict[str, Any]) -> str:
    percent = (job["progress"] or {}).get("percent")
    return "" if percent is None else f"{percent} %"


@contextmanager
def bytes_bar(name: str) -> Iterator[Any]:
    """A progress bar on stderr: what it gives takes steps done and in total."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def sentence(event: "Event") -> str:
    """An event in a few words; empty where there is nothing to say."""
    data = event.data
    match event.type:
        case "status":
            return f"{data['status']}: {data['phase']}" if data.get("phase") else str(data["status"])
        case "progress":
            return f"{data['phase']}: {data['percent']} %"
        case "log":
            return str(data["message"])
        case _:
            return ""
