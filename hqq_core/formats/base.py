"""CheckpointWriter: what a format says of itself and how it lays out one weight."""

from __future__ import annotations

import dataclasses
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch

from hqq_core.architectures import QUANTIZED, Role
from hqq_core.checkpoint import Checkpoint
from hqq_core.errors import FormatError
from hqq_core.formats.capabilities import Capabilities
from hqq_core.formats.container import Container, Layout, Safetensors
from hqq_core.recipe import Recipe
from hqq_core.solver import quantize
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


class CheckpointWriter(ABC):
    """One output format. It refuses early, and the same input gives the same bytes.

    A writer lays out one weight at a time; `convert` streams the weights through it, so no writer holds a model. It inherits
    safetensors files and copied tensors that stay as they are; a format that wants other files names its own `container`.

    Parameters
    ----------
    name : str
        What a recipe calls it.
    capabilities : Capabilities
        The settings that it holds.
    scale_dtypes : mapping of str to str
        By the source's safetensors type, what scale and zero are stored as: the model's own type unless said.
    quantized : tuple of Role
        What is quantized unless a recipe says otherwise.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    scale_dtypes: ClassVar[Mapping[str, ScaleDtype]] = SCALE_DTYPES
    quantized: ClassVar[tuple[Role, ...]] = QUANTIZED

    @property
    def container(self) -> Container:
        """What its files are."""
        return Safetensors()

    def of_recipe(self, recipe: Recipe) -> Self:
        """The writer for this recipe; another one where names or types depend on it."""
        return self

    def of_model(self, checkpoint: Checkpoint) -> Self:
        """The writer for this source; another one where names, order or files depend on its config or tokenizer."""
        return self

    def check_model(  # noqa: B027
        self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]
    ) -> None:
        """FormatError where no reader of this format takes a model with such tensors and such a config.json."""

    def tensor_spec(self, spec: QuantSpec, name: str, shape: tuple[int, ...], dtype: str) -> QuantSpec:
        """`spec` for one tensor, with scale and zero as stored beside a source of safetensors type `dtype`."""
        return dataclasses.replace(spec, scale_dtype=self.scale_dtypes[dtype])

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Why this tensor cannot be stored quantized, or None; unless a format knows better, linear layers can."""
        return refuse_unless_linear(role)

    def solve(self, W: torch.Tensor, spec: QuantSpec, **settings: Any) -> QuantizedTensor:
        """What is stored for one weight; `settings` are those of `solver.quantize`."""
        return quantize(W, spec, **settings)

    @abstractmethod
    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """What `encode` will return, known before any work."""

    @abstractmethod
    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Tensors to store for the weight of `module`."""

    def layout_copied(self, name: str, dtype: str, shape: tuple[int, ...]) -> Layout | None:
        """What `encode_copied` will return for a tensor that is not quantized; None: its bytes, which are streamed."""
        return None

    def encode_copied(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors to store for one that is not quantized, under other names, in another type or order."""
        return {name: tensor}

    @abstractmethod
    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """What config.json gets, by key; `copied` are the linear modules left as they were."""


def refuse(writer: CheckpointWriter, field: str, got: object, wanted: str) -> FormatError:
    """The FormatError for one setting."""
    return FormatError(field, f"{field} {reprlib.repr(got)}: format {writer.name!r} holds {wanted}")


def left_alone(quantized: Iterable[str], copied: Iterable[str]) -> list[str]:
    """Modules that a reader is told to leave alone: those copied, and a tied output head, which the files do not have."""
    return sorted({"lm_head", *copied} - set(quantized))


def refuse_unless_linear(role: Role) -> str | None:
    """For a format that replaces nn.Linear and nothing else."""
    if role in (Role.LINEAR, Role.EXPERT, Role.HEAD, Role.ROUTER):
        return None
    return str(role.value)


def refuse_unless_inner_linear(role: Role) -> str | None:
    """For a format whose readers leave routers and the output head alone."""
    return None if role in (Role.LINEAR, Role.EXPERT) else str(role.value)
