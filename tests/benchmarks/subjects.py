"""Real models to quantize in memory and judge: float32 arithmetic on weights rounded to the type in which the model stores them.

Decoders: windows that do not overlap, every token of a window scored but its first; KL(source || result) and perplexity.
Encoders: cosine between source's and result's sentence embeddings (mean of the last hidden state).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hqq_core import Checkpoint
from hqq_core.architectures import QUANTIZED, Role, role

SENTENCE = 128  # tokens
NEXT_STORY = "\n<|endoftext|>\n"
EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


class Subject:
    """One model, its stored weights, and what its source says to a text.

    `source` has the linear weights that a plan would quantize, as stored, as (out, in); `view(name)` is the same weight in
    `model`, to be read or overwritten. Conv1D weights count as linear here.
    """

    def __init__(self, name: str, folder: Path, text: str, n_tokens: int, context: int = 512) -> None:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        self.name, self.folder, self.checkpoint = name, folder, Checkpoint.open(folder)
        self.is_decoder = "LM" in self.checkpoint.config["architectures"][0]
        cls = AutoModelForCausalLM if self.is_decoder else AutoModel
        self.model: Any = cls.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
        self.model.config.use_cache = False
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.source = {name: W for file in self.checkpoint.files for name, W in self._linears(file)}
        self._parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        self._saved = {name: p.to(self.dtype, copy=True) for name, p in self._parameters.items()}
        self.text, self.n_tokens, self.context = text, n_tokens, context

    def _linears(self, file: str) -> Any:
        with self.checkpoint.shard(file) as reader:
            for name, entry in reader.entries.items():
                kind = role(name, entry.shape, self.checkpoint.config)
                if kind in (*QUANTIZED, Role.CONV1D):
                    W = reader.read(name)
                    yield name, W.T.contiguous() if kind is Role.CONV1D else W

    @property
    def dtype(self) -> torch.dtype:
        """What the model stores its weights in."""
        return next(iter(self.source.values())).dtype

    def names(self, group_size: int) -> list[str]:
        """Weights whose inputs the group size divides."""
        return [name for name, W in self.source.items() if W.shape[1] % group_size == 0]

    def view(self, name: str) -> torch.Tensor:
        """The weight in the model, as (out, in)."""
        if match := EXPERT.fullmatch(name):
            fused = "down_proj" if match["part"] == "down" else "gate_up_proj"
            part = self._parameter(f"{match['layer']}.{fused}")[int(match["expert"])]
            return part if fused == "down_proj" else part.chunk(2)[match["part"] == "up"]
        W = self._parameter(name)
        return W.T if role(name, tuple(W.shape), self.checkpoint.config) is Role.CONV1D else W

    def _parameter(self, name: str) -> torch.Tensor:
        found = self._find(name)
        if found is None:
            raise SystemExit(f"{self.name}: {name} is in the checkpoint: there is no such parameter in the model")
        return found

    def _find(self, name: str) -> torch.Tensor | None:
        prefix = f"{self.model.base_model_prefix}."
        names = (name, prefix + name, name.removeprefix(prefix))
        return next((self._parameters[n] for n in names if n in self._parameters), None)

    @contextmanager
    def rebased(self, parameters: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
        """Take for the source another model of the same function: the one in memory, or the given parameters."""
        before = self.source
        for name, parameter in self.model.named_parameters():
            self._parameters[name].copy_((parameters or {}).get(name, parameter.data).to(self.dtype))
            parameter.data = self._parameters[name]  # whoever changed it may have put another tensor there
        self.source = {name: self.view(name).to(self.dtype).contiguous() for name in before}
        try:
            yield
        finally:
            self.source = before

    def bias(self, name: str) -> torch.Tensor | None:
        """What is added to the product with a weight; None where there is nothing."""
        return self._find(f"{name.removesuffix('weight')}bias")

    def restore(self) -> None:
        """Every parameter as in the source."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._saved[name])

    # what the text is to the model

    def windows(self, text: str, n_tokens: int, *, last: bool = False) -> torch.Tensor:
        """The first or last tokens of a text in windows [shape=(n, context)]; each of several stories begins with a token."""
        stories = [
            self.tokenizer(story, add_special_tokens=False, verbose=False).input_ids for story in text.split(NEXT_STORY)
        ]
        first = self.tokenizer.bos_token_id if self.is_decoder else self.tokenizer.cls_token_id
        if len(stories) > 1:
            stories = [[first, *story] for story in stories]
        ids = torch.tensor([token for story in stories for token in story])
        n_windows = math.ceil(n_tokens / self.context)
        if len(ids) < n_windows * self.context:
            raise SystemExit(f"{self.name}: the text has {len(ids)} tokens: wanted {n_windows * self.context}")
        ids = ids[-n_windows * self.context :] if last else ids[: n_windows * self.context]
        return ids.view(n_windows, self.context)

    @cached_property
    def _windows(self) -> torch.Tensor:
        return self.windows(self.text, self.n_tokens)

    @cached_property
    def _sentences(self) -> list[dict[str, torch.Tensor]]:
        paragraphs = [part.strip() for part in re.split(rf"\n\s*\n|{re.escape(NEXT_STORY)}", self.text)]
        batches, seen = [], 0
        for paragraph in (part for part in paragraphs if len(part.split()) > 8):
            tokens = self.tokenizer(paragraph, truncation=True, max_length=SENTENCE, return_tensors="pt")
            batches.append(dict(tokens))
            seen += tokens.input_ids.numel()
            if seen >= self.n_tokens:
                return batches
        raise SystemExit(f"{self.name}: the text has {seen} tokens in sentences: wanted {self.n_tokens}")

    # judging

    @cached_property
    def _expected(self) -> Any:
        """What the source says; asked for before anything is overwritten. Half precision: 1 GB for 10k tokens of SmolLM2."""
        return [p.half() for p in self._answers()]

    def _answers(self) -> Any:
        with torch.no_grad():
            if self.is_decoder:
                for window in self._windows:
                    yield torch.log_softmax(self.model(window[None]).logits[0, :-1], dim=-1)
            else:
                for sentence in self._sentences:
                    yield self.model(**sentence).last_hidden_state[0].mean(0)

    def listen(self) -> None:
        """Keep the source's answers."""
        self.restore()
        assert self._expected

    def judge(self) -> dict[str, float]:
        """The model as it is now beside its source."""
        return self._judge_decoder() if self.is_decoder else self._judge_encoder()

    def _judge_decoder(self) -> dict[str, float]:
        totals = torch.zeros(4, dtype=torch.float64)
        for window, expected, q in zip(self._windows, self._expected, self._answers(), strict=True):
            p, picked = expected.float(), (torch.arange(len(window) - 1), window[1:])
            kl = (p.exp() * (p - q)).sum(-1)
            same = p.argmax(-1) == q.argmax(-1)
            totals += torch.stack([part.sum().double() for part in (-p[picked], -q[picked], kl, same)])
        source, result, kl, same = (totals / self._windows[:, 1:].numel()).tolist()
        return {"kl": kl, "perplexity": math.exp(result), "source_perplexity": math.exp(source), "agreement": same}

    def _judge_encoder(self) -> dict[str, float]:
        pairs = zip(self._expected, self._answers(), strict=True)
        cosines = torch.stack([torch.cosine_similarity(p.double(), q.double(), dim=0) for p, q in pairs])
        return {"cosine": cosines.mean().item(), "worst_cosine": cosines.min().item()}
