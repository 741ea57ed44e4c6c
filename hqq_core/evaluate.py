"""Perplexity and KL of a folder against its source, through transformers' own loaders (extra: `evaluate`).

Protocol: tokenize once without special tokens, non-overlapping windows, score every token of a window but its first; float32
arithmetic on the stored weights; perplexity = exp(total NLL / scored tokens); KL(source || result) per scored position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hqq_core.checkpoint import CONFIG
from hqq_core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Comparison:
    """A result beside its source.

    Parameters
    ----------
    perplexity, source_perplexity : float
    kl : float
        Mean KL divergence of the next-token distributions, in nats.
    agreement : float
        Share of positions where both rank the same token first.
    n_tokens : int
        Positions scored.
    """

    perplexity: float
    source_perplexity: float
    kl: float
    agreement: float
    n_tokens: int


def load_model(folder: Path) -> Any:
    """A causal language model in float32, read by transformers; never code from the folder.

    Raises
    ------
    CheckpointError
        The folder is in a format that transformers 5 would load with random weights, without an error.
    """
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / CONFIG).read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    if method == "hqq":
        raise CheckpointError(f"{CONFIG}: format 'hqq' is read by the hqq library or transformers < 5, not by this one")
    where = {"device_map": "cpu"} if method == "metal" else {}  # transformers would look for a Mac's GPU
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **where)
    return model.to(torch.float32).eval()


def tokenize(folder: Path, text: str, n_tokens: int) -> torch.Tensor:
    """The first `n_tokens` of a text: int64 [shape=(n,)]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    return torch.as_tensor(ids[:n_tokens])


def compare(source: Any, result: Any, ids: torch.Tensor, *, context: int = 512) -> Comparison:
    """Score `result` beside `source` on the same tokens.

    Parameters
    ----------
    source, result : transformers causal language models
    ids : Tensor [shape=(n,)], int64
    context : int
        Tokens per window.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    n_tokens = 0
    for window in _windows(ids, context):
        targets = window[1:]
        p, q = (_log_probabilities(model, window) for model in (source, result))
        picked = torch.arange(len(targets)), targets
        kl = (p.exp() * (p - q)).sum(-1)
        same = p.argmax(-1) == q.argmax(-1)
        totals += torch.stack([-p[picked].sum(), -q[picked].sum(), kl.sum(), same.sum()]).double()
        n_tokens += len(targets)
    if n_tokens == 0:
        raise ValueError(f"{len(ids)} tokens: wanted two or more to score")
    source_nll, nll, kl_sum, same_sum = (total / n_tokens for total in totals.tolist())
    return Comparison(math.exp(nll), math.exp(source_nll), kl_sum, same_sum, n_tokens)


def generate(model: Any, folder: Path, prompt: str, n_tokens: int = 40) -> str:
    """Greedy continuation of a prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def _windows(ids: torch.Tensor, context: int) -> Iterator[torch.Tensor]:
    return (window for window in ids.split(context) if len(window) > 1)


@torch.no_grad()
def _log_probabilities(model: Any, window: torch.Tensor) -> torch.Tensor:
    logits = model(window[None]).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)
