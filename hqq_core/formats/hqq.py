"""Format `hqq`: what the hqq library and transformers 4 read; exact, with float zeros.

Layout: hqq 0.2.8, hqq/core/quantize.py (HQQLinear.state_dict) and hqq/core/bitpack.py, encoded for safetensors. transformers 5
loads such a folder without an error and with random weights: it is for hqq and for transformers < 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.formats.base import HALF_DTYPES, CheckpointWriter, Layout, left_alone, refuse_unless_linear
from hqq_core.formats.capabilities import Capabilities, Runtime
from hqq_core.packing import STRIDED_PER_WORD, pack_strided
from hqq_core.safetensors_file import DTYPES, NAMES
from hqq_core.solver import resolve_group_size
from hqq_core.spec import QuantSpec
from hqq_core.tensors import QuantizedTensor

_PACKING = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


class HqqWriter(CheckpointWriter):
    """Writes each weight as HQQLinear's safetensors state dict."""

    name = "hqq"
    capabilities = Capabilities(
        zeros=dict.fromkeys((1, 1.58, 2, 3, 4, 5, 6, 8), ("float", "int", "none")),
        group_multiple=8,
        whole_channel=True,
        axes=(0, 1),
        exactness="as solved: real zeros in half precision",
        runtimes=(Runtime("hqq", "0.2.8"), Runtime("transformers", "4.57", "with hqq; not 5")),
        library="hqq",  # transformers 5 would load it with random weights
    )
    scale_dtypes = (
        HALF_DTYPES  # as the reader will cast them; half precision holds both for a float32 model, at half the bytes
    )

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Codes are packed across groups, so the rows of the grouped matrix must fill whole bytes."""
        if reason := refuse_unless_linear(role):
            return reason
        rows, per_byte = _grouped_shape(shape, spec)[0], STRIDED_PER_WORD[spec.code_bits]
        if spec.nbits != 3 and rows % per_byte:
            return f"{rows} rows of groups do not fill bytes of {per_byte} codes"
        return None

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """Names, types and shapes of HQQLinear.state_dict()."""
        rows, columns = _grouped_shape(shape, spec)
        n_groups = columns if spec.axis == 0 else rows
        side = (1, n_groups) if spec.axis == 0 else (n_groups, 1)
        packed = (math.ceil(rows / STRIDED_PER_WORD[spec.code_bits]), columns)
        stored = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[spec.scale_dtype]
        constants = _constants(shape, DTYPES[dtype], spec)
        return [
            (f"{module}.W_q", "I32" if spec.nbits == 3 else "U8", packed),
            (f"{module}.scale", stored, side),
            (f"{module}.zero", stored, side),
            *((f"{module}.{key}", NAMES[value.dtype], tuple(value.shape)) for key, value in constants.items()),
        ]

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """HQQLinear.state_dict() as tensors."""
        stored = {
            "W_q": pack_strided(tensor.W_q, tensor.spec.code_bits),
            "scale": tensor.scale,
            "zero": tensor.zero,
            **_constants(tensor.shape, tensor.dtype, tensor.spec),
        }
        return {f"{module}.{key}": value for key, value in stored.items()}

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """As transformers 4.57 writes it."""
        weights = {
            "nbits": spec.code_bits, "channel_wise": True, "group_size": spec.group_size, "optimize": True,
            "round_zero": spec.nbits == 4, "axis": spec.axis, "view_as_float": False,
        }  # fmt: skip
        settings = {
            "quant_method": "hqq",
            "quant_config": {
                "weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False,
            },
            "skip_modules": left_alone(quantized, copied),
        }  # fmt: skip
        return {"quantization_config": settings}


def _grouped_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    """(rows, columns) of the grouped matrix that hqq packs along its rows."""
    group_size = resolve_group_size(shape, spec)
    n_groups = math.prod(shape) // group_size
    return (group_size, n_groups) if spec.axis == 0 else (n_groups, group_size)


def _constants(shape: tuple[int, ...], dtype: torch.dtype, spec: QuantSpec) -> dict[str, torch.Tensor]:
    """The meta data of one layer, encoded as hqq.core.utils.encode_safetensor_type does."""
    packing = _PACKING[spec.code_bits]
    numbers = {"nbits": spec.code_bits, "group_size": resolve_group_size(shape, spec), "axis": spec.axis}
    flags = {
        "channel_wise": True, "optimize": True, "round_zero": spec.nbits == 4, "view_as_float": False,
        "quant_scale": False, "quant_zero": False, "offload_meta": False,
        "encoded_state_dict": True, "stores_quant_config": True,
    }  # fmt: skip
    words = {
        "packing": packing,
        "compute_dtype": str(dtype),
        "unpack_view_dtype": "torch.int32" if packing == "3bit_32" else "torch.uint8",
    }
    return {
        "shape": torch.tensor(shape, dtype=torch.int64),
        **{key: torch.tensor(value, dtype=torch.int32) for key, value in numbers.items()},
        **{key: torch.tensor(int(value), dtype=torch.uint8) for key, value in flags.items()},
        **{key: torch.tensor(list(value.encode()), dtype=torch.uint8) for key, value in words.items()},
    }
