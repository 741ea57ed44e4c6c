"""Energies from the weights alone: what a norm gives is taken for white noise times gain, plus bias."""

from __future__ import annotations

import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hqq_core.architectures import Role, role, text_config
from hqq_core.checkpoint import Checkpoint, ShardReader
from hqq_core.energy._energies import Energies
from hqq_core.energy._families import Feed, Rows, activation, feeds
from hqq_core.energy._progress import Progress, counted, stoppable
from hqq_core.energy._threads import single_threaded
from hqq_core.errors import short


def analytic(checkpoint: Checkpoint, *, known: Collection[str] = (), progress: Progress | None = None) -> Energies:
    """Energies from the weights alone.

    Parameters
    ----------
    checkpoint : Checkpoint
    known : collection of str
        Names of tensors that need none.
    progress : callable, optional
        Gets the source bytes read so far; what it raises stops the work.

    Returns
    -------
    Energies
        Empty, with a note, where the family is not known; the same bytes for any number of threads.
    """
    family = checkpoint.config.get("model_type")
    rules = feeds(checkpoint.config)
    if not rules:
        return Energies({}, {}, f"no analytic energies: model_type {reprlib.repr(family)} is not known")
    vectors: dict[str, torch.Tensor] = {}
    note = ""
    with stoppable(), ExitStack() as files, single_threaded():
        readers = [files.enter_context(checkpoint.shard(name)) for name in checkpoint.files]
        weights = _Weights(readers, checkpoint.config, progress)
        for feed in rules:
            for place, targets in _places(feed, weights.names):
                names = [name for name in targets if name not in known]
                if not names:
                    continue
                try:
                    vector = _fed(feed, place, weights)
                except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    # a config or shapes that this family does not have: the tensors do without
                    note = note or f"no analytic energies for {names[0]}: {short(error)}"
                    continue
                fitting = [name for name in names if weights.fits(vector, name)] if vector.isfinite().all() else []
                vectors |= {name: weights.shaped(vector, name) for name in fitting}
    return Energies(vectors, dict.fromkeys(vectors, "analytic"), note)


@dataclass(frozen=True, slots=True)
class _Place:
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


def _places(feed: Feed, names: dict[str, ShardReader]) -> Iterator[tuple[_Place, list[str]]]:
    """Every layer and expert that has one of the feed's targets, with the names of those it has."""
    found: dict[_Place, list[str]] = defaultdict(list)
    for target in feed.targets:
        pattern = re.escape(target).replace(r"\*", r"(?P<expert>\d+)")
        layer = r"(?:.*\.)?\d+\." if "." in target else r"(?:.*\.)?"  # BERT has an output.dense within attention, too
        pattern = rf"(?P<layer>{layer}){pattern}(?:\.weight)?"
        for name in names:
            if (match := re.fullmatch(pattern, name)) and len(names[name].entries[name].shape) > 1:
                found[_Place(match["layer"], match.groupdict().get("expert", ""))].append(name)
    yield from found.items()


class _Weights:
    """Weights by module, as (..., out, in), in float32, one at a time."""

    def __init__(self, readers: list[ShardReader], config: dict[str, Any], progress: Progress | None) -> None:
        self.names = {name: reader for reader in readers for name in reader.entries}
        self.config, self._count = config, counted(progress)

    def in_features(self, name: str) -> int:
        """Columns of a weight."""
        shape = self.names[name].entries[name].shape
        return shape[0] if role(name, shape, self.config) is Role.CONV1D else shape[-1]

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
        tensor = self.read(name)
        if tensor is None:
            raise LookupError(f"{name} is not in the checkpoint")
        return tensor

    def read(self, name: str) -> torch.Tensor | None:
        """A tensor, or None where there is none of that name."""
        if name not in self.names:
            return None
        reader = self.names[name]
        tensor = reader.read(name).float()
        self._count(reader.entries[name].nbytes)
        return tensor.T if role(name, tuple(tensor.shape), self.config) is Role.CONV1D else tensor

    def moments(
        self, rows: Rows, place: _Place, gain: torch.Tensor, bias: torch.Tensor
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


def _fed(feed: Feed, place: _Place, weights: _Weights) -> torch.Tensor:
    """Mean square of each input of a feed's targets."""
    norm = place.find(feed.norm.module, weights.names, feed.norm.first)
    gain = weights.need(f"{norm}.weight") + feed.norm.offset
    bias = weights.read(f"{norm}.bias")
    bias = torch.zeros_like(gain) if bias is None else bias
    if feed.value:
        mean, variance = weights.moments(feed.value, place, gain, bias)
        return _repeat_heads(mean.square() + variance, feed, place, weights)
    if not feed.up:
        return gain.square() + bias.square()
    up = weights.moments(feed.up, place, gain, bias)
    gate = weights.moments(feed.gate, place, gain, bias) if feed.gate else up
    passed = _mean_square(_ACTIVATIONS[activation(weights.config)], *gate)
    return passed * (up[0].square() + up[1]) if feed.gate else passed


def _repeat_heads(h: torch.Tensor, feed: Feed, place: _Place, weights: _Weights) -> torch.Tensor:
    """Values are shared by groups of query heads: repeat each head's to the width of the output projection."""
    name = f"{place.find(feed.targets[0], weights.names)}.weight"
    times, rest = divmod(weights.in_features(name), len(h))
    n_value = text_config(weights.config).get("num_key_value_heads") or 1
    if rest or (times > 1 and len(h) % n_value):
        raise ValueError(f"{len(h)} values of {n_value} heads feed {weights.in_features(name)} inputs")
    return h.view(n_value, -1).repeat_interleave(times, 0).flatten() if times > 1 else h


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
_N_NODES = 64


def _mean_square(
    act: Callable[[torch.Tensor], torch.Tensor], mean: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    """E[act(n)^2] for normal n, by Gauss-Hermite quadrature."""
    nodes, weights = (torch.from_numpy(values).float() for values in np.polynomial.hermite_e.hermegauss(_N_NODES))
    n = mean[..., None] + variance.sqrt()[..., None] * nodes
    return act(n).square() @ (weights / weights.sum())
