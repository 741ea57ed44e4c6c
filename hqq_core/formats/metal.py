"""Format `metal`: what transformers 5 reads on Apple machines; exact, with float offsets.

Layout: transformers 5.23, integrations/metal_quantization.py: that of format `mlx` under other names, at fewer widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.formats.base import SCALE_DTYPES, CheckpointWriter, Layout, refuse, refuse_unless_linear
from hqq_core.formats.mlx import affine, affine_layout
from hqq_core.recipe import Recipe
from hqq_core.spec import QuantSpec
from hqq_core.tensors import QuantizedTensor

NBITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128)
PARTS = ("weight", "scales", "qbiases")


class MetalWriter(CheckpointWriter):
    """Writes each weight as weight, scales and qbiases."""

    name = "metal"

    def check(self, recipe: Recipe) -> QuantSpec:
        """What transformers takes, and its kernels on a Mac."""
        spec = recipe.spec("offset")
        if spec.nbits not in NBITS:
            raise refuse(self, "nbits", spec.nbits, f"one of {NBITS}; format 'mlx' holds more")
        if spec.group_size not in GROUP_SIZES:
            raise refuse(self, "group_size", spec.group_size, f"one of {GROUP_SIZES}; format 'hqq' holds more")
        if spec.axis != 1:
            raise refuse(self, "axis", spec.axis, "1; format 'hqq' holds both")
        if spec.zero != "offset":
            raise refuse(self, "zero", spec.zero, "'offset'; format 'hqq' holds the others")
        return spec

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """No mixture of experts: on a Mac, transformers has no kernel for fused ones, which a CPU could not tell."""
        if Role.EXPERT in quantized | copied:
            raise refuse(self, "format", "mixture of experts", "none; formats 'mlx' and 'compressed-tensors' hold some")

    def tensor_spec(self, spec: QuantSpec, name: str, shape: tuple[int, ...], dtype: str) -> QuantSpec:
        """Scales and offsets in the model's own type, which the reader casts them to."""
        return dataclasses.replace(spec, scale_dtype=SCALE_DTYPES[dtype])

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Linear layers only."""
        return refuse_unless_linear(role)

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """Names, types and shapes of MetalLinear's parameters."""
        return affine_layout(module, PARTS, shape, spec)

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Codes packed along the inputs."""
        return affine(module, PARTS, tensor)

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """As transformers writes it."""
        settings = {
            "quant_method": "metal", "bits": spec.code_bits, "group_size": spec.group_size,
            "modules_to_not_convert": sorted(copied),
        }  # fmt: skip
        return {"quantization_config": settings}
