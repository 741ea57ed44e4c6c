"""The card of one result: README.md and its chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hqq_core.card._chart import chart_png
from hqq_core.card._groups import Group, groups_of, measured
from hqq_core.card._markdown import code, fenced, plain, table
from hqq_core.card._metadata import front_matter_of, metadata
from hqq_core.card._usage import Place, usage
from hqq_core.checkpoint import CHART, FOLDING, MANIFEST, README, REPORT, SOURCE_README, Checkpoint
from hqq_core.formats import writer_for
from hqq_core.formats.base import CheckpointWriter
from hqq_core.plan import Plan
from hqq_core.provenance import Provenance
from hqq_core.results import ShardResult
from hqq_core.source_card import front_matter


def card_of(
    checkpoint: Checkpoint,
    plan: Plan,
    results: Sequence[ShardResult],
    metrics: dict[str, Any],
    provenance: Provenance,
    *,
    repo_id: str | None = None,
) -> dict[str, bytes]:
    """The model card of one result, by file name: `README.md` and, where something was lost, its chart.

    The same for the same source and settings: no times, no job.

    Parameters
    ----------
    checkpoint : Checkpoint
        The source, whose config.json and front matter are taken for text that strangers wrote.
    plan : Plan
    results : sequence of ShardResult
    metrics : dict
        `report.metrics_of` these.
    provenance : Provenance
    repo_id : str, optional
        The repository on the Hub that the result is meant for, at its root or in the plan's folder. Default: none, and snippets
        are for one who stands in the folder.

    Raises
    ------
    SpecError
        A repo_id that is none.
    """
    config, writer = checkpoint.config, writer_for(plan.recipe, checkpoint)
    place = Place(repo_id, plan.folder if repo_id else "")
    tensors = measured(plan, results, config)
    chart = None if writer.capabilities.lossless else chart_png(tensors)
    fields = metadata(plan, writer, config, front_matter(checkpoint), provenance)
    parts = [
        front_matter_of(fields).rstrip(),
        f"# {plain(provenance.name)} {writer.capabilities.label(plan.recipe)}, {plan.recipe.format}",
        _summary(plan, writer, metrics, provenance),
        f"## Load it\n\n{_where(place)}",
        usage(plan, writer, config, place),
        f"## Size and error\n\n{_sizes(groups_of(tensors))}",
        *([f"![Relative error of each group, layer by layer]({CHART})"] if chart else []),
        f"## Settings\n\n{_settings(plan, writer)}",
        f"## Where it comes from\n\n{_origin(plan, provenance, place)}",
    ]
    card = {README: ("\n\n".join(parts) + "\n").encode(errors="replace")}
    return card | ({CHART: chart} if chart else {})


def _summary(plan: Plan, writer: CheckpointWriter, metrics: dict[str, Any], provenance: Provenance) -> str:
    source = code(provenance.repo_id or provenance.folder or "a local folder")
    size = f"{megabytes(metrics['nbytes_in'])} became {megabytes(metrics['nbytes_out'])}"
    if writer.capabilities.lossless:
        return f"{source}, whose ternary weights Halfquad packed without loss: {size}."
    experimental = " Experimental: no runtime has loaded this format here." if writer.capabilities.experimental else ""
    return (
        f"{source}, quantized by Halfquad with half-quadratic quantization (HQQ), without calibration data: {size}, "
        f"{metrics['bits_per_weight']:.2f} bits per quantized weight, relative error {_figure(metrics['relative_error'])}."
        f"{experimental}"
    )


def _where(place: Place) -> str:
    if place.download:
        return "No runtime loads a folder of a repository, so it is downloaded first:"
    if place.repo_id:
        return f"From the Hub, as {code(place.repo_id)}; a path to a downloaded folder does as well."
    return "In this folder; from elsewhere its path, or on the Hub its repository, takes the place of `.`."


def _sizes(groups: Sequence[Group]) -> str:
    head = ("layers", "tensors", "source", "result", "bits per weight", "relative error")
    sizes = [sum(group.nbytes[i] for group in groups) for i in (0, 1)]
    total = ("**all**", str(sum(len(group.tensors) for group in groups)), *map(megabytes, sizes), "", "")
    meant = "Relative error: ‖W − dequantized‖ / ‖W‖ over all weights of a row; bits with scales and zeros."
    return f"{table(head, [*map(_row, groups), total])}\n\n{meant}"


def _row(group: Group) -> tuple[str, ...]:
    error = _figure(group.relative_error) if group.quantized else "copied"
    sizes = map(megabytes, group.nbytes)
    return group.name, str(len(group.tensors)), *sizes, f"{group.bits_per_weight:.2f}", error


def _settings(plan: Plan, writer: CheckpointWriter) -> str:
    settings = plan.recipe.to_dict() | {"zero": plan.spec.zero}
    if named := writer.capabilities.type_of(plan.recipe):
        follow = writer.capabilities.typed_settings
        settings = {name: value for name, value in settings.items() if name not in follow} | {"type": named}
    told = {name: value for name, value in settings.items() if value not in (None, []) or name == "group_size"}
    return table(("setting", "value"), [(name, _value(value)) for name, value in told.items()])


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(code, value))
    return "a whole channel" if value is None else code(str(value).lower() if isinstance(value, bool) else value)


def _origin(plan: Plan, provenance: Provenance, place: Place) -> str:
    return "\n".join(f"- {line}" for line in _origins(plan, provenance)) + (
        "\n\nRead again, by code that shares nothing with what wrote it:\n\n"
        + fenced("sh", f"halfquad verify {place.repo_id or '.'}")
    )


def _origins(plan: Plan, provenance: Provenance) -> Iterator[str]:
    if provenance.repo_id:
        at = f" at commit {code(provenance.commit)}" if provenance.commit else ""
        yield f"Source: {code(provenance.repo_id)}{at}."
    elif provenance.folder:
        yield f"Source: a local folder, {code(provenance.folder)}."
    software = ", ".join(f"{package} {version}" for package, version in provenance.versions.items())
    yield f"Made with {code(software)}."
    if README in plan.carried:
        yield f"[{SOURCE_README}]({SOURCE_README}) is the source's own card; its purpose, limits and terms hold here too."
    yield "The source's licence holds for these weights; licence files that came with it lie beside them."
    yield f"`{REPORT}` says of every tensor what became of it and why; `{MANIFEST}` has the SHA-256 of every file."
    if any(tensor.folded for tensor in plan.tensors):
        yield f"Columns of some weights were evened out (`{FOLDING}` has the factors): adapters made for the source do not fit."


def megabytes(nbytes: int) -> str:
    """In words, three digits or so."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.{1 if nbytes >= 1e6 else 3}f} MB"


def _figure(error: float | None) -> str:
    return "–" if error is None else f"{error:.4f}"
