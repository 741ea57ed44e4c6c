"""What every script here is given and gives back: `python SCRIPT FOLDER TASK ANSWER`.

The task is JSON: `windows` (token ids, a list of lists), `prompt` (token ids) and `n_new`; llama.cpp also takes `texts`, and
answers with `tokens` of each. The answer is a folder: `answer.json` with `greedy` (n_new token ids), `versions`, `layers` (what
runs the quantized weights) and, unless `logits.npy` lies beside it (float32 [shape=(windows, tokens, vocabulary)]), `logprobs` of
each window's second to last token. Where the task's `rounding` is true, a runtime that can tell answers with `rounding`, too:
what it loses itself in float32, with weights that are not packed, of the largest logit.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Task:
    """One folder to load, and what to compute with it."""

    folder: Path
    windows: list[list[int]]
    prompt: list[int]
    n_new: int
    rounding: bool = False


@dataclass(frozen=True)
class Answer:
    """What a runtime computed: all logits, or the log-probability of each token but a window's first."""

    greedy: list[int]
    layers: str
    logits: np.ndarray | None = None
    logprobs: list[list[float]] | None = None
    rounding: float | None = None


def serve(compute: Callable[[Task], Answer], packages: Iterable[str]) -> None:
    """Run one task from the command line; `packages` are those whose versions matter."""
    folder, task, output = map(Path, sys.argv[1:])
    answer = compute(Task(folder, **json.loads(task.read_text())))
    if answer.logits is not None:
        np.save(output / "logits.npy", answer.logits)
    fields: dict[str, Any] = {
        "greedy": answer.greedy,
        "logprobs": answer.logprobs,
        "layers": answer.layers,
        "rounding": answer.rounding,
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    (output / "answer.json").write_text(json.dumps(fields))


def counted(names: Iterable[str]) -> str:
    """How often each name occurs, in words."""
    return ", ".join(f"{n} {name}" for name, n in collections.Counter(names).most_common())
