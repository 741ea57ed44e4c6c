"""Energies from the weights alone: what a norm gives is noise times gain, plus bias, as loud as the stream is known to be."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection
from contextlib import ExitStack

import numpy as np
import torch

from hqq_core.architectures import text_config
from hqq_core.checkpoint import Checkpoint
from hqq_core.energy._energies import Energies
from hqq_core.energy._families import Feed, activation, feeds
from hqq_core.energy._progress import Progress, stoppable
from hqq_core.energy._stream import Stream
from hqq_core.energy._threads import single_threaded
from hqq_core.energy._weights import Place, Weights, places
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
        weights = Weights(readers, checkpoint.config, progress)
        stream = Stream(weights)
        for feed, place, targets in _in_order(rules, weights):
            names = [name for name in targets if name not in known]
            if not names and not stream.known:
                continue
            try:
                vector = _fed(feed, place, weights, stream)
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                # a config or shapes that this family does not have: the tensors do without
                note = note or f"no analytic energies for {targets[0]}: {short(error)}"
                stream.lose()
                continue
            if not vector.isfinite().all():
                note = note or f"no analytic energies for {targets[0]}: they are not finite"
                stream.lose()
                continue
            fitting = [name for name in names if weights.fits(vector, name)]
            vectors |= {name: weights.shaped(vector, name) for name in fitting}
            if stream.known and (feed.value or feed.up):
                stream.join(targets[0], vector)
    return Energies(vectors, dict.fromkeys(vectors, "analytic"), note)


def _in_order(rules: tuple[Feed, ...], weights: Weights) -> list[tuple[Feed, Place, list[str]]]:
    """What feeds what, from the first layer to the last and within a layer by rule; what lies outside the layers last."""

    def number(place: Place) -> float:
        last = place.layer.rstrip(".").rpartition(".")[2]
        return int(last) if last.isdecimal() else math.inf

    found = [(feed, place, names) for feed in rules for place, names in places(feed, weights.names)]
    return sorted(found, key=lambda item: number(item[1]))


def _fed(feed: Feed, place: Place, weights: Weights, stream: Stream) -> torch.Tensor:
    """Mean square of each input of a feed's targets."""
    norm = place.find(feed.norm.module, weights.names, feed.norm.first)
    gain = weights.need(f"{norm}.weight") + feed.norm.offset
    gain = gain * stream.normed(len(gain)).sqrt()
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


def _repeat_heads(h: torch.Tensor, feed: Feed, place: Place, weights: Weights) -> torch.Tensor:
    """Values are shared by groups of query heads: repeat each head's to the width of the output projection."""
    name = f"{place.find(feed.targets[0], weights.names)}.weight"
    times, rest = divmod(weights.in_features(name), len(h))
    n_value = text_config(weights.config).get("num_key_value_heads") or 0
    if rest or (times > 1 and (not n_value or len(h) % n_value)):
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
