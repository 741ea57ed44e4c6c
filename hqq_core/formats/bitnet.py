"""Format `bitnet`: weights that were trained ternary, packed as they are; nothing is solved, and all else is refused.

Layout: transformers 5.23, integrations/bitnet.py: quarters of the rows share bytes, the first in the lowest bits, with -1, 0
and 1 as 0, 1 and 2; one scale a matrix. Its `autobitlinear` multiplies by that scale where `bitlinear` divides, so that it can
be the weights' own magnitude. Either rounds activations to 8 bit for each token, as training does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hqq_core.architectures import Role
from hqq_core.errors import TensorError
from hqq_core.formats.base import CheckpointWriter, Layout, left_alone, refuse, refuse_unless_linear
from hqq_core.formats.capabilities import Capabilities, Runtime
from hqq_core.safetensors_file import NAMES
from hqq_core.spec import TERNARY, QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor

PER_BYTE = 4


class BitnetWriter(CheckpointWriter):
    """Writes each weight as weight and weight_scale."""

    name = "bitnet"
    capabilities = Capabilities(
        zeros={TERNARY: ("none",)},
        whole_channel=True,
        exactness="the source's weights, which must be ternary",
        runtimes=(
            Runtime("transformers", "5.23", "with accelerate; rounds activations to 8 bit"),
            Runtime("mlx-lm", "0.32", "on a Mac; read in its source"),
        ),
        lossless=True,
    )

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """No mixture of experts: transformers fuses them, and looks for linear layers."""
        if Role.EXPERT in quantized | copied:
            raise refuse(self, "format", "mixture of experts", "none")

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """Linear layers whose rows fill bytes."""
        if reason := refuse_unless_linear(role):
            return reason
        return f"{shape[0]} rows do not fill bytes of {PER_BYTE}" if shape[0] % PER_BYTE else None

    def tensor_spec(self, spec: QuantSpec, name: str, shape: tuple[int, ...], dtype: str) -> QuantSpec:
        """Nothing is searched: what is nearest to each weight is that weight."""
        return dataclasses.replace(spec, scale_dtype=self.scale_dtypes[dtype], iters=0, starts=1)

    def solve(
        self,
        W: torch.Tensor,
        spec: QuantSpec,
        *,
        name: str = "weight",
        progress: Callable[[int], None] | None = None,
        **_: Any,
    ) -> QuantizedTensor:
        """The weights themselves: codes 0, 1, 2 of -s, 0, s; a TensorError where there are other magnitudes than 0 and one s."""
        magnitudes = W.abs()
        s = magnitudes.max()
        if not s.isfinite():
            raise TensorError(name, "has values that are NaN or infinite")
        if not ((magnitudes == s) | (magnitudes == 0)).all():
            found = int(magnitudes.unique().count_nonzero())
            raise TensorError(
                name, f"{found} magnitudes beside 0: format 'bitnet' packs weights trained ternary, with one"
            )
        W_q = W.sign().to(torch.int8).add_(1).view(torch.uint8)
        scale = torch.where(s > 0, s, 1).to(TORCH_DTYPES[spec.scale_dtype]).expand(len(W), 1)
        squared_norm = int(magnitudes.count_nonzero()) * s.item() ** 2
        zero = torch.full_like(scale, spec.middle)
        if progress:
            progress(W.numel())
        return QuantizedTensor(W_q, scale, zero, tuple(W.shape), W.dtype, spec, 0.0, squared_norm)

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """Names, types and shapes of a packed AutoBitLinear's."""
        rows, columns = shape
        return [
            (f"{module}.weight", "U8", (rows // PER_BYTE, columns)),
            (f"{module}.weight_scale", NAMES[TORCH_DTYPES[spec.scale_dtype]], (1,)),
        ]

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Quarters of the rows side by side in bytes."""
        quarters = tensor.W_q.view(PER_BYTE, -1, tensor.shape[1])
        packed = quarters[0].clone()
        for i in range(1, PER_BYTE):
            packed |= quarters[i] << 2 * i
        return {f"{module}.weight": packed, f"{module}.weight_scale": tensor.scale[0].clone()}

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """As transformers writes it."""
        settings = {
            "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
            "modules_to_not_convert": left_alone(quantized, copied),
        }  # fmt: skip
        return {"quantization_config": settings}
