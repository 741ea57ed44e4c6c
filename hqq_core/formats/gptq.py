"""Format `gptq`, version 1: symmetric, 4 and 8 bit, read by vLLM, SGLang, and transformers with optimum and gptqmodel.

Layout: AutoGPTQ's checkpoints. Inputs along the rows, codes packed along them. Zero points are stored less one; servers take
none but the fixed middle (spec.zero "none").
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

# optimum looks for linear layers in the blocks alone: whether a family has others, only a run tells (tests/interop/gptqmodel.py).
FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")


class GptqWriter(CheckpointWriter):
    """Writes each weight as qweight, qzeros, scales and g_idx."""

    name = "gptq"
    capabilities = Capabilities(
        zeros={4: ("none",), 8: ("none",)},
        group_sizes=(32, 64, 128),
        exactness="as solved: symmetric",
        runtimes=(
            Runtime("vLLM", "0.33", "read in its source"),
            Runtime("SGLang", "0.5.23", "read in its source"),
            Runtime("transformers", "5.23", "with optimum and gptqmodel 7.7"),
        ),
    )
    scale_dtypes = HALF_DTYPES  # the model's own type is what readers round them to, half precision all they compute in

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """A config cannot name one linear layer as left alone that all readers would leave alone."""
        if config.get("model_type") not in FAMILIES:
            wanted = f"models of {', '.join(FAMILIES)}"
            raise refuse(self, "format", str(config.get("model_type")), wanted)
        if Role.LINEAR in copied:
            raise refuse(self, "format", "unquantized linear layers", "none")

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Linear layers whose outputs fill words of zero points."""
        if reason := refuse_unless_inner_linear(role):
            return reason
        per_word = 32 // spec.code_bits
        return f"{shape[0]} outputs do not fill words of {per_word}" if shape[0] % per_word else None

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """Names, types and shapes of AutoGPTQ's QuantLinear."""
        rows, columns = shape
        n_groups = columns // resolve_group_size(shape, spec)
        return [
            (f"{module}.qweight", "I32", (columns * spec.code_bits // 32, rows)),
            (f"{module}.qzeros", "I32", (n_groups, rows * spec.code_bits // 32)),
            (f"{module}.scales", NAMES[TORCH_DTYPES[spec.scale_dtype]], (n_groups, rows)),
            (f"{module}.g_idx", "I32", (columns,)),
        ]

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Codes packed along the inputs, zero points along the outputs."""
        (rows, columns), nbits = tensor.shape, tensor.spec.code_bits
        scale, zero = tensor.scale.view(rows, -1).T, tensor.zero.view(rows, -1).T
        return {
            f"{module}.qweight": pack_dense(tensor.W_q.view(rows, columns), nbits).T.contiguous(),
            f"{module}.qzeros": pack_dense((zero - 1).to(torch.uint8).contiguous(), nbits),
            f"{module}.scales": scale.contiguous(),
            f"{module}.g_idx": torch.arange(columns, dtype=torch.int32) // (columns // len(scale)),
        }

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """As GPTQModel writes it."""
        settings = {
            "quant_method": "gptq", "checkpoint_format": "gptq", "bits": spec.code_bits, "group_size": spec.group_size,
            "sym": True, "desc_act": False, "true_sequential": True, "lm_head": False,
        }  # fmt: skip
        return {"quantization_config": settings}
