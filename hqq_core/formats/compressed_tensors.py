"""Format `compressed-tensors`, pack-quantized: what vLLM, SGLang and transformers load today; integer zero points.

Layout: compressed-tensors 0.20, compressors/pack_quantized. Codes and zero points are dense bit streams; the zero point is solved
as an integer (spec.zero "int"), never rounded afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.formats.base import SCALE_DTYPES, Layout, refuse, refuse_unless_linear
from hqq_core.packing import pack_dense
from hqq_core.recipe import Recipe
from hqq_core.safetensors_file import NAMES
from hqq_core.solver import resolve_group_size
from hqq_core.spec import QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor

GROUP_SIZES = (32, 64, 128)


class CompressedTensorsWriter:
    """Writes each weight as weight_packed, weight_scale, weight_zero_point and weight_shape."""

    name = "compressed-tensors"

    def check(self, recipe: Recipe) -> QuantSpec:
        """4 bit, asymmetric, along the inputs: what every runtime that reads the format has a kernel for."""
        spec = recipe.spec("int")
        if spec.nbits != 4:
            raise refuse(self, "nbits", spec.nbits, "4; format 'hqq' holds all")
        if spec.group_size not in GROUP_SIZES:
            raise refuse(self, "group_size", spec.group_size, f"one of {GROUP_SIZES}; format 'hqq' holds more")
        if spec.axis != 1:
            raise refuse(self, "axis", spec.axis, "1; format 'hqq' holds both")
        if spec.zero != "int":
            raise refuse(self, "zero", spec.zero, "'int'; format 'hqq' holds a float zero")
        return spec

    def check_model(self, roles: set[Role], config: dict[str, Any]) -> None:
        """No mixture of experts: transformers 5.23 fuses the experts of such a folder, and drops or misses their weights."""
        if Role.EXPERT in roles:
            raise refuse(self, "format", "mixture of experts", "no experts with zero points; format 'hqq' holds them")

    def tensor_spec(self, spec: QuantSpec, dtype: str) -> QuantSpec:
        """Scales in the model's own type, which the kernels insist on."""
        return dataclasses.replace(spec, scale_dtype=SCALE_DTYPES[dtype])

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Linear layers only."""
        return refuse_unless_linear(role)

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """Names, types and shapes of PackedQuantizationCompressor's parameters."""
        rows, columns = shape
        n_groups = columns // resolve_group_size(shape, spec)
        return [
            (f"{module}.weight_packed", "I32", (rows, math.ceil(columns * spec.code_bits / 32))),
            (f"{module}.weight_scale", NAMES[TORCH_DTYPES[spec.scale_dtype]], (rows, n_groups)),
            (f"{module}.weight_zero_point", "I32", (math.ceil(rows * spec.code_bits / 32), n_groups)),
            (f"{module}.weight_shape", "I64", (2,)),
        ]

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Codes packed along the inputs, zero points along the outputs."""
        rows, columns = tensor.shape
        nbits = tensor.spec.code_bits
        zero = tensor.zero.view(rows, -1).to(torch.uint8)
        return {
            f"{module}.weight_packed": pack_dense(tensor.W_q.view(rows, columns), nbits),
            f"{module}.weight_scale": tensor.scale.view(rows, -1),
            f"{module}.weight_zero_point": pack_dense(zero.T.contiguous(), nbits).T.contiguous(),
            f"{module}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """One scheme for all linear layers; transformers needs "dequantize", others ignore it."""
        weights = {
            "num_bits": spec.code_bits, "type": "int", "symmetric": False, "strategy": "group",
            "group_size": spec.group_size, "dynamic": False,
        }  # fmt: skip
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        settings = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "dequantize": True,
            "config_groups": {"group_0": scheme},
            "ignore": sorted({"lm_head", *copied}),
        }
        return {"quantization_config": settings}
