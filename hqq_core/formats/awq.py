"""Format `awq`, gemm: 4 bit with integer zero points, read by vLLM, SGLang, mlx-lm, and transformers with gptqmodel.

Layout: AutoAWQ's WQLinear_GEMM. Inputs along the rows; eight outputs share a word, in the order that its kernel unpacks them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.formats.base import HALF_DTYPES, CheckpointWriter, Layout, refuse, refuse_unless_inner_linear
from hqq_core.formats.capabilities import Capabilities, Runtime
from hqq_core.packing import pack_dense
from hqq_core.safetensors_file import NAMES
from hqq_core.solver import resolve_group_size
from hqq_core.spec import QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs lies in a word's 0th, 1st, ... four bits
# transformers gives these an activation with scales, which only activation-aware quantization has.
SCALED_FAMILIES = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "RefinedWebModel", "starcoder2")


class AwqWriter(CheckpointWriter):
    """Writes each weight as qweight, qzeros and scales."""

    name = "awq"
    capabilities = Capabilities(
        zeros={4: ("int",)},
        group_sizes=(64, 128),
        exactness="as solved: integer zero points",
        runtimes=(
            Runtime("vLLM", "0.32", "run on a CPU"),
            Runtime("SGLang", "0.5.23", "read in its source"),
            Runtime("mlx-lm", "0.32"),
            Runtime("transformers", "5.23", "with gptqmodel 7.7"),
        ),
    )
    scale_dtypes = HALF_DTYPES  # the model's own type is what readers round them to, half precision all they compute in

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """Experts have other layouts, and some families want scales of activations beside the weights."""
        if Role.EXPERT in quantized | copied:
            raise refuse(self, "format", "mixture of experts", "none")
        if config.get("model_type") in SCALED_FAMILIES:
            raise refuse(self, "format", config["model_type"], "no family that scales activations")

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
