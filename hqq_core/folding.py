"""The factors of a result's folds, kept beside it: whoever compares its weights with the source's needs them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch

from hqq_core.checkpoint import FOLDING
from hqq_core.energy import Energies
from hqq_core.plan import Plan
from hqq_core.results import ArtifactFile
from hqq_core.safetensors_file import build_header, write_file
from hqq_core.weighting import Weighting


def write_folding(plan: Plan, energies: Energies | None, output: Path) -> list[ArtifactFile]:
    """Write what weights were multiplied with, where any was; no files if none was.

    The file is in safetensors' format: float32 vectors, each once; the metadata's `places` says, as JSON, which of them is that
    of "columns NAME" or "rows NAME".
    """
    places: dict[str, str] = {}
    vectors: dict[str, torch.Tensor] = {}
    homes: dict[bytes, str] = {}
    for shard in plan.shards:
        weighting = Weighting.of(shard, energies)
        for part, factors in (("columns", weighting.columns), ("rows", weighting.rows)):
            for name, vector in sorted(factors.items()):
                place = f"{part} {name}"
                places[place] = homes.setdefault(vector.numpy().tobytes(), place)
                if places[place] == place:
                    vectors[place] = vector
    if not places:
        return []
    layout = [(place, "F32", tuple(vector.shape)) for place, vector in vectors.items()]
    header, written = build_header(layout, {"places": json.dumps(places)})
    pieces = (vectors[place].numpy().tobytes() for place in written)
    return [ArtifactFile(FOLDING, *write_file(output / FOLDING, itertools.chain([header], pieces)))]
