"""What the linear weights of a model in memory are multiplied with: mean squares, or second moments, over some tokens."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.benchmarks.subjects import EXPERT, Subject

_PRODUCTS = {torch.nn.functional.linear: (0, 1), torch.addmm: (1, 2)}  # positions of input and weight; addmm: Conv1D
Moments = dict[str, torch.Tensor]


class Gather(TorchFunctionMode):
    """Shows `see` the input rows of every product with one of the named weights."""

    def __init__(self, subject: Subject, names: Iterable[str], see: Callable[[list[str], torch.Tensor], None]) -> None:
        super().__init__()
        self._see = see
        self._at: dict[int, list[str]] = defaultdict(list)
        for name in names:
            W = subject.view(name)
            fused = EXPERT.fullmatch(name)
            before = W.nbytes if fused and fused["part"] == "up" else 0  # a product has the gate's rows above these
            self._at[W.data_ptr() - before].append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            x, weight = (args[i] for i in _PRODUCTS[func])
            names = self._at.get(weight.data_ptr())
            if names and x.numel():
                self._see(names, x.reshape(-1, x.shape[-1]))
        return func(*args, **(kwargs or {}))


def random_ids(
    subject: Subject, n_tokens: int = 2048, seed: int = 0, offset: float = 50, exponent: float = 1
) -> torch.Tensor:
    """Windows of token ids drawn with p(id) ~ 1 / (id + offset) ** exponent."""
    frequency = (torch.arange(subject.model.config.vocab_size, dtype=torch.float64) + offset) ** -exponent
    length = min(512, subject.model.config.max_position_embeddings - 2, n_tokens)  # as hqq_core.energy has it
    total, generator = -(-n_tokens // length) * length, torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(frequency, total, replacement=True, generator=generator)
    return drawn.view(-1, length)


WRITERS = (
    "o_proj.weight",
    "down_proj.weight",
    "c_proj.weight",
    "output.dense.weight",
)  # outputs join the residual stream


@torch.no_grad()
def energies(subject: Subject, ids: torch.Tensor, weigh: str = "alike") -> Moments:
    """Mean squares of the inputs of all weights [shape=(in,)].

    Parameters
    ----------
    weigh : {"alike", "unit", "residual"}
        How much each token counts: all alike; each scaled to the same square; or, for weights whose output joins the residual
        stream, by one over the mean square of the stream there, as the next norm will divide by it.
    """
    sums: Moments = {}
    n: dict[str, float] = defaultdict(float)
    stream = torch.ones(1)

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal stream
        hidden = args[0] if args else kwargs["hidden_states"]
        stream = hidden.double().square().mean(-1).flatten()

    def see(names: list[str], rows: torch.Tensor) -> None:
        squares = rows.double().square()
        for name in names:
            share = torch.ones(len(rows), dtype=torch.float64)
            if weigh == "unit" or (weigh == "residual" and name.endswith(WRITERS) and len(rows) != len(stream)):
                share = 1 / at_least(squares.mean(-1))
            elif weigh == "residual" and name.endswith(WRITERS):
                share = 1 / at_least(stream)
            sums[name] = sums.get(name, 0) + share @ squares
            n[name] += float(share.sum())

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks_of(subject)]
    with Gather(subject, subject.source, see):
        subject.model(ids)
    for hook in hooks:
        hook.remove()
    return {name: (total / n[name]).float() for name, total in sums.items()}


def at_least(squares: torch.Tensor) -> torch.Tensor:
    """Mean squares of tokens, none so small that it would outweigh all others: a padding token's embedding is zero."""
    return squares.clamp_min(1e-3 * float(squares.mean()))


@torch.no_grad()
def means(subject: Subject, ids: torch.Tensor) -> Moments:
    """Means of the inputs of all weights [shape=(in,)]."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def see(names: list[str], rows: torch.Tensor) -> None:
        for name in names:
            seen[name].append(rows.mean(0) * len(rows))
            n[name] += len(rows)

    n: dict[str, int] = defaultdict(int)
    with Gather(subject, subject.source, see):
        subject.model(ids)
    return {name: torch.stack(sums).sum(0) / n[name] for name, sums in seen.items()}


def blocks_of(subject: Subject) -> torch.nn.ModuleList:
    """The stack of layers."""
    stacks = (module for module in subject.model.modules() if isinstance(module, torch.nn.ModuleList))
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


@torch.no_grad()
def block_by_block(subject: Subject, ids: torch.Tensor) -> Iterator[tuple[list[str], Moments]]:
    """Names of each block's weights and their inputs' second moments [shape=(in, in)], from blocks before as they are by then."""
    blocks = blocks_of(subject)
    hidden, args, kwargs = _inputs_of(blocks[0], subject.model, ids)
    at = {p.data_ptr(): i for i, block in enumerate(blocks) for p in block.parameters()}
    owners: dict[int, list[str]] = defaultdict(list)
    starts = sorted(at)
    for name in subject.source:
        owners[_owner(subject.view(name), starts, at)].append(name)
    for i, block in enumerate(blocks):
        moments: Moments = {}

        def see(names: list[str], rows: torch.Tensor, moments: Moments = moments) -> None:
            moment = rows.T @ rows
            for name in names:
                moments[name] = moments.get(name, 0) + moment

        with Gather(subject, owners[i], see):
            block(hidden, *args, **kwargs)
        yield owners[i], moments
        output = block(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output


def _owner(view: torch.Tensor, starts: list[int], at: dict[int, int]) -> int:
    """Number of the block whose parameter the view lies in, or -1."""
    i = bisect.bisect_right(starts, view.data_ptr()) - 1
    return at[starts[i]] if i >= 0 else -1


class _ReachedError(Exception):
    """The first block has been reached."""


def _inputs_of(block: Any, model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    caught = []

    def catch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _ReachedError

    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(ids)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    [(args, kwargs)] = caught
    if args:
        return args[0], args[1:], kwargs
    return kwargs.pop("hidden_states"), (), kwargs
