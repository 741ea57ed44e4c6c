"""Folds: factors that even out the columns of a weight and cancel against what stands before it.

A group's step follows its largest weights, so a column of large weights costs the columns beside it precision. Multiplied by
sigma ** -1/2, with sigma the root mean square of a column over all weights that share its input, columns lie closer together; the
norm's gain, or the rows of the product before, are divided by the same factors, and the model computes what it did. The idea is
SINQ's (arXiv 2509.22944) in its form for the whole model, with one closed form in place of Sinkhorn iterations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from hqq_core.architectures import Role, role, text_config
from hqq_core.checkpoint import Checkpoint
from hqq_core.energy._families import ACTIVATION_NAMES, Feed, Norm, Rows, activation, feeds
from hqq_core.energy._progress import Progress, stoppable
from hqq_core.energy._threads import single_threaded
from hqq_core.energy._weights import Place, Weights, places

POWER = -0.5  # of a column's root mean square; from 0 to -1 it gave the least KL (docs/solver.md)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LEAST = 1e-3  # of the mean: a column of zeros gets no larger factor
N_ROWS = 1024  # squared at a time


@dataclass(frozen=True, slots=True)
class Fold:
    """Factors that cancel: all of them are applied, or none.

    Parameters
    ----------
    columns : dict of str to Tensor [shape=(in_features,)], float32
        What the columns of these weights are multiplied with.
    rows : dict of str to Tensor [shape=(out_features,)], float32
        What the rows of these weights are multiplied with.
    values : dict of str to Tensor
        Gains and biases as they become, in their own type.
    """

    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def only(self, names: set[str]) -> Fold:
        """Of these tensors."""
        parts = ({n: t for n, t in part.items() if n in names} for part in (self.columns, self.rows, self.values))
        return Fold(*parts)


Make = tuple[tuple[str, ...], Callable[[], Fold]]  # with what it has factors for, a weight that it reads first


def fold(
    checkpoint: Checkpoint, names: Collection[str] | None = None, *, progress: Progress | None = None
) -> tuple[Fold, ...]:
    """Every fold that the family is known to allow; from the weights alone, the same bytes for any number of threads.

    Parameters
    ----------
    checkpoint : Checkpoint
    names : collection of str, optional
        Tensors: only what concerns one of them.
    progress : callable, optional
        Gets the source bytes read so far; what it raises stops the work.
    """
    found: dict[int, Fold] = {}
    with stoppable(), ExitStack() as files, single_threaded():
        readers = [files.enter_context(checkpoint.shard(name)) for name in checkpoint.files]
        weights = Weights(readers, checkpoint.config, progress)
        makes = [*_behind_norms(weights, names), *_behind_rows(weights, names)]
        # file by file: where weights come from afar and not all can be near, each is then fetched once
        for i, (_, make) in sorted(enumerate(makes), key=lambda numbered: weights.place_of(numbered[1][0][0])):
            try:
                folded = make()
                _check_finite(folded)
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
                continue  # a config or shapes that this family does not have: nothing is folded there
            found[i] = folded
    return tuple(found[i] for i in sorted(found))


def _behind_norms(weights: Weights, wanted: Collection[str] | None) -> Iterator[Make]:
    """One fold for each norm that feeds linears of its own layer and nothing else."""
    fed: dict[str, list[str]] = defaultdict(list)
    norms: dict[str, Norm] = {}
    known: set[str] = set()
    for feed in feeds(weights.config):
        behind = not (feed.value or feed.up or feed.norm.adds or feed.norm.module[0] in "</")
        for place, names in places(feed, weights.names):
            known.update(names)
            if not behind:
                continue
            norm = place.find(feed.norm.module, weights.names)
            fed[norm] += names
            norms[norm] = feed.norm
    for norm, names in fed.items():
        concerned = (*names, f"{norm}.weight", f"{norm}.bias")
        if wanted is not None and set(concerned).isdisjoint(wanted):
            continue
        if all(_is_matrix(name, weights) for name in names) and not _strangers(names, known, weights):
            yield concerned, partial(_behind_norm, norm, norms[norm].offset, names, weights)


def _strangers(names: list[str], known: set[str], weights: Weights) -> list[str]:
    """Weights in the modules of these that the family is not known to have: they may read the same norm."""
    parents = tuple({".".join(name.split(".")[:-2]) + "." for name in names})
    inside = (name for name in weights.names if name.startswith(parents) and name not in known)
    return [name for name in inside if len(weights.names[name].entries[name].shape) > 1]


def _behind_norm(norm: str, offset: float, names: list[str], weights: Weights) -> Fold:
    gain, bias = weights.need_stored(f"{norm}.weight"), weights.stored(f"{norm}.bias")
    factors = _factors(names, weights)
    for vector in (gain,) if bias is None else (gain, bias):
        if vector.shape != factors.shape or vector.dtype not in _FLOATS:
            raise ValueError(f"{norm}: {vector.dtype} of shape {tuple(vector.shape)} for {len(factors)} columns")
    divided, factors = _divided(gain, factors, offset)
    values = {f"{norm}.weight": divided}
    if bias is not None:
        values[f"{norm}.bias"] = (bias.float() / factors).to(bias.dtype)
    return Fold(dict.fromkeys(names, factors), {}, values)


def _behind_rows(weights: Weights, wanted: Collection[str] | None) -> Iterator[Make]:
    """One fold for each weight whose inputs are, one by one, a multiple of the outputs of another."""
    relu = _is_relu(weights.config)
    for feed in feeds(weights.config):
        rows = feed.value or (feed.up if feed.gate or relu else None)
        if rows is None:
            continue
        for place, names in places(feed, weights.names):
            before = place.find(rows.module, weights.names)
            concerned = (names[0], f"{before}.weight", f"{before}.bias")
            if wanted is not None and set(concerned).isdisjoint(wanted):
                continue
            if len(names) == 1 and all(_is_matrix(name, weights) for name in (*names, f"{before}.weight")):
                yield concerned, partial(_behind, rows, place, feed, names[0], weights)


def _behind(rows: Rows, place: Place, feed: Feed, name: str, weights: Weights) -> Fold:
    before = place.find(rows.module, weights.names)
    n_out = weights.names[f"{before}.weight"].entries[f"{before}.weight"].shape[0]
    picked = torch.arange(n_out).unsqueeze(-1)
    picked = (rows.pick(picked, weights.config) if rows.pick else picked).squeeze(-1)
    factors = _shared(_factors([name], weights), len(picked), weights)
    values = {}
    if (bias := weights.stored(f"{before}.bias")) is not None:
        if bias.shape != (n_out,) or bias.dtype not in _FLOATS:
            raise ValueError(f"{before}: bias of {bias.dtype}, shape {tuple(bias.shape)}, for {n_out} rows")
        divided, factors = _divided(bias[picked], factors, 0.0)
        values[f"{before}.bias"] = bias.index_copy(0, picked, divided)
    scales = torch.ones(n_out).index_copy(0, picked, 1 / factors)
    return Fold({name: _repeated(factors, weights.in_features(name), weights)}, {f"{before}.weight": scales}, values)


def _is_relu(config: dict[str, Any]) -> bool:
    """Whether every name that a config gives an activation says so: a model reads one of them, whichever."""
    text = text_config(config)
    return {text[name] for name in ACTIVATION_NAMES if text.get(name)} | {activation(config)} == {"relu"}


def _check_finite(folded: Fold) -> None:
    for part in (folded.columns, folded.rows, folded.values):
        if not all(tensor.isfinite().all() for tensor in part.values()):
            raise ValueError("factors that are not finite")


def _is_matrix(name: str, weights: Weights) -> bool:
    if name not in weights.names:
        return False
    shape = weights.names[name].entries[name].shape
    return len(shape) == 2 and role(name, shape, weights.config) not in (Role.CONV1D, Role.HEAD)


def _factors(names: list[str], weights: Weights) -> torch.Tensor:
    """Of the columns that these weights have in common, with a geometric mean of one."""
    total, n_rows = torch.zeros(weights.in_features(names[0]), dtype=torch.float64), 0
    for name in names:
        W = weights.need_stored(name)
        total += sum(piece.float().square().sum(0, dtype=torch.float64) for piece in W.split(N_ROWS))
        n_rows += len(W)
    sigma = (total / n_rows).sqrt()
    logs = POWER * sigma.clamp_min(LEAST * float(sigma.mean())).log()
    return (logs - logs.mean()).exp().float()


def _divided(values: torch.Tensor, factors: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Values + offset over factors, less the offset, in their own type; and the factors that this division truly had."""
    whole = values.float() + offset
    divided = (whole / factors - offset).to(values.dtype)
    ratio = whole / (divided.float() + offset)
    sound = ratio.isfinite() & (ratio > 0)
    exact = torch.where(sound, ratio, torch.where(whole == 0, factors, torch.ones(())))
    return torch.where(sound, divided, values), exact


def _n_value_heads(n_rows: int, weights: Weights) -> int:
    n_heads = text_config(weights.config).get("num_key_value_heads")
    if (
        not n_heads or n_rows % n_heads
    ):  # the family's own default is not ours to guess: what is wrong here is wrong in the model
        raise ValueError(f"{n_rows} values of {n_heads} heads")
    return int(n_heads)


def _shared(factors: torch.Tensor, n_rows: int, weights: Weights) -> torch.Tensor:
    """One factor for each row before, where several columns repeat it: their geometric mean."""
    if len(factors) == n_rows:
        return factors
    heads = factors.view(_n_value_heads(n_rows, weights), len(factors) // n_rows, -1)
    return heads.log().mean(1).exp().flatten()


def _repeated(factors: torch.Tensor, n_columns: int, weights: Weights) -> torch.Tensor:
    """The inverse of `_shared`."""
    if len(factors) == n_columns:
        return factors
    heads = factors.view(_n_value_heads(len(factors), weights), 1, -1)
    return heads.expand(-1, n_columns // len(factors), -1).flatten()
