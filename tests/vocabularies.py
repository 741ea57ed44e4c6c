"""Tiny tokenizers of the kinds that models have, trained on the English that Python brings along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.models import english

# As the tokenizer.json of a model of each kind has it.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"qwen2": QWEN2, "llama-bpe": LLAMA3, "smaug-bpe": LLAMA3, "tekken": TEKKEN, "gpt-4o": GPT4O}
BYTE_LEVEL = ("gpt-2", "smollm", *_PATTERNS)
SENTENCEPIECE = ("llama", "mistral", "gemma")
TEXT = (
    "Hello, it's 2026-11-25; I've 12345 apples!\n\n  Indented\tline...  \r\nЗдравствуй, мир! "
    "你好世界 ÉCOLE naïve 🚀🚀 <b>x</b>"
)
BOS, EOS, CHAT = "<s>", "</s>", "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_tokenizer(folder: Path, kind: str, n_tokens: int = 512, **changes: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json of a kind, by its name in llama.cpp or its family."""
    described = _byte_level(kind, n_tokens) if kind in BYTE_LEVEL else _sentencepiece(kind, n_tokens)
    (folder / "tokenizer.json").write_text(json.dumps(described | changes, ensure_ascii=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "chat_template": CHAT,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _byte_level(pre: str, n_tokens: int) -> dict[str, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    def bytes_of(use_regex: bool) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)

    steps = {
        "gpt-2": [bytes_of(True)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), bytes_of(True)],
    }.get(pre) or [pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated"), bytes_of(False)]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens, special_tokens=[BOS, EOS, "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([english()[:200_000]], trainer)
    return json.loads(tokenizer.to_str())


def _sentencepiece(family: str, n_tokens: int) -> dict[str, Any]:
    """BPE with byte fallback whose spaces are visible; before a text comes one, but for Gemma. A bos comes with each."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", BOS, EOS, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=n_tokens, special_tokens=special, show_progress=False)
    trained.train_from_iterator([english()[:200_000]], trainer)
    fields = json.loads(trained.to_str())["model"]
    model = models.BPE(
        fields["vocab"],
        [tuple(merge) for merge in fields["merges"]],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", "▁")
    if family == "gemma":
        tokenizer.normalizer = replace
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return json.loads(tokenizer.to_str())
