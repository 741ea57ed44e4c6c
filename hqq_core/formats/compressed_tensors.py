"""Format `compressed-tensors`, pack-quantized: what vLLM, SGLang and transformers load today; integer zero points, or none.

Layout: compressed-tensors 0.20, compressors/pack_quantized. Codes and zero points are dense bit streams at any width;
compressed-tensors before 0.18 left bits of each word unused at 3, 5, 6 and 7. The zero point is solved as an integer
(spec.zero "int") or fixed (spec.zero "none"), never rounded afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.formats.base import CheckpointWriter, Layout, left_alone, refuse
from hqq_core.formats.capabilities import Capabilities, Runtime
from hqq_core.packing import pack_dense
from hqq_core.safetensors_file import NAMES
from hqq_core.solver import resolve_group_size
from hqq_core.spec import QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor

# Each loaded by transformers in our tests.
EXPERT_FAMILIES = (
    "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
)  # fmt: skip


class CompressedTensorsWriter(CheckpointWriter):
    """Writes each weight as weight_packed, weight_scale, weight_shape and, unless symmetric, weight_zero_point."""

    name = "compressed-tensors"
    capabilities = Capabilities(
        # At 8 bit symmetric unless asked: more runtimes have a kernel for it.
        zeros={**dict.fromkeys((2, 3, 4, 5, 6, 7), ("int", "none")), 8: ("none", "int")},
        group_sizes=(32, 64, 128),
        exactness="as solved: integer zero points, or symmetric",
        runtimes=(
            Runtime("transformers", "5.23", "with compressed-tensors 0.20"),
            Runtime("vLLM", "0.32", "4 bit, run on a CPU; symmetric 8 bit, read in its source"),
            Runtime("SGLang", "0.5.23", "4 bit, symmetric 8 bit; read in its source"),
        ),
    )

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """Experts as transformers 5.23 finds them: it fuses them without zero points, and where none was left unquantized."""
        if Role.EXPERT in quantized and spec.zero != "none":
            raise refuse(self, "zero", spec.zero, "experts with 'none' (symmetric) alone")
        if Role.EXPERT in copied:
            raise refuse(self, "format", "experts left unquantized", "all experts or no model")
        if Role.EXPERT in quantized and config.get("model_type") not in EXPERT_FAMILIES:
            wanted = f"experts of {', '.join(EXPERT_FAMILIES)} alone"
            raise refuse(self, "format", f"experts of {config.get('model_type')}", wanted)

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """Names, types and shapes of PackedQuantizationCompressor's parameters."""
        rows, columns = shape
        n_groups = columns // resolve_group_size(shape, spec)
        packed = [
            (f"{module}.weight_packed", "I32", (rows, math.ceil(columns * spec.code_bits / 32))),
            (f"{module}.weight_scale", NAMES[TORCH_DTYPES[spec.scale_dtype]], (rows, n_groups)),
            (f"{module}.weight_shape", "I64", (2,)),
        ]
        if spec.zero == "none":
            return packed
        return [*packed, (f"{module}.weight_zero_point", "I32", (math.ceil(rows * spec.code_bits / 32), n_groups))]

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Codes packed along the inputs, zero points along the outputs."""
        rows, columns = tensor.shape
        nbits = tensor.spec.code_bits
        packed = {
            f"{module}.weight_packed": pack_dense(tensor.W_q.view(rows, columns), nbits),
            f"{module}.weight_scale": tensor.scale.view(rows, -1),
            f"{module}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.spec.zero == "none":
            return packed
        zero = tensor.zero.view(rows, -1).to(torch.uint8)
        return packed | {f"{module}.weight_zero_point": pack_dense(zero.T.contiguous(), nbits).T.contiguous()}

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """One scheme for all linear layers; transformers needs "dequantize", others ignore it."""
        weights = {
            "num_bits": spec.code_bits, "type": "int", "symmetric": spec.zero == "none", "strategy": "group",
            "group_size": spec.group_size, "dynamic": False,
        }  # fmt: skip
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        settings = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "dequantize": True,
            "config_groups": {"group_0": scheme},
            "ignore": left_alone(quantized, copied),
        }
        return {"quantization_config": settings}
