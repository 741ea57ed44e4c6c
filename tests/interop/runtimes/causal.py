"""A causal language model of transformers, any version: logits of windows, greedy tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


@torch.no_grad()
def logits(model: Any, windows: list[list[int]]) -> np.ndarray:
    """Float32 [shape=(windows, tokens, vocabulary)]; windows of one length."""
    return np.stack([model(torch.tensor([window])).logits[0].float().numpy() for window in windows])


@torch.no_grad()
def greedy(model: Any, prompt: list[int], n_new: int) -> list[int]:
    """The likeliest next token, n_new times, with the model's own cache."""
    ids, cache, found = torch.tensor([prompt]), None, []
    for _ in range(n_new):
        output = model(ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        found.append(int(ids))
    return found
