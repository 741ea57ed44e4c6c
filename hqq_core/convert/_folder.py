"""One output's folder: the files that make it a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hqq_core.architectures import Role, with_older_names
from hqq_core.card import card_of
from hqq_core.checkpoint import CONFIG, MANIFEST, README, REPORT, SOURCE_README, Checkpoint
from hqq_core.convert._progress import Counter, Progress
from hqq_core.errors import VerificationError
from hqq_core.folding import folding_files
from hqq_core.formats import writer_for
from hqq_core.formats.base import CheckpointWriter
from hqq_core.formats.container import Layout, Part
from hqq_core.plan import Plan, TensorPlan, stored_tensors
from hqq_core.provenance import Provenance
from hqq_core.report import entries_of, metrics_of, report_of
from hqq_core.results import ArtifactFile, Manifest, ShardResult
from hqq_core.safetensors_file import TEMPORARY_PREFIX, json_bytes, sha256_file, write_file, write_json

WITH_POINTERS_TO_CODE = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)


def finished(plan: Plan, output: Path, *, progress: Progress | None = None) -> Manifest | None:
    """The manifest that an earlier run left, with its files read back; None where there is none, and all is still to do.

    Raises
    ------
    VerificationError
        Names a file that is not as it was when written.
    """
    folder, done = output / plan.folder, Counter(progress)
    if not (folder / MANIFEST).is_file():
        return None
    manifest = Manifest.from_dict(json.loads((folder / MANIFEST).read_bytes()))
    for file in manifest.files:
        _check_there(file, folder)
        _check_hash(file, folder, done)
    _remove_parts(plan, manifest, folder)
    return manifest


def _check_there(file: ArtifactFile, folder: Path) -> None:
    if not (folder / file.name).is_file():
        raise VerificationError(file.name, "written before, but gone")


def _check_hash(file: ArtifactFile, folder: Path, done: Counter) -> None:
    digest = sha256_file(folder / file.name, done.add)
    if digest != file.sha256:
        raise VerificationError(file.name, f"sha256 {digest}: wanted {file.sha256}, as when it was written")


def finish_checkpoint(
    checkpoint: Checkpoint,
    plan: Plan,
    results: Sequence[ShardResult],
    output: Path,
    *,
    check: Callable[[Path, Manifest], None] | None = None,
    provenance: Provenance | None = None,
    repo_id: str | None = None,
) -> Manifest:
    """Write what joins the shards, config, carried files, report and model card beside them, and the manifest last.

    Parameters
    ----------
    checkpoint : Checkpoint
    plan : Plan
    results : sequence of ShardResult
        This plan's, one for each of `plan.shards`, in any order.
    output : Path
        The job's folder, which the plan's lies in. Where weights were folded, `write_folding` wrote there.
    check : callable, optional
        Gets the plan's folder when all else is there, and the manifest to be; where it raises, none is written.
    provenance : Provenance, optional
        Where the source is from, for manifest and card; default: a local folder of the checkpoint's name.
    repo_id : str, optional
        The repository on the Hub that the result is meant for, which the card then loads it from.

    Returns
    -------
    Manifest

    Raises
    ------
    VerificationError
        A file is gone that was written before.
    """
    results = sorted(results, key=lambda result: result.index)
    assert [result.index for result in results] == [shard.index for shard in plan.shards], "a shard is missing"
    folder, writer = output / plan.folder, writer_for(plan.recipe, checkpoint)
    for path in folder.rglob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)
    layouts: dict[str, Layout] = {file.name: [] for result in results for file in result.files}
    for tensor in plan.tensors:
        layouts[tensor.file] += stored_tensors(tensor, writer)
    for file in (file for result in results for file in result.files):
        _check_there(file, folder)
    parts = [Part(file, layouts[file.name]) for result in results for file in result.files]
    weights, beside = writer.container.finish(checkpoint, parts, folder)
    metrics = metrics_of(plan, results, weights)
    carried = (_carry(checkpoint, name, folder) for name in plan.carried)
    files = [*weights, *beside, *carried, *folding_files(plan, folder)]
    report = report_of(checkpoint, plan, results, metrics, _places(plan, weights, writer))
    ours = {CONFIG: _config(checkpoint, plan, writer), REPORT: report}
    files += [ArtifactFile(name, *write_json(folder / name, value)) for name, value in ours.items()]
    origin = dataclasses.replace(provenance or Provenance(folder=_name(checkpoint)), recipe=plan.recipe.to_dict())
    card = card_of(checkpoint, plan, results, metrics, origin, repo_id=repo_id)
    files += [ArtifactFile(name, *write_file(folder / name, [raw])) for name, raw in card.items()]
    manifest = Manifest(tuple(sorted(files, key=lambda file: file.name)), metrics, provenance=origin)
    if check:
        check(folder, manifest)
    write_json(folder / MANIFEST, manifest.to_dict())
    _remove_parts(plan, manifest, folder)
    return manifest


def describe_part(
    checkpoint: Checkpoint, plan: Plan, result: ShardResult
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What config.json will be, and what the report will have of a shard's tensors: as `verify_part` wants them."""
    writer = writer_for(plan.recipe, checkpoint)
    tensors = plan.shards[result.index].tensors
    places = {tensor.name: (tensor.file, None) for tensor in tensors}
    return _config(checkpoint, plan, writer), entries_of(tensors, [result], places)


def _places(plan: Plan, weights: Sequence[ArtifactFile], writer: CheckpointWriter) -> dict[str, tuple[str, str | None]]:
    """The file that each tensor lies in, which parts may have been joined to, and the type of its blocks, if it has such."""
    names = {file.name for file in weights}
    places: dict[str, tuple[str, str | None]] = {}
    for tensor in plan.tensors:
        stored = stored_tensors(tensor, writer) if writer.container.block_types else []
        places[tensor.name] = (
            tensor.file if tensor.file in names else weights[0].name,
            stored[0][1] if stored else None,
        )
    return places


def _remove_parts(plan: Plan, manifest: Manifest, folder: Path) -> None:
    """Shards' files that have become part of another; only now, for until the manifest was there all could begin anew."""
    for name in {tensor.file for tensor in plan.tensors} - {file.name for file in manifest.files}:
        (folder / name).unlink(missing_ok=True)


def _carry(checkpoint: Checkpoint, name: str, output: Path) -> ArtifactFile:
    """Copy one file, without pointers to code in the repository where such files have them; the card makes room for ours."""
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    pieces = checkpoint.file_pieces(name)
    if name in WITH_POINTERS_TO_CODE:
        pieces = iter([_without_auto_map(b"".join(pieces))])
    name = SOURCE_README if name == README else name
    return ArtifactFile(name, *write_file(output / name, pieces))


def _name(checkpoint: Checkpoint) -> str:
    """Of the folder, not its path, which is nobody's business."""
    return checkpoint.folder.resolve().name


def _without_auto_map(raw: bytes) -> bytes:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return raw  # not ours to mend
    if not isinstance(fields, dict) or "auto_map" not in fields:
        return raw
    return json_bytes({key: value for key, value in fields.items() if key != "auto_map"})


def _config(checkpoint: Checkpoint, plan: Plan, writer: CheckpointWriter) -> dict[str, Any]:
    """The source's config.json with what its format's readers look for, old and new, and without pointers to code."""
    quantized = [tensor.module for tensor in plan.tensors if tensor.spec]
    copied = [tensor.module for tensor in plan.tensors if tensor.spec is None and _may_be_linear(tensor)]
    kept = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    return with_older_names(kept) | writer.config(plan.spec, quantized, copied)


def _may_be_linear(tensor: TensorPlan) -> bool:
    """Whether a reader would take the copied tensor for the weight of a linear layer."""
    no_linear = (Role.EMBEDDING.value, Role.NORM.value, Role.CONV1D.value)
    return len(tensor.shape) == 2 and tensor.name.endswith(".weight") and tensor.reason not in no_linear
