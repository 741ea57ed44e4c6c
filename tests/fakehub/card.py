"""A model card's metadata, and what the Hub refuses or warns about in it.

The rules are those of the Hub's documentation of model cards (hf.co/docs/hub/model-cards) as far as they are known; what they
do not name may hold anything, as it may at the Hub.
"""

import re
from pathlib import Path
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")
LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]+)*|code|multilingual")
LIST_FIELDS = ("tags", "datasets", "metrics", "base_model", "language", "new_version")
RELATIONS = ("adapter", "merge", "quantized", "finetune")
LICENSES = frozenset(
    (Path(__file__).parent / "licenses.txt").read_text().split()
)  # hf.co/docs/hub/repositories-licenses


def read_card(text: str) -> dict[str, Any]:
    """The metadata of a card; nothing where there is none or it cannot be read."""
    try:
        metadata = _front_matter(text)
    except yaml.YAMLError:
        return {}
    return {key: _plain(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors, for which the Hub refuses a card, and warnings."""
    try:
        metadata = _front_matter(text)
    except yaml.YAMLError as error:
        return [f"YAML metadata is invalid: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ['"value" must be of type object'], []
    return _errors(metadata), []


def _front_matter(text: str) -> Any:
    found = FRONT_MATTER.match(text)
    return yaml.safe_load(found[1]) if found else None


def _errors(metadata: dict[Any, Any]) -> list[str]:
    errors = [f'"{key}" must be a string' for key in metadata if not isinstance(key, str)]
    texts = ("library_name", "pipeline_tag", "license_name", "license_link", "thumbnail")
    errors += [f'"{name}" must be a string' for name in texts if not isinstance(metadata.get(name, ""), str)]
    for field in LIST_FIELDS:
        errors += _list_errors(field, metadata.get(field))
    errors += _license_errors(metadata)
    errors += _pattern_errors(
        metadata, ("base_model", "datasets", "new_version"), REPO_ID, "Use an id from https://hf.co"
    )
    errors += _pattern_errors(metadata, ("language",), LANGUAGE, "It must be an ISO 639-1, 639-2 or 639-3 code")
    if metadata.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    if "model-index" in metadata:
        errors += _index_errors(metadata["model-index"])
    return errors


def _list_errors(field: str, value: object) -> list[str]:
    if value is None or (isinstance(value, str) and field != "tags"):
        return []
    if not isinstance(value, list):
        return [f'"{field}" must be an array']
    return [f'"{field}[{index}]" must be a string' for index, each in enumerate(value) if not isinstance(each, str)]


def _license_errors(metadata: dict[Any, Any]) -> list[str]:
    value = metadata.get("license")
    names = value if isinstance(value, list) else [value] if value is not None else []
    return [f'"license" must be one of the identifiers in hf.co/docs/hub/repositories-licenses, not "{name}"'
            for name in names if name not in LICENSES]  # fmt: skip


def _pattern_errors(
    metadata: dict[Any, Any], fields: tuple[str, ...], pattern: re.Pattern[str], hint: str
) -> list[str]:
    errors = []
    for field in fields:
        value = metadata.get(field)
        texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
        errors += [
            f'"{field}" with value "{each}" is not valid. {hint}' for each in texts if not pattern.fullmatch(each)
        ]
    return errors


def _index_errors(index: object) -> list[str]:
    """model-index: a list of models, each with a name and results, each of those with a task, a dataset and metrics."""
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for number, model in enumerate(index):
        where = f"model-index[{number}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"{where}.name" is required')
            continue
        for position, result in enumerate(model.get("results") or []):
            missing = {"task", "dataset", "metrics"} - set(result)
            errors += [f'"{where}.results[{position}].{name}" is required' for name in sorted(missing)]
    return errors


def _plain(value: Any) -> Any:
    """What YAML reads beyond JSON (dates), as text."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
