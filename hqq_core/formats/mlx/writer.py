"""MlxWriter: the format by itself, and for one mix in one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Self

import torch

from hqq_core.architectures import Role, text_config
from hqq_core.checkpoint import Checkpoint
from hqq_core.errors import FormatError
from hqq_core.formats.base import CheckpointWriter, Layout, refuse, refuse_unless_linear
from hqq_core.formats.capabilities import Runtime
from hqq_core.formats.mlx.affine import affine, affine_layout
from hqq_core.formats.mlx.mixes import WIDTHS, Mix, Mixes, mixable
from hqq_core.recipe import Recipe
from hqq_core.spec import QuantSpec
from hqq_core.tensors import QuantizedTensor

PARTS = ("weight", "scales", "biases")
EXPERT_FAMILIES = ("mixtral", "olmoe", "qwen2_moe")  # each loaded by mlx-lm in our tests


class MlxWriter(CheckpointWriter):
    """Writes each weight as weight, scales and biases.

    Parameters
    ----------
    type : str, optional
        The recipe's, which names a mix.
    checkpoint : Checkpoint, optional
        The model that it is mixed in.
    """

    name = "mlx"
    capabilities = Mixes(
        zeros=dict.fromkeys((1, 2, 3, 4, 5, 6, 8), ("offset",)),
        group_sizes=(32, 64, 128),
        types=tuple(WIDTHS),
        typed_settings=("nbits",),
        exactness="as solved: offsets in the model's type",
        runtimes=(Runtime("mlx-lm", "0.32", "run on Linux"),),
        library="mlx",
    )

    def __init__(self, type: str | None = None, checkpoint: Checkpoint | None = None) -> None:
        self._type, self._checkpoint = type, checkpoint
        self._mix = Mix(*WIDTHS[type], _n_layers(checkpoint.config)) if type in WIDTHS and checkpoint else None

    def of_recipe(self, recipe: Recipe) -> Self:
        """Bound to a recipe's type."""
        return type(self)(recipe.type)

    def of_model(self, checkpoint: Checkpoint) -> Self:
        """Bound to a model, whose layers are counted where there is a mix."""
        return type(self)(self._type, checkpoint)

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """mlx-lm 0.32 stacks the experts of every family, but of some without their scales; a mix wants down projections."""
        if Role.EXPERT in quantized and config.get("model_type") not in EXPERT_FAMILIES:
            wanted = f"experts of {', '.join(EXPERT_FAMILIES)} alone"
            raise refuse(self, "format", f"experts of {config.get('model_type')}", wanted)
        if self._mix and self._checkpoint:
            names = (name for header in self._checkpoint.headers().values() for name in header)
            if not mixable(names):
                raise refuse(self, "type", self._type, "mixes for models with down_proj layers alone")

    def tensor_spec(self, spec: QuantSpec, name: str, shape: tuple[int, ...], dtype: str) -> QuantSpec:
        """The model's own type, and the width that the mix gives this tensor."""
        stored = super().tensor_spec(spec, name, shape, dtype)
        return dataclasses.replace(stored, nbits=self._mix.nbits(name)) if self._mix else stored

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Linear layers, and embeddings where they are asked for."""
        return None if role is Role.EMBEDDING else refuse_unless_linear(role)

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """Names, types and shapes of nn.QuantizedLinear's parameters."""
        return affine_layout(module, PARTS, shape, spec)

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Codes packed along the inputs."""
        return affine(module, PARTS, tensor)

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """As mlx-lm writes it, twice, with modules of another width by name; those without scales are left as they are."""
        same = {"group_size": spec.group_size, "mode": "affine"}
        widths = {module: self._mix.nbits(module) for module in quantized} if self._mix else {}
        others = {module: {**same, "bits": nbits} for module, nbits in widths.items() if nbits != spec.code_bits}
        settings = {**same, "bits": spec.code_bits, **others}
        return {"quantization": settings, "quantization_config": settings}


def _n_layers(config: dict[str, Any]) -> int:
    n_layers = text_config(config).get("num_hidden_layers")
    if not isinstance(n_layers, int) or n_layers < 1:
        raise FormatError("type", f"config.json: num_hidden_layers {n_layers!r}: wanted a number, which a mix goes by")
    return n_layers
