"""Input energies of sources seen before: they depend on the weights alone, so every recipe and format may use them again."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import structlog

from hqq_core.energy import Energies
from hqq_core.errors import EnergyError

MEASURED_BY = ("halfquad", "torch", "transformers")  # another version may measure something else, or more

logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class EnergyCache:
    """Files below one folder, at most `limit_nbytes` together; the one that was not used for longest goes first.

    A job and the cache have one file under two names: what is thrown out here stays for those who use it.
    """

    folder: Path
    limit_nbytes: int

    def fetch(self, source: str, mode: str, target: Path) -> Energies | None:
        """The energies of the source with this fingerprint, also put at `target`; None where there are none to use."""
        kept = self._path(source, mode)
        target.unlink(missing_ok=True)
        try:
            os.utime(kept)
            target.hardlink_to(kept)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("Energies could not be looked for.", action="energies_not_fetched", reason=str(error))
            return None
        try:
            return Energies.load(target, fingerprint=source)
        except EnergyError as error:
            logger.warning("Energies were there but of no use.", action="energies_dropped", reason=str(error))
            for path in (kept, target):
                path.unlink(missing_ok=True)
            return None

    def keep(self, source: str, mode: str, file: Path) -> None:
        """Keep a job's file for others. Where that fails they measure again, and this job goes on."""
        kept = self._path(source, mode)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another worker was as quick
                kept.hardlink_to(file)
            self._shrink()
        except OSError as error:
            logger.warning("Energies could not be kept.", action="energies_not_kept", reason=str(error))

    def _path(self, source: str, mode: str) -> Path:
        key = json.dumps([source, mode, *map(_version, MEASURED_BY)])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _shrink(self) -> None:
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another worker shrinks too
                found.append((path.stat(), path))
        nbytes = 0
        for status, path in sorted(found, key=lambda pair: pair[0].st_mtime_ns, reverse=True):
            if nbytes + status.st_size > self.limit_nbytes:
                path.unlink(missing_ok=True)
            else:
                nbytes += status.st_size


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
