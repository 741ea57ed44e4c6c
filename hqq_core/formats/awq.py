"""Format `awq`, gemm: 4 bit with integer zero points, read by vLLM, SGLang, mlx-lm, and transformers with gptqmodel.

Layout: AutoAWQ's WQLinear_GEMM. Inputs along the rows; eight outputs share a word, in the order that its kernel unpacks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.formats.base import HALF_DTYPES, CheckpointWriter, Layout, refuse, refuse_unless_inner_linear
from hqq_core.packing import pack_dense
from hqq_core.recipe import Recipe
from hqq_core.safetensors_file import NAMES
from hqq_core.solver import resolve_group_size
from hqq_core.spec import QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor

GROUP_SIZES = (64, 128)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs lies in a word's 0th, 1st, ... four bits
# transformers gives these an activation with scales, which only activation-aware quantization has.
SCALED_FAMILIES = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "RefinedWebModel", "starcoder2")


class AwqWriter(CheckpointWriter):
    """Writes each weight as qweight, qzeros and scales."""

    name = "awq"

    def check(self, recipe: Recipe) -> QuantSpec:
        """4 bit with zero points, along the inputs."""
        spec = recipe.spec("int")
        if spec.nbits != 4:
            raise refuse(self, "nbits", spec.nbits, "4; format 'compressed-tensors' holds more")
        if spec.group_size not in GROUP_SIZES:
            raise refuse(
                self, "group_size", spec.group_size, f"one of {GROUP_SIZES}; format 'compressed-tensors' holds 32"
            )
        if spec.axis != 1:
            raise refuse(self, "axis", spec.axis, "1; format 'hqq' holds both")
        if spec.zero != "int":
            raise refuse(self, "zero", spec.zero, "'int'; format 'hqq' holds a float zero, 'gptq' none")
        return spec

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """Experts have other layouts, and some families want scales of activations beside the weights."""
        if Role.EXPERT in quantized | copied:
            raise refuse(self, "format", "mixture of experts", "none; formats 'hqq' and 'compressed-tensors' hold some")
        if config.get("model_type") in SCALED_FAMILIES:
            wanted = "no family that scales activations; format 'compressed-tensors' holds it"
            raise refuse(self, "format", config["model_type"], wanted)

    def tensor_spec(self, spec: QuantSpec, name: str, shape: tuple[int, ...], dtype: str) -> QuantSpec:
        """Scales in the model's own type, which readers round them to; half precision, which is all they compute in."""
        return dataclasses.replace(spec, scale_dtype=HALF_DTYPES[dtype])

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Linear layers whose outputs fill words; readers never look for another output head."""
        if reason := refuse_unless_inner_linear(role):
            return reason
        return f"{shape[0]} outputs do not fill words of 8" if shape[0] % 8 else None

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """Names, types and shapes of WQLinear_GEMM's buffers."""
        rows, columns = shape
        n_groups = columns // resolve_group_size(shape, spec)
        return [
            (f"{module}.qweight", "I32", (columns, rows // 8)),
            (f"{module}.qzeros", "I32", (n_groups, rows // 8)),
            (f"{module}.scales", NAMES[TORCH_DTYPES[spec.scale_dtype]], (n_groups, rows)),
        ]

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Codes and zero points packed along the outputs."""
        rows, columns = tensor.shape
        return {
            f"{module}.qweight": _pack(tensor.W_q.view(rows, columns)),
            f"{module}.qzeros": _pack(tensor.zero.view(rows, -1).to(torch.uint8)),
            f"{module}.scales": tensor.scale.view(rows, -1).T.contiguous(),
        }

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """As AutoAWQ writes it."""
        settings = {
            "quant_method": "awq", "version": "gemm", "bits": spec.code_bits, "group_size": spec.group_size, "zero_point": True,
            "modules_to_not_convert": sorted({"lm_head", *copied}),
        }  # fmt: skip
        return {"quantization_config": settings}


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Four bits of each: (outputs, n) -> int32 [shape=(n, outputs / 8)]."""
    eights = values.T.reshape(values.shape[1], -1, 8)  # (n, outputs / 8, 8)
    return pack_dense(eights[..., ORDER].reshape(values.shape[1], -1), 4)
