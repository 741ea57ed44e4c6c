"""Pre-tokenizers that llama.cpp knows, told by what tokenizer.json says of them.

llama.cpp's converter tells a pre-tokenizer by a hash of tokens, which names models; here its parts are compared, so that a model
nobody listed is served as well, and one that cuts words in another way is refused rather than cut wrong.
Names and patterns: llama.cpp v0.5, src/llama-vocab.cpp.
"""

from __future__ import annotations

import reprlib
from typing import Any

from hqq_core.errors import FormatError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_QWEN2 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}"
_GPT4O = rf"{_CASED[0]}{_ENDINGS}?|{_CASED[1]}{_ENDINGS}?|\p{{N}}{{1,3}}|{_CASED_REST}"

# (pattern that cuts, whether a word that is a token stays whole whatever the merges) -> name
_BY_PATTERN = {
    (_QWEN2, False): "qwen2",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_TEKKEN, True): "tekken",
    (_GPT4O, False): "gpt-4o",
}


def pretokenizer_of(described: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json of byte-level BPE; a FormatError where it has none."""
    steps = _steps(described.get("pre_tokenizer"), "pretokenizers")
    whole = bool(described["model"].get("ignore_merges"))
    normalizers = _steps(described.get("normalizer"), "normalizers")
    plain = all(step.get("type") == "NFC" for step in normalizers)  # left out by llama.cpp: most text has that form
    name = _name(steps, whole) if plain else None
    if name is None:
        found = reprlib.repr({"pre_tokenizer": steps, "normalizer": normalizers, "ignore_merges": whole})
        raise FormatError("format", f"tokenizer.json: llama.cpp knows no such pre-tokenizer: {found}")
    return name


def _name(steps: list[dict[str, Any]], whole: bool) -> str | None:
    kinds = [step.get("type") for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    words = bool(steps[-1].get("use_regex", True))
    if kinds == ["ByteLevel"] and words and not whole:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and words and steps[0].get("individual_digits") and not whole:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not words and _isolates(steps[0]):
        return _BY_PATTERN.get((steps[0]["pattern"]["Regex"], whole))
    return None


def _isolates(split: dict[str, Any]) -> bool:
    """Whether what a pattern matches becomes words; patterns here match all there is, so what lies between is nothing."""
    cuts = (split.get("behavior"), bool(split.get("invert"))) in (("Isolated", False), ("Removed", True))
    return cuts and isinstance(split.get("pattern"), dict) and "Regex" in split["pattern"]


def prefixes_space(described: dict[str, Any]) -> bool:
    """Whether a tokenizer of SentencePiece's kind puts a space before a text; a FormatError where it does something else, too."""
    normalizers = _steps(described.get("normalizer"), "normalizers")
    steps = _steps(described.get("pre_tokenizer"), "pretokenizers")
    replaces = [step for step in normalizers if step.get("type") == "Replace"]
    prepends = [step for step in normalizers if step.get("type") == "Prepend"]
    spaces = [step for step in steps if step.get("type") == "Metaspace"]
    splits = [step for step in steps if step.get("type") == "Split" and step.get("pattern") == {"String": " "}]
    known = len(replaces) + len(prepends) + len(spaces) + len(splits) == len(normalizers) + len(steps)
    sound = all(step.get("pattern") == {"String": " "} for step in replaces) and (replaces or spaces)
    if not known or not sound:
        found = reprlib.repr({"normalizer": normalizers, "pre_tokenizer": steps})
        raise FormatError("format", f"tokenizer.json: llama.cpp knows no such tokenizer with byte fallback: {found}")
    return bool(prepends) or any(step.get("prepend_scheme", "always") != "never" for step in spaces)


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json: a sequence's, one, or none."""
    if not part:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]
