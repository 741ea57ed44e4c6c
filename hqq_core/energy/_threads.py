"""Sums that do not depend on how many threads there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

N_ROWS = 128  # of a product's input that one thread multiplies at a time: the unit that no thread count changes

Multiply = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def single_threaded() -> Iterator[int]:
    """Torch on one thread, so that it cuts no sum in pieces; gives the number of threads it had."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield n_threads
    finally:
        torch.set_num_threads(n_threads)


@contextmanager
def row_products(n_threads: int) -> Iterator[Callable[[Multiply, torch.Tensor], torch.Tensor]]:
    """Gives `f(multiply, x)`: `multiply(x)` by pieces of `N_ROWS` rows, on that many threads, each by one alone."""
    with ThreadPoolExecutor(n_threads, "energy", torch.set_num_threads, (1,)) as pool:

        def product(multiply: Multiply, x: torch.Tensor) -> torch.Tensor:
            pieces = x.reshape(-1, x.shape[-1]).split(N_ROWS)
            parts = list(pool.map(multiply, pieces) if n_threads > 1 else map(multiply, pieces))
            return torch.cat(parts).view(*x.shape[:-1], -1) if len(x) else multiply(x)

        yield product
