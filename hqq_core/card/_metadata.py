"""The front matter of a card, as the Hub understands it: https://huggingface.co/docs/hub/model-cards#model-card-metadata.

huggingface_hub's ModelCardData is no more than a dictionary of these fields. It is not used, for it would load an HTTP client,
and hqq_core knows no network; YAML is written by PyYAML, as that library does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hqq_core.architectures import text_config
from hqq_core.card._licenses import LICENSES
from hqq_core.formats.base import CheckpointWriter
from hqq_core.plan import Plan
from hqq_core.provenance import Provenance

TASKS = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering", "ForImageClassification": "image-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition", "ForCTC": "automatic-speech-recognition",
    "ForImageTextToText": "image-text-to-text", "Model": "feature-extraction",
}  # fmt: skip
_CONDITIONAL = "ForConditionalGeneration"
_SLUG = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAME = re.compile(r"[\w .+-]{1,100}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]{1,8}){0,3}|code|multilingual")
_LINK = re.compile(r"https?://[\x21-\x7e]{1,500}")
MAX_VALUES = 300  # of a list


def metadata(
    plan: Plan,
    writer: CheckpointWriter,
    config: dict[str, Any],
    source: dict[str, Any],
    provenance: Provenance,
) -> dict[str, Any]:
    """Fields of a card by name; `source` is the front matter of the source's own, of which only sound values are taken over."""
    fields: dict[str, Any] = {}
    if provenance.repo_id:
        fields |= {"base_model": provenance.repo_id, "base_model_relation": "quantized"}
    fields["library_name"] = writer.capabilities.library
    if task := _text(source.get("pipeline_tag"), _SLUG) or task_of(config):
        fields["pipeline_tag"] = task
    fields |= _licence(source, plan.carried)
    if languages := list(_texts(source.get("language"), _LANGUAGE)):
        fields["language"] = languages
    solved = [] if writer.capabilities.lossless else ["hqq"]
    named = writer.capabilities.type_of(plan.recipe)
    tags = ["halfquad", *solved, f"{plan.spec.nbits:g}-bit", plan.recipe.format, *filter(None, [named])]
    return {**fields, "tags": list(dict.fromkeys(tags))}


def front_matter_of(fields: dict[str, Any]) -> str:
    """YAML between its two lines."""
    import yaml

    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1 << 20)
    return f"---\n{text}---\n"


def architecture_of(config: dict[str, Any]) -> str | None:
    """The class that config.json names, where it is a name."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and re.fullmatch(r"[A-Z][A-Za-z0-9]{1,80}", first) else None


def task_of(config: dict[str, Any]) -> str | None:
    """The Hub's name of what such an architecture does; None where it is not known."""
    architecture = architecture_of(config) or ""
    if architecture.endswith(_CONDITIONAL):
        if "vision_config" in config or "vision_config" in text_config(config):
            return "image-text-to-text"
        return "automatic-speech-recognition" if "num_mel_bins" in config else None
    return next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)


def _licence(source: dict[str, Any], carried: Iterable[str]) -> dict[str, Any]:
    """The source's terms, under which its quantized weights stand too; a link only where it leads somewhere."""
    value = source.get("license")
    names = list(_texts([one.lower() for one in _list(value) if isinstance(one, str)], _SLUG))
    if not names:
        return {}
    known = [name for name in names if name in LICENSES]
    fields: dict[str, Any] = {"license": "other" if known != names else names[0] if len(names) == 1 else names}
    if name := _text(source.get("license_name"), _NAME) or (", ".join(names) if known != names else None):
        fields["license_name"] = name
    link = source.get("license_link")
    if isinstance(link, str) and (_LINK.fullmatch(link) or link in carried):
        fields["license_link"] = link
    return fields


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts(value: Any, pattern: re.Pattern[str]) -> Iterable[str]:
    """One text or a list of them, those that match; each once."""
    return dict.fromkeys(text for text in _list(value)[:MAX_VALUES] if _text(text, pattern))


def _text(value: Any, pattern: re.Pattern[str]) -> str | None:
    absent = ("null", "Null", "NULL", "~", "")
    return value if isinstance(value, str) and value not in absent and pattern.fullmatch(value) else None
