"""Which files of a source are used, and how large they may be: by names alone, before any of them is opened or fetched.

Nothing heavy is imported here, so that whoever fetches a source can ask first.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

from hqq_core.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MAX_HEADER_NBYTES = 25_000_000  # of a safetensors file: the Hub's limit; the safetensors library takes 100 MB
MAX_JSON_NBYTES = 64_000_000  # the index of a 700B mixture of experts has 10 MB
MAX_CARRIED_NBYTES = 256_000_000
MAX_FOLDER_DEPTH = 4

CARRIED = (
    "*.json", "*.txt", "*.md", "*.model", "tokenizer.model*", "*.jinja", "*.tiktoken", "*.vocab", "*.bpe", "*.spm",
)  # fmt: skip
LEGAL = ("*LICENSE*", "*LICENCE*", "*NOTICE*", "*COPYING*", "*USE_POLICY*")  # in any case: MODEL_LICENSE, License.pdf
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


def indexed_weights(index: dict[str, Any]) -> dict[str, str]:
    """The weight map of an index: tensor name to file name, each a plain name beside the index.

    Raises
    ------
    CheckpointError
        Names the tensor, with what was got and wanted.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: weight_map is {type(weight_map).__name__}: wanted an object with entries")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{INDEX}: {tensor!r} is said to be in {name!r}: wanted a plain *.safetensors name")
    return weight_map


def single_weights(present: Iterable[str]) -> str:
    """Name of the one weight file of a folder without an index, from the names of all its files.

    Raises
    ------
    CheckpointError
        There is none, or there are several.
    """
    weights = sorted(name for name in present if name.endswith(".safetensors"))
    if SINGLE in weights:
        return SINGLE
    if len(weights) == 1 and _PLAIN_NAME.fullmatch(weights[0]):
        return weights[0]
    if weights:
        raise CheckpointError(f"{len(weights)} safetensors files and no {INDEX}: wanted {SINGLE}, or an index")
    if pickled := pickled_weights(present):
        raise CheckpointError(f"{pickled[0]}: pickled weights are never opened: wanted safetensors")
    raise CheckpointError(f"no {SINGLE} and no {INDEX} in the folder")


def pickled_weights(present: Iterable[str]) -> list[str]:
    """Names of pickled weights among those of a folder, sorted."""
    return sorted(name for name in present if _matches(name, PICKLED))


def is_carried(name: str) -> bool:
    """Whether a file of that name goes from the source to the result as it is, or has a part in it."""
    if name.endswith((".index.json", ".py", ".safetensors")):
        return False
    return _matches(name, CARRIED) or _matches(name.upper(), LEGAL)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
