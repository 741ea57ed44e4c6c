"""The tensors that are stored for one weight, and what every reader of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hqq_core.errors import VerificationError
from hqq_core.verify._matrix import Matrix
from hqq_core.verify._weights import StoredTensor, floats

FLOATS = ("F32", "F16", "BF16")


class Reader(Protocol):
    """One layout, with the settings that a config.json has for it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Last names of the tensors that are stored for a weight, all of them."""

    def read(self, module: Module) -> Matrix:
        """The weight of a module; a VerificationError names the tensor that cannot be part of one."""


@dataclass(frozen=True, slots=True)
class Module:
    """The stored tensors of one quantized module, by their last names."""

    name: str
    tensors: dict[str, StoredTensor]

    def words(self, part: str, dtype: str, *shape: int | None) -> NDArray[Any]:
        """A tensor of this type and shape, None for any size."""
        self._check(part, (dtype,), shape)
        return self.tensors[part].read()

    def floats(self, part: str, *shape: int | None) -> NDArray[np.float32]:
        """A tensor of floats and this shape as float32."""
        self._check(part, FLOATS, shape)
        return floats(self.tensors[part].read(), self.tensors[part].dtype)

    def shape(self, part: str, n_axes: int) -> tuple[int, ...]:
        """The shape of a tensor of so many axes, none of them empty."""
        shape = self.tensors[part].shape
        if len(shape) != n_axes or 0 in shape:
            raise self.wrong(part, f"shape {shape}", f"{n_axes} sizes, none of them zero")
        return shape

    def check(self, part: str, ok: bool, got: object, wanted: object) -> None:
        """A VerificationError unless `ok`."""
        if not ok:
            raise self.wrong(part, got, wanted)

    def wrong(self, part: str, got: object, wanted: object) -> VerificationError:
        """The VerificationError for one stored tensor."""
        return VerificationError(f"{self.name}.{part}", f"{got}: wanted {wanted}")

    def _check(self, part: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> None:
        tensor = self.tensors[part]
        self.check(part, tensor.dtype in dtypes, f"dtype {tensor.dtype}", " or ".join(dtypes))
        fits = len(tensor.shape) == len(shape) and all(
            want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
        )
        self.check(part, fits, f"shape {tensor.shape}", shape)
