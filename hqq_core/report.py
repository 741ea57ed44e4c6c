"""The quality report: what became of every tensor, why, and how well. The same for the same input, so no times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hqq_core.checkpoint import Checkpoint
from hqq_core.metrics import bits_per_weight, relative_error, sqnr_db
from hqq_core.plan import Plan, TensorPlan
from hqq_core.results import ArtifactFile, ShardResult, TensorResult

N_WORST = 5


def metrics_of(plan: Plan, results: Sequence[ShardResult], written: Sequence[ArtifactFile]) -> dict[str, Any]:
    """Figures of the whole; the same for the same input, so no times."""
    tensors = [tensor for result in results for tensor in result.tensors]
    quantized = [tensor for tensor in plan.tensors if tensor.spec]
    error, norm = (sum(getattr(tensor, key) for tensor in tensors) for key in ("squared_error", "squared_norm"))
    errors = [_errors(tensor) for tensor in tensors]
    worst = sorted(errors, key=lambda tensor: tensor["relative_error"] or 0.0, reverse=True)[:N_WORST]
    return {
        "nbytes_in": plan.nbytes_in,
        "nbytes_out": sum(file.nbytes for file in written),
        "tensors_quantized": len(tensors),
        "tensors_copied": sum(1 for tensor in plan.tensors if tensor.spec is None),
        "weights_quantized": sum(tensor.numel for tensor in tensors),
        "bits_per_weight": bits_per_weight(
            sum(tensor.nbytes_out for tensor in quantized), sum(tensor.numel for tensor in tensors)
        ),
        "relative_error": relative_error(error, norm),
        "energy_sources": dict(sorted(Counter(tensor.energy for tensor in quantized if tensor.energy).items())),
        "energy_note": plan.energy_note,
        "worst_tensors": worst,
    }


def _errors(tensor: TensorResult) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "relative_error": relative_error(tensor.squared_error, tensor.squared_norm),
        "sqnr_db": sqnr_db(tensor.squared_error, tensor.squared_norm),
    }


def _found(tensor: TensorResult) -> dict[str, Any]:
    """What a report has of a quantized tensor: also what `halfquad verify` goes by."""
    errors = _errors(tensor) | {"squared_error": tensor.squared_error, "squared_norm": tensor.squared_norm}
    return {key: value for key, value in errors.items() if key != "name"} | {"digest": tensor.digest}


def report_of(
    checkpoint: Checkpoint,
    plan: Plan,
    results: Sequence[ShardResult],
    metrics: dict[str, Any],
    places: Mapping[str, tuple[str, str | None]],
) -> dict[str, Any]:
    """What became of every tensor, why, and how well; `places` has the file of each, and its block type in a format of such."""
    return {
        "recipe": plan.recipe.to_dict(),
        "metrics": metrics,
        "files_left_out": list(plan.left_out),
        "auto_map_removed": "auto_map" in checkpoint.config,
        "tensors": entries_of(plan.tensors, results, places),
    }


def entries_of(
    tensors: Iterable[TensorPlan], results: Sequence[ShardResult], places: Mapping[str, tuple[str, str | None]]
) -> list[dict[str, Any]]:
    """What a report has of some tensors."""
    found = {tensor.name: _found(tensor) for result in results for tensor in result.tensors}
    found |= {tensor.name: {"digest": tensor.digest} for result in results for tensor in result.copied}
    return [
        {
            "name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype,
            "file": places[tensor.name][0], "type": places[tensor.name][1],
            "reason": tensor.reason, "nbytes_in": tensor.nbytes_in, "nbytes_out": tensor.nbytes_out,
            "solver": tensor.solver, "preset": tensor.preset, "zero": tensor.spec.zero if tensor.spec else None,
            "energy": tensor.energy, "folded": list(tensor.folded), "correlated": tensor.correlated,
            "spec": tensor.spec.to_dict() if tensor.spec else None,
            **found[tensor.name],
        }
        for tensor in tensors
    ]  # fmt: skip
