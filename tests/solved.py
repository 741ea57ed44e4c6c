"""What a conversion solves, tensor by tensor, without writing it: what readers of the result are held against."""

from collections.abc import Iterator
from pathlib import Path

import torch

from hqq_core import Checkpoint, QuantizedTensor, Recipe, build_plan
from hqq_core.energy import Energies, profile
from hqq_core.formats import writer_of
from hqq_core.weighting import Weighting


def solved(folder: Path, recipe: Recipe, energies: Energies | None = None) -> Iterator[tuple[str, QuantizedTensor]]:
    """Modules and their solved weights."""
    checkpoint = Checkpoint.open(folder)
    plan = build_plan(checkpoint, recipe)
    if energies is None or not plan.recipe.weighted:
        energies = profile(checkpoint, plan.recipe.energy if plan.recipe.weighted else "none")
    for shard in plan.with_energies(energies).shards:
        weighting = Weighting.of(shard, energies)
        with checkpoint.shard(shard.file) as reader:
            for tensor in shard.tensors:
                if tensor.spec:
                    energy, columns, rows = weighting.of_tensor(tensor.name)
                    W = reader.read(tensor.name)
                    C = weighting.correlation(tensor.name)
                    yield (
                        tensor.module,
                        writer_of(recipe).solve(
                            W, tensor.spec, energy=energy, columns=columns, rows=rows, correlation=C
                        ),
                    )


def dequantized(
    folder: Path, recipe: Recipe, energies: Energies | None = None, arithmetic: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The same as weights, in the source's own type unless the reader's `arithmetic` is another."""
    return {module: tensor.dequantize(arithmetic) for module, tensor in solved(folder, recipe, energies)}


def stored_as(folder: Path, recipe: Recipe, energies: Energies | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a model as a conversion makes it, by its source name, in float32: solved, folded or left as it was."""
    checkpoint = Checkpoint.open(folder)
    energies = energies or profile(checkpoint, recipe.energy if recipe.weighted else "none")
    tensors = {}
    for shard in build_plan(checkpoint, recipe).with_energies(energies).shards:
        weighting = Weighting.of(shard, energies)
        with checkpoint.shard(shard.file) as reader:
            tensors |= {t.name: reader.read(t.name).float() for t in shard.tensors if t.spec is None}
        tensors |= {name: value.float() for name, value in weighting.values.items()}
    weights = dequantized(folder, recipe, energies, torch.float32)
    return tensors | {f"{module}.weight": weight for module, weight in weights.items()}
