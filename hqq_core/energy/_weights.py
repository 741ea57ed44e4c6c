"""The weights that make up what a feed describes: where they are in a checkpoint, and their values one at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hqq_core.architectures import Role, role
from hqq_core.checkpoint import ShardReader
from hqq_core.energy._families import Feed, Rows
from hqq_core.energy._progress import Progress, counted


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a checkpoint a feed applies: the layer's prefix, what the stack of layers hangs on, an expert's number."""

    layer: str
    expert: str = ""

    def find(self, module: str, names: dict[str, ShardReader], first: str = "") -> str:
        """A feed's relative module as a full name; the most deeply nested holder wins."""
        module = module.replace("*", self.expert)
        if module.startswith("<"):
            stack, number = self.layer.rstrip(".").rpartition(".")[::2]
            if number == "0":
                return self.find(first, names)
            return f"{stack}.{int(number) - 1}.{module[1:]}"
        if not module.startswith("/"):
            return self.layer + module
        holders = self.layer.split(".")
        for end in range(len(holders), -1, -1):
            prefix = ".".join([*holders[:end], ""]) if end else ""
            if f"{prefix}{module[1:]}.weight" in names:
                return prefix + module[1:]
        return module[1:]


def places(feed: Feed, names: dict[str, ShardReader]) -> Iterator[tuple[Place, list[str]]]:
    """Every layer and expert that has one of the feed's targets, with the names of those it has."""
    found: dict[Place, list[str]] = defaultdict(list)
    for target in feed.targets:
        pattern = re.escape(target).replace(r"\*", r"(?P<expert>\d+)")
        layer = r"(?:.*\.)?\d+\." if "." in target else r"(?:.*\.)?"  # BERT has an output.dense within attention, too
        pattern = rf"(?P<layer>{layer}){pattern}(?:\.weight)?"
        for name in names:
            if (match := re.fullmatch(pattern, name)) and len(names[name].entries[name].shape) > 1:
                found[Place(match["layer"], match.groupdict().get("expert", ""))].append(name)
    yield from found.items()


class Weights:
    """Weights by module, as (..., out, in), in float32, one at a time."""

    def __init__(self, readers: list[ShardReader], config: dict[str, Any], progress: Progress | None) -> None:
        self.names = {name: reader for reader in readers for name in reader.entries}
        self._files = [reader.name for reader in readers]
        self.config, self._count = config, counted(progress)

    def in_features(self, name: str) -> int:
        """Columns of a weight."""
        shape = self.names[name].entries[name].shape
        return shape[0] if role(name, shape, self.config) is Role.CONV1D else shape[-1]

    def place_of(self, name: str) -> tuple[int, int]:
        """Sorts weights by where they lie: their file, and where in it they begin."""
        reader = self.names[name]
        return self._files.index(reader.name), reader.entries[name].begin

    def fits(self, vector: torch.Tensor, name: str) -> bool:
        """Whether a vector has a value per input column of a weight, or of each expert's."""
        experts = self.names[name].entries[name].shape[:-2]
        return vector.shape[-1] == self.in_features(name) and vector.shape[:-1] in ((), experts)

    def shaped(self, vector: torch.Tensor, name: str) -> torch.Tensor:
        """The vector, once for each expert where the weight holds all of them."""
        experts = self.names[name].entries[name].shape[:-2]
        return vector.expand(*experts, vector.shape[-1]).contiguous() if experts else vector

    def need(self, name: str) -> torch.Tensor:
        """A tensor that must be there."""
        return _there(name, self.read(name))

    def need_stored(self, name: str) -> torch.Tensor:
        """A tensor that must be there, as it is stored."""
        return _there(name, self.stored(name))

    def read(self, name: str) -> torch.Tensor | None:
        """A tensor as (..., out, in), or None where there is none of that name."""
        if (tensor := self.stored(name)) is None:
            return None
        tensor = tensor.float()
        return tensor.T if role(name, tuple(tensor.shape), self.config) is Role.CONV1D else tensor

    def stored(self, name: str) -> torch.Tensor | None:
        """A tensor as it is stored, or None where there is none of that name."""
        if name not in self.names:
            return None
        reader = self.names[name]
        tensor = reader.read(name)
        self._count(reader.entries[name].nbytes)
        return tensor

    def moments(
        self, rows: Rows, place: Place, gain: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of each output of `rows`, applied to gain * white noise + bias."""
        module = place.find(rows.module, self.names)
        shift = self.read(f"{module}.bias")
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for W in self._matrices(f"{module}.weight" if f"{module}.weight" in self.names else module):
            b = torch.zeros(len(W)) if shift is None else shift if shift.ndim == 1 else shift[len(found)]
            if rows.pick:
                W, b = rows.pick(W, self.config), rows.pick(b.unsqueeze(-1), self.config).squeeze(-1)
            found.append((W @ bias + b, W.square() @ gain.square()))
        if len(found) == 1:
            return found[0]
        mean, variance = (torch.stack(values) for values in zip(*found, strict=True))
        return mean, variance

    def _matrices(self, name: str) -> Iterator[torch.Tensor]:
        """A weight, or one expert's after the other where it holds all of them."""
        if name in self.names and len(shape := self.names[name].entries[name].shape) == 3:
            for expert in range(shape[0]):
                tensor = self.names[name].rows(name, [expert])[0]
                self._count(tensor.nbytes)
                yield tensor.float()
        else:
            yield self.need(name)


def _there(name: str, tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise LookupError(f"{name} is not in the checkpoint")
    return tensor
