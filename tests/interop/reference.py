"""The reference: transformers' own model, in float32, with the weights that were solved, dequantized."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hqq_core import Checkpoint, Recipe, build_plan
from hqq_core.energy import Energies, profile
from hqq_core.evaluate import load_model, tokenize
from hqq_core.formats import writer_for
from hqq_core.plan import Plan, stored_tensors
from hqq_core.weighting import Weighting
from tests.families import build
from tests.interop.rounding import PER_TOKEN, Rounding, block_size, in_blocks, per_token, round_inputs
from tests.interop.runtime import Arithmetic
from tests.interop.runtimes import causal
from tests.models import MODELS, cached, english
from tests.solved import solved

PROMPT = "The capital of France is"
WINDOW = 128


class Source:
    """A model to quantize, with what is asked of it and of what becomes of it."""

    def __init__(self, name: str, folder: Path, n_tokens: int) -> None:
        self.name, self.real = name, name.partition(",")[0] in MODELS
        self.folder = _folder(name, folder)
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
        plan = build_plan(checkpoint, recipe)
        energies = profile(checkpoint, plan.recipe.energy if plan.recipe.weighted else "none")
        plan = plan.with_energies(energies)
        self._solved = dict(solved(source.folder, plan.recipe, energies))
        self._folded = dict(folded(plan, energies))
        self._roundings = partial(roundings, checkpoint, plan)
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
        dequantizes, holds, computes = (getattr(torch, name) for name in dataclasses.astuple(arithmetic)[:3])
        model = copy.deepcopy(self._source.model)
        model.load_state_dict(self._folded, strict=False)
        for module, tensor in self._solved.items():
            model.get_submodule(module).weight.copy_(tensor.dequantize(dequantizes).to(holds))
        if arithmetic.activations:
            round_inputs(model, dict(self._roundings(arithmetic.activations)))
        return model.to(computes)


def folded(plan: Plan, energies: Energies) -> Iterator[tuple[str, torch.Tensor]]:
    """Norms and biases that are not what they were."""
    for shard in plan.shards:
        values = Weighting.of(shard, energies).values
        yield from ((tensor.name, values[tensor.name]) for tensor in shard.tensors if tensor.folded and not tensor.spec)


def roundings(checkpoint: Checkpoint, plan: Plan, activations: str) -> Iterator[tuple[str, Rounding]]:
    """How the input of each quantized module is rounded; an embedding is looked up, and multiplied where it is the head."""
    writer = writer_for(plan.recipe, checkpoint)
    for tensor in plan.tensors:
        if tensor.spec is None:
            continue
        module = "lm_head" if tensor.name.endswith("embed_tokens.weight") else tensor.module
        if activations == PER_TOKEN:
            yield module, per_token
        else:
            yield module, partial(in_blocks, size=block_size(stored_tensors(tensor, writer)[0][1]))


def perplexity(logprobs: np.ndarray) -> float:
    """Over all scored tokens."""
    return float(np.exp(-np.mean(logprobs, dtype=np.float64)))


def _task_of(folder: Path, n_tokens: int) -> dict[str, Any]:
    windows = tokenize(folder, english(), n_tokens).view(-1, WINDOW)
    return {"windows": windows.tolist(), "prompt": tokenize(folder, PROMPT, WINDOW).tolist(), "n_new": 24}


_TINY_TASK = {"windows": [[i * 7 % 320 for i in range(1, 65)]], "prompt": [7, 14, 21], "n_new": 8}


def _folder(name: str, folder: Path) -> Path:
    model, _, kind = name.partition(", ")
    if model not in MODELS:
        return _save_tiny(name, folder)
    return _save_ternary(cached(model), folder) if kind else cached(model)


def _save_ternary(source: Path, folder: Path) -> Path:
    """A model whose matrices were made ternary as absmean training leaves them: a wreck, but what a trained one looks like."""
    model = load_model(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                s = parameter.abs().mean()
                parameter.copy_((parameter / s).round().clamp(-1, 1) * s)
    model.to(getattr(torch, Checkpoint.open(source).config["dtype"])).save_pretrained(folder)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _save_tiny(name: str, folder: Path) -> Path:
    """A random model whose layers every format can hold."""
    family, dtype = name.split(", ")
    model = build(
        family, hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=3,
        tie_word_embeddings=family.startswith("gemma"),
    )  # fmt: skip
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
