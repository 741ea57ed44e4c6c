"""Format `metal`: what transformers 5 reads on Apple machines; exact, with float offsets.

Layout: transformers 5.23, integrations/metal_quantization.py: that of format `mlx` under other names, at fewer widths.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.formats.base import CheckpointWriter, Layout, left_alone, refuse
from hqq_core.formats.capabilities import Capabilities, Runtime
from hqq_core.formats.mlx.affine import affine, affine_layout
from hqq_core.spec import QuantSpec
from hqq_core.tensors import QuantizedTensor

PARTS = ("weight", "scales", "qbiases")


class MetalWriter(CheckpointWriter):
    """Writes each weight as weight, scales and qbiases."""

    name = "metal"
    capabilities = Capabilities(
        zeros=dict.fromkeys((2, 4, 8), ("offset",)),
        group_sizes=(32, 64, 128),
        exactness="as solved: offsets in the model's type",
        runtimes=(Runtime("transformers", "5.23", 'on a Mac not run; elsewhere dequantized, with device_map="cpu"'),),
    )

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """No mixture of experts: on a Mac, transformers has no kernel for fused ones, which a CPU could not tell."""
        if Role.EXPERT in quantized | copied:
            raise refuse(self, "format", "mixture of experts", "none")

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
            "modules_to_not_convert": left_alone(quantized, copied),
        }  # fmt: skip
        return {"quantization_config": settings}
