"""mlx's affine mode, which format `metal` has under other names.

Codes are a dense bit stream; w = q * scale + bias, where the bias is a stored offset -zero * scale that the solver rounds before
it chooses codes (spec.zero "offset").
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hqq_core.formats.container import Layout
from hqq_core.packing import pack_dense
from hqq_core.safetensors_file import NAMES
from hqq_core.solver import resolve_group_size
from hqq_core.spec import QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor


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
