"""The reference: transformers' own model, in float32, with the weights that were solved, dequantized."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hqq_core import Checkpoint, Recipe, build_plan
from hqq_core.energy import Energies, profile
from hqq_core.evaluate import load_model, tokenize
from hqq_core.weighting import Weighting
from tests.families import build
from tests.interop.runtime import Arithmetic
from tests.interop.runtimes import causal
from tests.models import cached, english
from tests.solved import solved

PROMPT = "The capital of France is"
WINDOW = 128


class Source:
    """A model to quantize, with what is asked of it and of what becomes of it."""

    def __init__(self, name: str, folder: Path, n_tokens: int) -> None:
        self.name, self.real = name, "," not in name
        self.folder = cached(name) if self.real else _save_tiny(name, folder)
        self.model = load_model(self.folder)
        self.dtype = Checkpoint.open(self.folder).config["dtype"]
        self.task = _task_of(self.folder, n_tokens) if self.real else _TINY_TASK
        self.perplexity = perplexity(self.logprobs(causal.logits(self.model, self.task["windows"])))

    def logprobs(self, logits: np.ndarray) -> np.ndarray:
        """Of each token but a window's first: float32 [shape=(windows, tokens - 1)]."""
        probabilities = torch.log_softmax(torch.from_numpy(logits[:, :-1]), dim=-1)
        targets = torch.tensor(self.task["windows"])[:, 1:, None]
        return probabilities.gather(-1, targets).squeeze(-1).numpy()


class Reference:
    """What a result computes, in the arithmetic of its reader."""

    def __init__(self, source: Source, recipe: Recipe) -> None:
        self._source = source
        checkpoint = Checkpoint.open(source.folder)
        energies = profile(checkpoint, recipe.energy if recipe.weighted else "none")
        self._solved = dict(solved(source.folder, recipe, energies))
        self._folded = dict(folded(checkpoint, recipe, energies))
        self._done: dict[Arithmetic, tuple[np.ndarray, list[int]]] = {}

    def logits(self, arithmetic: Arithmetic) -> np.ndarray:
        """Float32 [shape=(windows, tokens, vocabulary)]."""
        return self._computed(arithmetic)[0]

    def greedy(self, arithmetic: Arithmetic) -> list[int]:
        """The continuation of the prompt."""
        return self._computed(arithmetic)[1]

    def _computed(self, arithmetic: Arithmetic) -> tuple[np.ndarray, list[int]]:
        if arithmetic not in self._done:
            model, task = self._model(arithmetic), self._source.task
            said = causal.greedy(model, task["prompt"], task["n_new"])
            self._done[arithmetic] = causal.logits(model, task["windows"]), said
        return self._done[arithmetic]

    @torch.no_grad()
    def _model(self, arithmetic: Arithmetic) -> Any:
        dequantizes, holds, computes = (getattr(torch, name) for name in dataclasses.astuple(arithmetic))
        model = copy.deepcopy(self._source.model)
        model.load_state_dict(self._folded, strict=False)
        for module, tensor in self._solved.items():
            model.get_submodule(module).weight.copy_(tensor.dequantize(dequantizes).to(holds))
        return model.to(computes)


def folded(checkpoint: Checkpoint, recipe: Recipe, energies: Energies) -> Iterator[tuple[str, torch.Tensor]]:
    """Norms and biases that are not what they were."""
    for shard in build_plan(checkpoint, recipe).with_energies(energies).shards:
        values = Weighting.of(shard, energies).values
        yield from ((tensor.name, values[tensor.name]) for tensor in shard.tensors if tensor.folded and not tensor.spec)


def perplexity(logprobs: np.ndarray) -> float:
    """Over all scored tokens."""
    return float(np.exp(-np.mean(logprobs, dtype=np.float64)))


def _task_of(folder: Path, n_tokens: int) -> dict[str, Any]:
    windows = tokenize(folder, english(), n_tokens).view(-1, WINDOW)
    return {"windows": windows.tolist(), "prompt": tokenize(folder, PROMPT, WINDOW).tolist(), "n_new": 24}


_TINY_TASK = {"windows": [[i * 7 % 320 for i in range(1, 65)]], "prompt": [7, 14, 21], "n_new": 8}


def _save_tiny(name: str, folder: Path) -> Path:
    """A random model whose layers every format can hold."""
    family, dtype = name.split(", ")
    model = build(
        family, hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=3,
        tie_word_embeddings=family.startswith("gemma"),
    )  # fmt: skip
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
