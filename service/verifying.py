"""`halfquad verify`: each result that lies in a place, read again, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from service.places import Place, found
from service.printing import bytes_bar, print_json

if TYPE_CHECKING:
    from hqq_core.checkpoint import Checkpoint
    from hqq_core.verify import Verified

SOURCE_FILES = ["*.safetensors", "*.json"]

Report = Callable[[int, int], None]


def verify_results(
    name: str,
    revision: str | None,
    against: str | None,
    *,
    threads: int | None,
    as_json: bool,
    stopping: Callable[[Report], Report],
) -> None:
    """Check one result, or all that lie in folders of their own, with the source where there is one; `stopping` hears signals.

    Raises
    ------
    VerificationError, CheckpointError
        As `verify_folder`; with JSON, the former is printed too.
    """
    with found(name, revision) as place, _source(place, against) as source:
        outputs = {}
        for folder in place.results():
            with bytes_bar(folder or name) as report, _told(place, folder, as_json):
                outputs[folder] = _verified(place, folder, source, threads, stopping(report))
        if as_json:
            _print_json(place, outputs)
        else:
            _print(place, outputs, against)


def _verified(place: Place, folder: str, source: Checkpoint | None, threads: int | None, report: Report) -> Verified:
    from hqq_core.verify import verify_folder

    return verify_folder(place.folder / folder, source, threads=threads, progress=report)


@contextmanager
def _source(place: Place, against: str | None) -> Iterator[Checkpoint | None]:
    """The source; of a repository the commit that the first result says it was made of, where it says so."""
    from hqq_core.checkpoint import Checkpoint
    from hqq_core.verify import read_manifest

    if against is None:
        yield None
        return
    said = read_manifest(place.folder / place.results()[0]).provenance
    commit = said.commit if said and said.repo_id == against else None
    with found(against, commit, SOURCE_FILES) as source:
        yield Checkpoint.open(source.folder)


@contextmanager
def _told(place: Place, folder: str, as_json: bool) -> Iterator[None]:
    """What is not sound is told to machines, too."""
    from hqq_core.errors import VerificationError

    try:
        yield
    except VerificationError as error:
        if as_json:
            which = {"folder": folder} if folder else {}
            print_json({"sound": False, **place.origin, **which, "name": error.name, "message": str(error)})
        raise


def _print_json(place: Place, outputs: dict[str, Verified]) -> None:
    if "" in outputs:
        print_json({"sound": True, **place.origin, **outputs[""].to_dict()})
        return
    listed = [{"folder": folder, **verified.to_dict()} for folder, verified in outputs.items()]
    print_json({"sound": True, **place.origin, "outputs": listed})


def _print(place: Place, outputs: dict[str, Verified], against: str | None) -> None:
    compared = f"and with {against}" if against else "(give --against SRC to compare with the source too)"
    if place.commit:
        typer.echo(f"{'commit':18} {place.commit} of {place.repo_id}")
    for folder, verified in outputs.items():
        if folder:
            typer.echo(f"{'folder':18} {folder}")
        typer.echo(f"{'sound':18} {verified.files} files, {verified.nbytes / 1e6:.1f} MB")
        typer.echo(f"{'quantized':18} {verified.tensors_quantized} tensors, compared with what was solved {compared}")
        typer.echo(f"{'copied':18} {verified.tensors_copied} tensors")
