"""The card at the root of a repository that has several results, in a folder each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hqq_core.card._card import megabytes
from hqq_core.card._markdown import code, fenced, plain, table
from hqq_core.card._metadata import front_matter_of
from hqq_core.card._usage import Place
from hqq_core.checkpoint import MANIFEST, README
from hqq_core.provenance import Provenance
from hqq_core.results import Manifest
from hqq_core.source_card import front_matter_in


def card_of_several(output: Path, folders: Sequence[str], *, repo_id: str | None = None) -> bytes:
    """README.md for what holds the folders of several recipes of one job; each has a card of its own.

    Parameters
    ----------
    output : Path
        Holds `folders`, each of them finished.
    folders : sequence of str
        As `outputs.output_folders` names them.
    repo_id : str, optional
        As in `card_of`.

    Raises
    ------
    SpecError
        A repo_id that is none.
    """
    manifests = {
        folder: Manifest.from_dict(json.loads((output / folder / MANIFEST).read_bytes())) for folder in folders
    }
    cards = [front_matter_in((output / folder / README).read_bytes()) for folder in folders]
    origin = manifests[folders[0]].provenance or Provenance()
    place = Place(repo_id, folders[0])
    parts = [
        front_matter_of(_joined(cards)).rstrip(),
        f"# {plain(origin.name)}, quantized",
        f"{code(origin.repo_id or origin.folder or 'A local folder')} quantized by Halfquad in {len(folders)} ways, in a folder "
        "each. Each folder's own card says how to load it, and what it cost, layer by layer.",
        table(
            ("folder", "format", "source", "result", "bits per weight", "relative error"),
            (_row(folder, manifest) for folder, manifest in manifests.items()),
        ),
    ]
    if place.download:
        parts.append(f"One of them, to load from where it then lies:\n\n{fenced('sh', place.download)}")
    parts.append(f"All of them read again and checked:\n\n{fenced('sh', f'halfquad verify {repo_id or chr(46)}')}")
    return ("\n\n".join(parts) + "\n").encode(errors="replace")


def _joined(cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all cards say alike, and the tags of any."""
    same = {key: value for key, value in cards[0].items() if all(card.get(key) == value for card in cards)}
    return same | {"tags": list(dict.fromkeys(tag for card in cards for tag in card["tags"]))}


def _row(folder: str, manifest: Manifest) -> tuple[str, ...]:
    found, recipe = manifest.metrics, (manifest.provenance.recipe if manifest.provenance else None) or {}
    sizes = (megabytes(found[key]) for key in ("nbytes_in", "nbytes_out"))
    error = found["relative_error"]
    return (
        f"[{folder}]({folder}/{README})",
        code(recipe.get("format", "?")),
        *sizes,
        f"{found['bits_per_weight']:.2f}",
        "–" if error is None else f"{error:.4f}",
    )
