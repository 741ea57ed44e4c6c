"""The reference: transformers' own model, in float32, with the weights that were solved, dequantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hqq_core import Checkpoint, Recipe
from hqq_core.energy import profile
from hqq_core.evaluate import load_model, tokenize
from tests.families import build
from tests.interop.runtimes import causal
from tests.models import cached, english
from tests.oracles import stored_tensors
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
    """What a result computes, by arithmetic of the reader."""

    def __init__(self, source: Source, result: Path, recipe: Recipe) -> None:
        self._source = source
        self._solved = dict(solved(source.folder, recipe, profile(Checkpoint.open(source.folder), recipe.energy)))
        ours = {f"{module}.weight" for module in self._solved}
        self._copied = {name: tensor for name, tensor in stored_tensors(result).items() if name not in ours}
        self._logits: dict[tuple[str, str], np.ndarray] = {}
        self._greedy: dict[tuple[str, str], list[int]] = {}

    @property
    def n_layers(self) -> int:
        """How many weights were quantized."""
        return len(self._solved)

    def logits(self, dequantizes: str, computes: str) -> np.ndarray:
        """Float32 [shape=(windows, tokens, vocabulary)], with weights dequantized and the model run in these types."""
        self._compute(dequantizes, computes)
        return self._logits[dequantizes, computes]

    def greedy(self, dequantizes: str, computes: str) -> list[int]:
        """The continuation of the prompt."""
        self._compute(dequantizes, computes)
        return self._greedy[dequantizes, computes]

    def _compute(self, dequantizes: str, computes: str) -> None:
        if (dequantizes, computes) not in self._logits:
            model, task = self._model(dequantizes).to(getattr(torch, computes)), self._source.task
            self._logits[dequantizes, computes] = causal.logits(model, task["windows"])
            self._greedy[dequantizes, computes] = causal.greedy(model, task["prompt"], task["n_new"])

    @torch.no_grad()
    def _model(self, dequantizes: str) -> Any:
        model = copy.deepcopy(self._source.model)
        model.load_state_dict(self._copied, strict=False)  # norms, too, are not what they were
        for module, tensor in self._solved.items():
            model.get_submodule(module).weight.copy_(tensor.dequantize(getattr(torch, dequantizes)))
        return model


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
