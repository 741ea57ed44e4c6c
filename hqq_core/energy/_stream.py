"""The residual stream from the weights alone: mean squares of its channels, from the embedding on, layer by layer.

What joins the stream is taken for uncorrelated with it and between channels. That a few channels carry most of it, which decides
what columns behind a norm see, shows all the same.
"""

from __future__ import annotations

import torch

from hqq_core.energy._weights import Weights

OFFSET = 50  # tokens are as frequent as 1 / (id + OFFSET)
N_ROWS = 1024  # squared at a time

# Each norm reads the stream, and attention's and then the feed-forward block's output joins it as it is.
_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "phi3"}


class Stream:
    """Mean squares of the channels [shape=(hidden_size,)], as far as they are known."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._squares = weights, None
        if weights.config.get("model_type") in _FAMILIES:
            found = [name for name in weights.names if name.endswith("embed_tokens.weight")]
            table = weights.stored(found[0]) if len(found) == 1 else None
            self._squares = None if table is None or table.ndim != 2 else _mean_square(table)

    @property
    def known(self) -> bool:
        """Whether there is more to say than that all channels are alike."""
        return self._squares is not None

    def normed(self, width: int) -> torch.Tensor:
        """Mean squares after a division by their root mean square; ones where the stream is not known."""
        if self._squares is None or len(self._squares) != width or not self._squares.mean() > 0:
            return torch.ones(width)
        return self._squares / self._squares.mean()

    def join(self, name: str, h: torch.Tensor) -> None:
        """Add the output of a weight whose inputs have the mean squares `h`."""
        W = self._weights.stored(name)
        if self._squares is None or W is None or W.shape != (len(self._squares), len(h)):
            self.lose()
            return
        joined = self._squares + torch.cat([piece.float().square() @ h for piece in W.split(N_ROWS)])
        self._squares = joined if joined.isfinite().all() else None

    def lose(self) -> None:
        """From here on nothing is known."""
        self._squares = None


def _mean_square(table: torch.Tensor) -> torch.Tensor:
    """Over the rows of an embedding, as frequent as their tokens."""
    frequency = 1 / (torch.arange(len(table), dtype=torch.float64) + OFFSET)
    pieces = zip(table.split(N_ROWS), frequency.split(N_ROWS), strict=True)
    squares: torch.Tensor = sum(p @ rows.double().square() for rows, p in pieces) / frequency.sum()
    return squares.float()
