"""Means: a moment of what each stored weight is multiplied with, averaged over all that passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container

import torch

from hqq_core.energy._stored import Fed

Moment = Callable[[torch.Tensor], torch.Tensor]


class Means:
    """Running means, by stored tensor and, where one holds all experts, by expert.

    Parameters
    ----------
    moment : callable
        Inputs [shape=(n, in_features)] to the sum over them of what is averaged.
    allocate : callable
        A tensor with room for a sum like the one it gets; its values are overwritten.
    """

    def __init__(self, moment: Moment, allocate: Moment) -> None:
        self._moment, self._allocate = moment, allocate
        self._sums: dict[Fed, torch.Tensor] = {}
        self._n: dict[Fed, int] = defaultdict(int)

    def add(self, fed: Fed, x: torch.Tensor) -> None:
        """Count in what some tensors were multiplied with: Tensor [shape=(n, in_features)]."""
        if len(x):
            value = self._moment(x)
            if fed in self._sums:
                self._sums[fed] += value
            else:
                self._sums[fed] = self._allocate(value).copy_(value)
            self._n[fed] += len(x)

    def by_name(
        self, shapes: dict[str, tuple[int, ...]], only: Container[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Means by tensor name, of all or `only` these, float32; of one that holds all experts, if every one was reached."""
        found: dict[str, torch.Tensor] = {}
        stacks: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        for (together, expert), total in self._sums.items():
            names = [name for name in together if only is None or name in only]
            if not names:
                continue
            mean = (total / self._n[together, expert]).float()
            for name in names:
                if expert is None:
                    found[name] = mean
                else:
                    stacks[name][expert] = mean
        for name, means in stacks.items():
            if len(means) == shapes[name][0]:
                found[name] = torch.stack([means[expert] for expert in sorted(means)])
        return found
