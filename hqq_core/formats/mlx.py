"""Format `mlx`: what MLX reads on Apple machines (mlx-lm, LM Studio); exact, with float offsets.

Layout: mlx 0.32, affine mode. Codes are a dense bit stream; w = q * scale + bias, where the bias is a stored offset -zero * scale
that the solver rounds before it chooses codes (spec.zero "offset").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.formats.base import CheckpointWriter, Layout, refuse, refuse_unless_linear
from hqq_core.formats.capabilities import Capabilities, Runtime
from hqq_core.packing import pack_dense
from hqq_core.safetensors_file import NAMES
from hqq_core.solver import resolve_group_size
from hqq_core.spec import QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor

PARTS = ("weight", "scales", "biases")
EXPERT_FAMILIES = ("mixtral", "olmoe", "qwen2_moe")  # each loaded by mlx-lm in our tests


class MlxWriter(CheckpointWriter):
    """Writes each weight as weight, scales and biases."""

    name = "mlx"
    capabilities = Capabilities(
        zeros=dict.fromkeys((1, 2, 3, 4, 5, 6, 8), ("offset",)),
        group_sizes=(32, 64, 128),
        exactness="as solved: offsets in the model's type",
        runtimes=(Runtime("mlx-lm", "0.32", "run on Linux"),),
        library="mlx",
    )

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """mlx-lm 0.32 stacks the experts of every family, but of some without their scales."""
        if Role.EXPERT in quantized and config.get("model_type") not in EXPERT_FAMILIES:
            wanted = f"experts of {', '.join(EXPERT_FAMILIES)} alone"
            raise refuse(self, "format", f"experts of {config.get('model_type')}", wanted)

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
        """As mlx-lm writes it, twice; modules without scales are left as they are."""
        settings = {"group_size": spec.group_size, "bits": spec.code_bits, "mode": "affine"}
        return {"quantization": settings, "quantization_config": settings}


def affine_layout(module: str, parts: Iterable[str], shape: tuple[int, ...], spec: QuantSpec) -> Layout:
    """Names, types and shapes of `affine`'s tensors."""
    rows, columns = shape
    weight, scales, offsets = parts
    stored, n_groups = NAMES[TORCH_DTYPES[spec.scale_dtype]], columns // resolve_group_size(shape, spec)
    return [
        (f"{module}.{weight}", "U32", (rows, columns * spec.code_bits // 32)),
        (f"{module}.{scales}", stored, (rows, n_groups)),
        (f"{module}.{offsets}", stored, (rows, n_groups)),
    ]


def affine(module: str, parts: Iterable[str], tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Codes as a dense bit stream along the inputs, scales and offsets."""
    rows, columns = tensor.shape
    weight, scales, offsets = parts
    return {
        f"{module}.{weight}": pack_dense(tensor.W_q.view(rows, columns), tensor.spec.code_bits).view(torch.uint32),
        f"{module}.{scales}": tensor.scale.view(rows, -1),
        f"{module}.{offsets}": tensor.offset.view(rows, -1),
    }
