"""Energies: a vector per weight, where it comes from, the folds found beside it, and the file they are kept in."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hqq_core.energy._correlations import Correlations
from hqq_core.energy._folds import Fold
from hqq_core.errors import EnergyError
from hqq_core.safetensors_file import NAMES, build_header, read_header, write_file

SOURCES = frozenset({"synthetic", "analytic"})
PARTS = ("columns", "rows", "values")  # of a Fold


@dataclass(frozen=True, slots=True)
class Energies:
    """Input energies of a checkpoint's weights.

    Parameters
    ----------
    vectors : dict of str to Tensor [shape=(in_features,) or (n_experts, in_features)], float32
        By tensor name; what is missing has h = 1.
    sources : dict of str to str
        "synthetic" or "analytic", for each of `vectors`.
    note : str
        Why a better source was not to be had; empty where it was.
    folds : tuple of Fold
        What may be folded; the vectors are those of the weights before.
    correlations : Correlations or None
        Where those between inputs are, if they were measured.
    """

    vectors: dict[str, torch.Tensor]
    sources: dict[str, str]
    note: str = ""
    folds: tuple[Fold, ...] = ()
    correlations: Correlations | None = None

    def source(self, name: str) -> str:
        """Where the energy of a tensor comes from."""
        return self.sources.get(name, "none")

    def merge(self, other: Energies) -> Energies:
        """These, and from `other` what is missing here; the notes of both."""
        notes = dict.fromkeys(note for note in (self.note, other.note) if note)
        vectors, sources = other.vectors | self.vectors, other.sources | self.sources
        return Energies(vectors, sources, "; ".join(notes), self.folds or other.folds, self.correlations)

    def save(self, path: Path, fingerprint: str = "") -> None:
        """Write one safetensors file; what linears that share an input have in common stands there once."""
        homes: dict[tuple[torch.Size, bytes], str] = {}
        entries = {
            name: (homes.setdefault((vector.shape, vector.numpy().tobytes()), name), self.sources[name])
            for name, vector in sorted(self.vectors.items())
        }
        places = self.correlations.places if self.correlations else {}
        first = {place: name for name, place in sorted(places.items(), reverse=True)}
        metadata = {
            "fingerprint": fingerprint, "note": self.note, "energies": json.dumps(entries),
            "folds": json.dumps([{part: sorted(getattr(fold, part)) for part in PARTS} for fold in self.folds]),
            "correlations": json.dumps({name: first[place] for name, place in sorted(places.items())}),
        }  # fmt: skip
        tensors = {_key("energy", name): self.vectors[name] for name in homes.values()}
        for fold, part in itertools.product(self.folds, PARTS):
            tensors |= {_key(part, name): tensor for name, tensor in getattr(fold, part).items()}
        correlated = {_key("correlation", name): name for name in first.values()}
        layout = [(key, NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()]
        layout += [(key, "I8", 2 * (places[name][1],)) for key, name in correlated.items()]
        header, written = build_header(layout, metadata)

        def bytes_of(key: str) -> memoryview:  # correlations are read when their turn comes: all of them fill no memory
            if self.correlations and key in correlated:
                return _bytes(self.correlations.read(correlated[key]))
            return _bytes(tensors[key])

        write_file(path, itertools.chain([header], map(bytes_of, written)))

    @classmethod
    def load(cls, path: Path, names: Iterable[str] | None = None, fingerprint: str | None = None) -> Energies:
        """Read what `save` wrote, all or only `names`.

        Raises
        ------
        EnergyError
            The file belongs to another checkpoint than `fingerprint` says, or is none of ours.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                entries: dict[str, list[str]] = json.loads(metadata["energies"])
                only = None if names is None else set(names)
                wanted = entries.keys() if only is None else entries.keys() & only
                found = metadata["fingerprint"]
                if fingerprint is not None and found != fingerprint:
                    raise EnergyError(f"{path.name}: energies of {found[:12]}: wanted {fingerprint[:12]}")
                homes = {home: file.get_tensor(_key("energy", home)) for home in {entries[name][0] for name in wanted}}
                folds = tuple(_fold(fold, file, only) for fold in json.loads(metadata["folds"]))
                listed: dict[str, str] = json.loads(metadata["correlations"])
                shared = {name: home for name, home in listed.items() if only is None or name in only}
                note = metadata["note"]
                correlations = _correlations(path, shared) if shared else None
                if not {entries[name][1] for name in wanted} <= SOURCES:
                    raise ValueError(f"sources other than {', '.join(sorted(SOURCES))}")
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise EnergyError(f"{path.name}: no file of energies: {type(error).__name__}: {error}") from error
        return cls(
            {name: homes[home] for name, (home, _) in entries.items() if name in wanted},
            {name: source for name, (_, source) in entries.items() if name in wanted},
            note,
            folds,
            correlations,
        )


def _correlations(path: Path, shared: dict[str, str]) -> Correlations:
    with path.open("rb") as file:
        entries = read_header(file.fileno(), path.name)
    homes = {home: entries[_key("correlation", home)] for home in shared.values()}
    return Correlations(path, {name: (homes[home].begin, homes[home].shape[0]) for name, home in shared.items()})


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy().data)


def _key(part: str, name: str) -> str:
    """What a vector is called in the file."""
    return f"{part} {name}"


def _fold(listed: dict[str, list[str]], file: Any, wanted: set[str] | None) -> Fold:
    """A fold, or what it does to some tensors."""
    parts = (
        {name: file.get_tensor(_key(part, name)) for name in listed[part] if wanted is None or name in wanted}
        for part in PARTS
    )
    return Fold(*parts)
