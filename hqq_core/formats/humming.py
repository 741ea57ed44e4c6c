"""Format `humming`: real zeros in vLLM and SGLang, on CUDA; written as their source has it, and not run.

Layout: humming-kernels 0.1.19, schema/humming.py (HummingWeightSchema with `is_fp_zero_point`) and pack_weight.cuh; config:
vLLM 0.32, quantization/humming.py. Codes are a dense bit stream along the inputs; w = (q - zero) * scale. The config's long names
matter: `dtype` and `group_size` would be taken for settings of activations too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.formats.base import HALF_DTYPES, CheckpointWriter, Layout, left_alone, refuse, refuse_unless_inner_linear
from hqq_core.formats.capabilities import Capabilities, Runtime
from hqq_core.packing import pack_dense
from hqq_core.safetensors_file import NAMES
from hqq_core.solver import resolve_group_size
from hqq_core.spec import QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor


class HummingWriter(CheckpointWriter):
    """Writes each weight as weight, weight_scale and zero_point."""

    name = "humming"
    capabilities = Capabilities(
        zeros=dict.fromkeys((2, 3, 4, 5, 6, 7, 8), ("float",)),
        group_sizes=(32, 64, 128),
        exactness="as solved: real zeros in half precision",
        runtimes=(
            Runtime("vLLM", "0.32", "on CUDA, with humming-kernels 0.1.19; read in its source"),
            Runtime("SGLang", "0.5.23", "on CUDA; by its registry"),
        ),
        experimental=True,
        library="vllm",
    )
    scale_dtypes = HALF_DTYPES  # all that the kernels compute in

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """All inner linear layers or none: readers fuse some, and leave alone whatever has an ignored name within its own."""
        if Role.EXPERT in quantized | copied:
            raise refuse(self, "format", "mixture of experts", "none")
        if Role.LINEAR in copied:
            raise refuse(self, "format", "unquantized linear layers", "none")

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Linear layers; readers never look for another output head."""
        return refuse_unless_inner_linear(role)

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """Names, types and shapes of HummingWeightSchema.get_tensors_attrs."""
        rows, columns = shape
        stored, side = NAMES[TORCH_DTYPES[spec.scale_dtype]], (rows, columns // resolve_group_size(shape, spec))
        return [
            (f"{module}.weight", "I32", (rows, columns * spec.code_bits // 32)),
            (f"{module}.weight_scale", stored, side),
            (f"{module}.zero_point", stored, side),
        ]

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Codes packed along the inputs, zeros as they are."""
        rows, columns = tensor.shape
        return {
            f"{module}.weight": pack_dense(tensor.W_q.view(rows, columns), tensor.spec.code_bits),
            f"{module}.weight_scale": tensor.scale.view(rows, -1),
            f"{module}.zero_point": tensor.zero.view(rows, -1),
        }

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """HummingWeightSchema's fields, and what to leave alone."""
        settings = {
            "quant_method": "humming", "b_dtype": f"uint{spec.code_bits}", "weight_scale_group_size": spec.group_size,
            "has_zero_point": True, "is_fp_zero_point": True, "ignore": left_alone(quantized, copied),
        }  # fmt: skip
        return {"quantization_config": settings}
