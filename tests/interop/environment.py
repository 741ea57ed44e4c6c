"""Environments: where each runtime lives, made on first use beside the cached models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.models import CACHE

REQUIREMENTS = Path(__file__).parent / "environments"
SCRIPTS = Path(__file__).parent / "runtimes"
HOME = CACHE.parent / "interop" / "environments"
READY = ".ready"
INSTALL_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Own:
    """This project's own environment."""

    def prepare(self) -> None:
        """It is there."""

    def run(self, script: str, *arguments: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts."""
        return _run([sys.executable, SCRIPTS / script, *arguments], Path.cwd(), timeout_s)


@dataclass(frozen=True)
class Venv:
    """A virtual environment of its own: NAME.txt with what that asks for, then NAME.apart.txt without."""

    name: str

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return HOME / self.name

    def prepare(self) -> None:
        """Install what the requirement files pin, unless they were installed as they are."""
        files = [REQUIREMENTS / f"{self.name}.txt", REQUIREMENTS / f"{self.name}.apart.txt"]
        if _is_ready(self.folder, files):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        venv.create(self.folder, with_pip=True)
        install = [self.folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        apart = ["--no-deps", "--no-build-isolation"]
        _check(_run([*install, "--upgrade", "pip"], self.folder, INSTALL_TIMEOUT_S))
        _check(_run([*install, "-r", files[0]], self.folder, INSTALL_TIMEOUT_S))
        _check(_run([*install, *apart, "-r", files[1]], self.folder, INSTALL_TIMEOUT_S))
        _set_ready(self.folder, files)

    def run(self, script: str, *arguments: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts."""
        return _run([self.folder / "bin" / "python", SCRIPTS / script, *arguments], self.folder, timeout_s)


@dataclass(frozen=True)
class Node:
    """A folder of node modules, from NAME/package.json."""

    name: str

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return HOME / self.name

    def prepare(self) -> None:
        """Install what package.json pins, unless it was installed as it is."""
        package = REQUIREMENTS / self.name / "package.json"
        if _is_ready(self.folder, [package]):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        shutil.copy(package, self.folder)
        _check(_run(["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"], self.folder, INSTALL_TIMEOUT_S))
        _set_ready(self.folder, [package])

    def run(self, script: str, *arguments: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts."""
        return _run(["node", SCRIPTS / script, *arguments], self.folder, timeout_s)


Environment = Own | Venv | Node


def _run(command: list[str | Path], folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Whatever happens; hqq would build CUDA kernels, and nothing here may ask a hub."""
    environment = os.environ | {"DISABLE_CUDA": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def _check(ended: subprocess.CompletedProcess[str]) -> None:
    if ended.returncode:
        raise RuntimeError(f"{' '.join(map(str, ended.args))}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")


def _is_ready(folder: Path, files: list[Path]) -> bool:
    mark = folder / READY
    return mark.is_file() and mark.read_text() == _contents(files)


def _set_ready(folder: Path, files: list[Path]) -> None:
    (folder / READY).write_text(_contents(files))


def _contents(files: list[Path]) -> str:
    return "\n".join(file.read_text() for file in files)
