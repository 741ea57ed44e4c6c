"""The tensors of a result, as who loads its format looks for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hqq_core.checkpoint import CONFIG, INDEX, SINGLE
from hqq_core.errors import VerificationError
from hqq_core.verify._check import Count, check_copied, check_quantized
from hqq_core.verify._expected import Expected, read_json
from hqq_core.verify._matrix import Matrix
from hqq_core.verify._source import Source
from hqq_core.verify._weights import StoredTensor, read_tensors
from hqq_core.verify.readers import Module, Reader, left_alone, reader_of

WEIGHTS = ".safetensors"


class Result(Protocol):
    """Gives what each tensor of the source became; each once, so that what is left is what nobody expects."""

    def weight(self, tensor: Expected) -> Callable[[], Matrix]:
        """A quantized one, to be read when its turn comes."""

    def copied(self, tensor: Expected, source: Source | None) -> Callable[[Count], None]:
        """The check of one that was not quantized."""

    def check_all_taken(self) -> None:
        """A VerificationError where a tensor is left."""


def tensor_checks(
    expected: list[Expected], result: Result, source: Source | None, held: Collection[str] = ()
) -> list[Callable[[Count], float | None]]:
    """One check for each tensor of the source that is not in `held`; all that is stored belongs to one of them."""
    checks: list[Callable[[Count], float | None]] = []
    for tensor in expected:
        if tensor.quantized:
            check: Callable[[Count], float | None] = functools.partial(
                check_quantized, result.weight(tensor), tensor, source
            )
        else:
            check = result.copied(tensor, source)
        if tensor.name not in held:
            checks.append(check)
    result.check_all_taken()
    return checks


@dataclass(frozen=True, slots=True)
class SafetensorsResult:
    """Safetensors files, and an index where there are several.

    Parameters
    ----------
    left : dict of str to StoredTensor
        What has not been taken yet.
    reader : Reader
    left_alone : frozenset of str
        Modules that the config tells readers not to look for.
    """

    left: dict[str, StoredTensor]
    reader: Reader
    left_alone: frozenset[str]

    @classmethod
    def of(cls, folder: Path, files: dict[str, Path], config: dict[str, Any]) -> SafetensorsResult:
        """From the weight files among `files`, which must be all that there are in the folder."""
        for path in folder.glob(f"*{WEIGHTS}"):
            if path.name not in files:
                raise VerificationError(path.name, "weights that the manifest does not have: readers may load them")
        result = cls.of_files((path for name, path in files.items() if name.endswith(WEIGHTS)), config)
        _check_index(result.left, files)
        return result

    @classmethod
    def of_files(cls, paths: Iterable[Path], config: dict[str, Any]) -> SafetensorsResult:
        """From these files alone."""
        stored: dict[str, StoredTensor] = {}
        for path in sorted(paths):
            for tensor in read_tensors(path).values():
                if tensor.name in stored:
                    raise VerificationError(tensor.name, f"in {path.name} and in {stored[tensor.name].path.name}")
                stored[tensor.name] = tensor
        return cls(stored, reader_of(config), left_alone(config))

    def weight(self, tensor: Expected) -> Callable[[], Matrix]:
        """All tensors of its module that a reader of the format wants."""
        names = tensor.module.split(".")
        if not self.left_alone.isdisjoint(".".join(names[i:]) for i in range(len(names))):
            raise VerificationError(tensor.name, f"quantized: {CONFIG} tells readers to leave it alone")
        found = {part: self._take(f"{tensor.module}.{part}") for part in self.reader.parts}
        return functools.partial(self.reader.read, Module(tensor.module, found))

    def copied(self, tensor: Expected, source: Source | None) -> Callable[[Count], None]:
        """Under its own name."""
        return functools.partial(check_copied, self._take(tensor.name), tensor, source)

    def check_all_taken(self) -> None:
        """Names the first one that is left."""
        if self.left:
            name = min(self.left)
            raise VerificationError(name, f"in {self.left[name].path.name}: no tensor of the source becomes it")

    def _take(self, name: str) -> StoredTensor:
        if name not in self.left:
            raise VerificationError(name, "not in the weight files")
        return self.left.pop(name)


def _check_index(stored: dict[str, StoredTensor], files: dict[str, Path]) -> None:
    """Tensors are where readers look for them."""
    found = {name: tensor.path.name for name, tensor in stored.items()}
    wanted = read_json(files[INDEX]).get("weight_map") if INDEX in files else dict.fromkeys(found, SINGLE)
    if found != wanted:
        places = wanted if isinstance(wanted, dict) else {}
        name = min(name for name in found.keys() | places.keys() if found.get(name) != places.get(name))
        raise VerificationError(name, f"in {found.get(name)}: readers look for it in {places.get(name)}")
