"""Weighting: what a profile has for the tensors of one shard."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from hqq_core.energy import PARTS, Correlations, Energies
from hqq_core.errors import EnergyError
from hqq_core.plan import ShardPlan


@dataclass(frozen=True, slots=True)
class Weighting:
    """Vectors by tensor name.

    Parameters
    ----------
    energy : dict of str to Tensor
        Input energies of the columns as they are solved: over the square of their factors, where they are folded.
    columns, rows, values : dict of str to Tensor
        As in `energy.Fold`.
    correlations : Correlations or None
        Of the tensors that are to use them, to be read one by one.
    """

    energy: dict[str, torch.Tensor]
    columns: dict[str, torch.Tensor]
    rows: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    correlations: Correlations | None

    @classmethod
    def of(cls, shard: ShardPlan, energies: Energies | None) -> Weighting:
        """Of all that the plan speaks of, which must be there; an EnergyError names what is not."""
        energies = energies or Energies({}, {})
        for tensor in shard.tensors:
            if tensor.spec and (found := energies.source(tensor.name)) != (tensor.energy or "none"):
                raise EnergyError(f"{tensor.name}: planned with {tensor.energy} input energy: got {found}")
            if tensor.correlated and not (energies.correlations and tensor.name in energies.correlations.places):
                raise EnergyError(f"{tensor.name}: planned with correlations: there are none")
        columns, rows, values = (_folded(shard, energies, part) for part in PARTS)
        energy = {t.name: energies.vectors[t.name] for t in shard.tensors if t.energy not in (None, "none")}
        energy |= {name: energy[name] / columns[name].square() for name in energy.keys() & columns.keys()}
        wanted = {tensor.name for tensor in shard.tensors if tensor.correlated}
        correlations = energies.correlations.only(wanted) if energies.correlations else None
        return cls(energy, columns, rows, values, correlations)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all vectors and the names that they have."""
        digest = hashlib.sha256()
        for part in (self.energy, self.columns, self.rows, self.values):
            for name, vector in sorted(part.items()):
                digest.update(f"{name} {vector.dtype} {tuple(vector.shape)} ".encode())
                digest.update(vector.contiguous().flatten().view(torch.uint8).numpy().data)
            digest.update(b"\n")
        return digest.hexdigest()

    def of_tensor(self, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Energy, column and row factors that `solver.quantize` takes for one tensor."""
        return self.energy.get(name), self.columns.get(name), self.rows.get(name)

    def correlation(self, name: str) -> torch.Tensor | None:
        """Correlations of a tensor's inputs, read from their file."""
        if self.correlations is None or name not in self.correlations.places:
            return None
        return self.correlations.read(name)


def _folded(shard: ShardPlan, energies: Energies, part: str) -> dict[str, torch.Tensor]:
    there: dict[str, torch.Tensor] = {}
    for fold in energies.folds:
        there |= getattr(fold, part)
    planned = [tensor.name for tensor in shard.tensors if part in tensor.folded]
    for name in planned:
        if name not in there:
            raise EnergyError(f"{name}: planned with its {part} folded: there are no factors")
    return {name: there[name] for name in planned}
