"""CheckpointWriter: what a format says of itself and how it lays out one weight."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any, Protocol, Self

import torch

from hqq_core.architectures import QUANTIZED, Role
from hqq_core.checkpoint import Checkpoint
from hqq_core.errors import FormatError
from hqq_core.formats.container import Container, Layout, Safetensors
from hqq_core.recipe import Recipe
from hqq_core.spec import QuantSpec, ScaleDtype
from hqq_core.tensors import QuantizedTensor

__all__ = [
    "HALF_DTYPES",
    "SCALE_DTYPES",
    "CheckpointWriter",
    "Layout",
    "refuse",
    "refuse_unless_inner_linear",
    "refuse_unless_linear",
]

SCALE_DTYPES: dict[str, ScaleDtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
HALF_DTYPES: dict[str, ScaleDtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float16"}


class CheckpointWriter(Protocol):
    """One output format. It refuses early, and the same input gives the same bytes.

    A writer lays out one weight at a time; `convert` streams the weights through it, so no writer holds a model. It inherits
    safetensors files and copied tensors that stay as they are; a format that wants other files names its own `container`.
    """

    name: str
    container: Container = Safetensors()
    quantized: tuple[Role, ...] = QUANTIZED  # unless a recipe says otherwise
    typed: bool = False  # whether a recipe may name a type

    def of_recipe(self, recipe: Recipe) -> Self:
        """The writer for this recipe; another one where names or types depend on it."""
        return self

    def of_model(self, checkpoint: Checkpoint) -> Self:
        """The writer for this source; another one where names, order or files depend on its config or tokenizer."""
        return self

    def check(self, recipe: Recipe) -> QuantSpec:
        """Settings for this recipe; FormatError names what the format or its readers cannot hold, and which could."""

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """FormatError where no reader of this format takes a model with such tensors and such a config.json."""

    def tensor_spec(self, spec: QuantSpec, name: str, shape: tuple[int, ...], dtype: str) -> QuantSpec:
        """`spec` for one tensor, with scale and zero as stored beside a source of safetensors type `dtype`."""

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Why this tensor cannot be stored quantized, or None."""

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """What `encode` will return, known before any work."""

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Tensors to store for the weight of `module`."""

    def layout_copied(self, name: str, dtype: str, shape: tuple[int, ...]) -> Layout | None:
        """What `encode_copied` will return for a tensor that is not quantized; None: its bytes, which are streamed."""
        return None

    def encode_copied(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors to store for one that is not quantized, under other names, in another type or order."""
        return {name: tensor}

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """What config.json gets, by key; `copied` are the linear modules left as they were."""


def refuse(writer: CheckpointWriter, field: str, got: object, wanted: str) -> FormatError:
    """The FormatError for one setting."""
    return FormatError(field, f"{field} {reprlib.repr(got)}: format {writer.name!r} holds {wanted}")


def refuse_unless_linear(role: Role) -> str | None:
    """For a format that replaces nn.Linear and nothing else."""
    if role in (Role.LINEAR, Role.EXPERT, Role.HEAD, Role.ROUTER):
        return None
    return str(role.value)


def refuse_unless_inner_linear(role: Role) -> str | None:
    """For a format whose readers leave routers and the output head alone."""
    return None if role in (Role.LINEAR, Role.EXPERT) else str(role.value)
