"""Where a job's checkpoint comes from and where its result goes, as commands take it."""

import os
from typing import Annotated, Any

import typer


def target(
    push_to: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="Upload the result to this repository of the service's Hub.")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch to commit to; main unless given.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Where the repository is made, make it private.")] = False,
    push_credential: Annotated[
        str | None, typer.Option(help="Name of the service's credential to upload with.")
    ] = None,
    push_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Upload the result to this folder or bucket instead.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Upload also where files are already.")] = False,
) -> dict[str, Any] | None:
    """A target with only what was given; None where the result is to stay."""
    given: dict[str, Any] = {"overwrite": overwrite or None}
    of_hub = {
        "branch": branch,
        "create_pr": create_pr or None,
        "private": private or None,
        "credential": push_credential,
    }
    if push_to is not None and push_url is not None:
        raise typer.BadParameter("excludes --push-to", param_hint="--push-url")
    if push_to is None and (hint := next((name for name, value in of_hub.items() if value is not None), None)):
        option = "push-credential" if hint == "credential" else hint.replace("_", "-")
        raise typer.BadParameter("needs --push-to", param_hint=f"--{option}")
    if push_to is None and push_url is None:
        if overwrite:
            raise typer.BadParameter("needs --push-to or --push-url", param_hint="--overwrite")
        return None
    given |= {"url": push_url} if push_to is None else {"repo_id": push_to, **of_hub}
    return {name: value for name, value in given.items() if value is not None}


def source_of(text: str, revision: str | None, credential: str | None, drop: bool) -> dict[str, Any]:
    """The source that is meant: a folder where it looks like one or is one here, else a repository."""
    asked = {"revision": revision, "credential": credential, "keep": False if drop else None}
    given = {name: value for name, value in asked.items() if value is not None}
    if not (text.startswith((".", os.sep)) or os.path.isdir(text)):
        return {"type": "hub", "repo_id": text, **given}
    if revision is not None or drop:
        raise typer.BadParameter(f"{text} is a folder", param_hint="--revision" if revision else "--drop-source")
    return {"type": "folder", "path": os.path.abspath(text)}
