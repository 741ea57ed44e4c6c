"""Input energy: h_j = E[x_j^2], the mean square of what each column of a weight is multiplied with. No data is needed.

Three sources, named per tensor in plan and report:

- `synthetic`: random token ids through transformers' own classes (extra: `evaluate`), on the original weights. Weights stay on
  disk: a torch function that touches one reads it, and it is gone when the function returns, so memory holds one weight and the
  activations, however large the model.
- `analytic`: from the weights alone, where `_families` knows what feeds what; the normalised hidden state is taken for white.
- `none`: h = 1.

Beside them stand the folds: factors of columns that cancel against norms and against the rows of products before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

from hqq_core.architectures import QUANTIZED, Role, role
from hqq_core.checkpoint import Checkpoint
from hqq_core.energy._analytic import analytic
from hqq_core.energy._correlations import Correlations
from hqq_core.energy._energies import PARTS, Energies
from hqq_core.energy._folds import Fold, fold
from hqq_core.energy._progress import Progress
from hqq_core.energy._synthetic import EXPONENT, N_TOKENS, SEED, Passed, synthetic
from hqq_core.errors import EnergyError
from hqq_core.recipe import EnergyMode

__all__ = [
    "PARTS",
    "Correlations",
    "Energies",
    "Fold",
    "Passed",
    "analytic",
    "fingerprint",
    "fold",
    "profile",
    "synthetic",
]

VERSION = 2  # of how energies are computed: another number, another fingerprint


def profile(
    checkpoint: Checkpoint,
    mode: EnergyMode = "auto",
    *,
    correlations: Path | None = None,
    passed: Passed | None = None,
    progress: Progress | None = None,
) -> Energies:
    """Input energies of a checkpoint the way a recipe asks for them, and what may be folded.

    Parameters
    ----------
    checkpoint : Checkpoint
    mode : {"auto", "synthetic", "analytic", "none"}
        "auto" falls back from synthetic to analytic, tensor by tensor; the others give what they name or nothing.
    correlations : Path, optional
        A file for correlations between inputs, which synthetic energies come with; the result reads them from there.
    passed : callable, optional
        As in `synthetic`.
    progress : callable, optional
        Gets the source bytes read so far, at most all of them; what it raises stops the work.

    Returns
    -------
    Energies
        With a note where a better source was not to be had.

    Raises
    ------
    EnergyError
        Synthetic energies were asked for and cannot be had.
    """
    if mode == "none":
        return Energies({}, {})
    progress = _bounded(checkpoint, progress) if progress else None
    try:
        energies = _energies(checkpoint, mode, correlations, passed, progress)
        return dataclasses.replace(energies, folds=fold(checkpoint, progress=progress))
    except BaseException:
        if correlations:
            correlations.unlink(missing_ok=True)
        raise


def _energies(
    checkpoint: Checkpoint,
    mode: EnergyMode,
    correlations: Path | None,
    passed: Passed | None,
    progress: Progress | None,
) -> Energies:
    if mode == "analytic":
        return analytic(checkpoint, progress=progress)
    try:
        measured = synthetic(checkpoint, correlations=correlations, passed=passed, progress=progress)
    except EnergyError as error:
        if mode == "synthetic":
            raise
        measured = Energies({}, {}, f"no synthetic energies: {error}")
    if mode == "synthetic" or not _unmeasured(checkpoint, measured):
        return measured
    return measured.merge(analytic(checkpoint, known=measured.vectors.keys(), progress=progress))


def fingerprint(checkpoint: Checkpoint, revision: str | None = None, *, progress: Progress | None = None) -> str:
    """Hex SHA-256 that energies are cached by: other weights, another config or another way of computing give another.

    Parameters
    ----------
    checkpoint : Checkpoint
    revision : str, optional
        What pins the weights, such as the commit of a Hub repo. Without it every byte of them is read and hashed.
    progress : callable, optional
        Gets the bytes hashed so far; what it raises stops the work.
    """
    digest, nbytes = hashlib.sha256(), 0

    def add(*values: object) -> None:
        digest.update(json.dumps(values, sort_keys=True).encode() + b"\n")

    add(VERSION, N_TOKENS, SEED, EXPONENT, revision, checkpoint.config)
    with ExitStack() as files:
        readers = [files.enter_context(checkpoint.shard(file)) for file in checkpoint.files]
        homes = {name: reader for reader in readers for name in reader.entries}
        for name, reader in sorted(homes.items(), key=lambda item: item[0]):
            entry = reader.entries[name]
            add(name, entry.dtype, entry.shape)
            for piece in reader.pieces(name) if revision is None else ():
                digest.update(piece)
                nbytes += len(piece)
                if progress:
                    progress(nbytes)
    return digest.hexdigest()


def _bounded(checkpoint: Checkpoint, progress: Progress) -> Progress:
    """`progress` that never goes back nor beyond the whole: two passes and experts shown more tokens read weights again."""
    whole = sum(entry.nbytes for entries in checkpoint.headers().values() for entry in entries.values())
    most = 0

    def bounded(nbytes: int) -> None:
        nonlocal most
        most = min(max(most, nbytes), whole)
        progress(most)

    return bounded


def _unmeasured(checkpoint: Checkpoint, energies: Energies) -> bool:
    """Whether some weight that is multiplied has no energy yet."""
    entries = [entry for header in checkpoint.headers().values() for entry in header.values()]
    multiplied = (*QUANTIZED, Role.CONV1D, Role.HEAD)
    return any(
        entry.name not in energies.vectors and role(entry.name, entry.shape, checkpoint.config) in multiplied
        for entry in entries
    )
