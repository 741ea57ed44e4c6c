"""The factors of a result's folds, kept beside it: whoever compares its weights with the source's needs them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch

from hqq_core.checkpoint import FOLDING
from hqq_core.energy import Energies
from hqq_core.errors import VerificationError
from hqq_core.plan import Plan
from hqq_core.results import ArtifactFile
from hqq_core.safetensors_file import artifact_of, build_header, write_file
from hqq_core.weighting import Weighting


def write_folding(plan: Plan, energies: Energies, output: Path) -> None:
    """Write what the weights of a plan are multiplied with, where any are, into its folder in `output`.

    The file is in safetensors' format: float32 vectors, each once; the metadata's `places` says, as JSON, which of them is that
    of "columns NAME" or "rows NAME".
    """
    places: dict[str, str] = {}
    vectors: dict[str, torch.Tensor] = {}
    homes: dict[bytes, str] = {}
    for shard in plan.shards:
        weighting = Weighting.of(shard, energies if plan.recipe.weighted else None)
        for part, factors in (("columns", weighting.columns), ("rows", weighting.rows)):
            for name, vector in sorted(factors.items()):
                place = f"{part} {name}"
                places[place] = homes.setdefault(vector.numpy().tobytes(), place)
                if places[place] == place:
                    vectors[place] = vector
    if not places:
        return
    layout = [(place, "F32", tuple(vector.shape)) for place, vector in vectors.items()]
    header, written = build_header(layout, {"places": json.dumps(places)})
    pieces = (vectors[place].numpy().tobytes() for place in written)
    (output / plan.folder).mkdir(exist_ok=True)
    write_file(output / plan.folder / FOLDING, itertools.chain([header], pieces))


def folding_files(plan: Plan, folder: Path) -> list[ArtifactFile]:
    """What `write_folding` left in the folder of a plan; a VerificationError where it should have and did not."""
    if not any({"columns", "rows"} & set(tensor.folded) for tensor in plan.tensors):
        return []
    path = folder / FOLDING
    if not path.is_file():
        raise VerificationError(FOLDING, "written before, but gone")
    return [artifact_of(path)]
